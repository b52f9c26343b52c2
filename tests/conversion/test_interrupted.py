"""Whatever happens while a model is written over another, the directory is the one or the other, bit for bit.

Disks that fill up, interrupts and kills, each at every call by which something is written (`interrupted/steps.py`),
and kills at random moments. `EQX_TRANSFORMERS_FULL=1` tries all of the calls and many more moments.
"""

import ctypes
import errno
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

import converters
from eqx_transformers import _swap, load
from eqx_transformers._files import replacing

from ..full import FULL

ROOT = Path(__file__).parents[2]
KILLS, TRIES = (60, 10_000) if FULL else (8, 5)
# What a full disk refuses; and what happens after the old model has been taken away, from where on it must be the new.
REFUSED = ("mkdir", "create", "write", "fsync")
SWAPS = ("exchange", "rename")
READ = {"export": lambda d: converters.load(d)[0], "save": lambda d: load(d)[0]}


@pytest.fixture(scope="module")
def order():
    """Runs one order in a child of a process that is ready for it: see `interrupted/server.py`."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.conversion.interrupted.server"]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def give(**one):
        server.stdin.write(json.dumps(one) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield give
    server.stdin.close()
    assert server.wait(timeout=20) == 0
    server.stdout.close()


@pytest.fixture(scope="module")
def written(order, tmp_path_factory):
    """By what is done: {what lies there: a directory}, `new` written over a copy of `old`."""
    made = {}
    for do in READ:
        old, new = (tmp_path_factory.mktemp(do) / name for name in ("old", "new"))
        assert order(do=do, arguments=[str(old), 0])["error"] is None
        (old / "notes").mkdir()
        (old / "notes" / "mine.txt").write_text("kept by every write")
        shutil.copytree(old, new)
        assert order(do=do, arguments=[str(new), 1])["error"] is None
        made[do] = {"old": old, "new": new}
    assert len(list(made["export"]["old"].glob("*.safetensors"))) > 4
    return made


def content(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def found(directory, known):
    """Which of the known directories this is, file by file; there may be nothing, and must not be anything else."""
    if not directory.exists():
        return "nothing"
    names = [name for name, one in known.items() if content(one) == content(directory)]
    assert names, f"{directory} is neither the old nor the new model: {sorted(content(directory))}"
    return names[0]


def left_behind(target):
    """What lies beside it; nobody takes a hidden directory for a model."""
    names = [p.name for p in target.parent.iterdir() if p != target]
    assert all(name.startswith(f".{target.name}.") for name in names), names
    return names


def some(numbers):
    """A number of them, spread over all."""
    return numbers if len(numbers) <= TRIES else [numbers[i * len(numbers) // TRIES] for i in range(TRIES)]


def fresh(tmp_path, number, old):
    target = tmp_path / str(number) / "model"
    target.parent.mkdir()
    if old is not None:
        shutil.copytree(old, target)
    return target


def steps_of(order, do, tmp_path, old, **more):
    """(every step, the first one after which the new model is there)"""
    target = fresh(tmp_path, "dry", old)
    steps = order(do=do, arguments=[str(target), 1], **more)["steps"]
    last = max(at for at, name in enumerate(steps) if name in SWAPS)
    assert len(steps) > last + 1 > 20
    return steps, last + 1


# --- every step at which a disk is full, the user interrupts, or the process is killed


@pytest.mark.parametrize("before", ["old", "nothing"])
@pytest.mark.parametrize("how", ["full", "interrupt"])
@pytest.mark.parametrize("do", READ)
def test_an_error_at_any_step_leaves_one_whole_model_and_nothing_else(order, written, tmp_path, do, how, before):
    old = written[do].get(before)
    steps, done = steps_of(order, do, tmp_path, old)
    tried = [at for at, name in enumerate(steps[: done + 2]) if how == "interrupt" or name in REFUSED]
    tried = tried[1:]  # the first makes sure of the directory that both lie in, which is there
    for at in sorted({*some(tried), *tried[-2:]}):
        target = fresh(tmp_path, at, old)
        said = order(do=do, arguments=[str(target), 1], at=at, how=how)
        assert said["error"] == ("OSError" if how == "full" else "KeyboardInterrupt"), (steps[at], said)
        if how == "full":
            assert said["message"].startswith(f"[Errno {errno.ENOSPC}] No space left on device")
            assert said["path"].startswith(str(target.parent)), said["path"]
        if old is None and at >= done:
            assert READ[do](target).config == READ[do](written[do]["new"]).config
        else:
            assert found(target, written[do]) == (before if at < done else "new"), (at, steps[at])
        assert left_behind(target) == []


@pytest.mark.parametrize("do", READ)
def test_a_kill_at_any_step_leaves_one_whole_model(order, written, tmp_path, do):
    steps, done = steps_of(order, do, tmp_path, written[do]["old"])
    for at in sorted({*some(range(len(steps))), done - 1, done}):
        target = fresh(tmp_path, at, written[do]["old"])
        assert order(do=do, arguments=[str(target), 1], at=at, how="kill")["killed"]
        assert found(target, written[do]) == ("old" if at < done else "new"), (at, steps[at])
        expect_undisturbed(order, do, target, written[do])


def expect_undisturbed(order, do, target, known):
    """What a killed process left is in nobody's way."""
    left = left_behind(target)
    assert order(do=do, arguments=[str(target), 1])["error"] is None
    assert found(target, known) == "new" and left_behind(target) == left


@pytest.mark.parametrize("do", READ)
def test_where_directories_cannot_be_exchanged_an_interrupt_never_takes_the_only_model(order, written, tmp_path, do):
    steps, done = steps_of(order, do, tmp_path, written[do]["old"], plain=True)
    assert steps[done - 2 : done] == ["rename", "rename"]
    for at in range(done - 4, done + 2):
        target = fresh(tmp_path, at, written[do]["old"])
        said = order(do=do, arguments=[str(target), 1], at=at, how="interrupt", plain=True)
        assert said["error"] == "KeyboardInterrupt"
        assert found(target, written[do]) == ("old" if at < done else "new"), (at, steps[at])
        assert at >= done or left_behind(target) == []  # later, what is interrupted is the sweeping


def test_where_directories_cannot_be_exchanged_a_kill_between_two_renames_leaves_the_old_one_beside(
    order, written, tmp_path
):
    """The one moment of which `replacing` says that it cannot promise anything."""
    _, done = steps_of(order, "export", tmp_path, written["export"]["old"], plain=True)
    target = fresh(tmp_path, "kill", written["export"]["old"])
    assert order(do="export", arguments=[str(target), 1], at=done - 1, how="kill", plain=True)["killed"]
    assert not target.exists()
    (aside,) = target.parent.glob(".model.*.old")
    assert found(aside / "model", written["export"]) == "old"
    assert order(do="export", arguments=[str(target), 1])["error"] is None
    assert len(converters.load(target)[1].layout) == len(list(written["export"]["new"].glob("*.safetensors")))


# --- kills at random moments


def test_a_kill_at_any_moment_leaves_one_whole_model(order, written, tmp_path):
    """Shard by shard, tensor by tensor: what is loaded afterwards is one of the two models."""
    known, chosen = written["export"], random.Random(0)
    leaves = lambda directory: [np.asarray(x).tobytes() for x in jax.tree.leaves(READ["export"](directory))]
    expected = {name: leaves(directory) for name, directory in known.items()}
    assert expected["old"] != expected["new"]
    target = fresh(tmp_path, "measured", known["old"])
    lasts = sorted(order(do="export", arguments=[str(target), 1])["seconds"] for _ in range(5))[2]
    outcomes = Counter()
    for number in range(4 * KILLS):  # on a busy machine, some are done before their moment
        target = fresh(tmp_path, number, known["old"])
        said = order(do="export", arguments=[str(target), 1], after=chosen.uniform(0, lasts))
        name = found(target, known)
        assert leaves(target) == expected[name]
        outcomes[name, bool(left_behind(target)), said["killed"]] += 1
        expect_undisturbed(order, "export", target, known)
        if killed(outcomes) == KILLS:
            break
    print(f"over {1000 * lasts:.0f} ms, (what is there, something remains, killed): {dict(outcomes)}")
    assert killed(outcomes) == KILLS


def killed(outcomes):
    return sum(count for (_, _, was_killed), count in outcomes.items() if was_killed)


# --- files that the system does not let grow


@pytest.mark.parametrize("limit", [0, 100, 3000, 5500])
@pytest.mark.parametrize("do", READ)
def test_files_that_may_not_grow_leave_the_old_model(order, written, tmp_path, do, limit):
    target = fresh(tmp_path, "one", written[do]["old"])
    said = order(do=do, arguments=[str(target), 1], limit=limit)
    assert said["error"] == "OSError" and str(target.parent) in said["message"]
    assert found(target, written[do]) == "old" and left_behind(target) == []


@pytest.mark.parametrize("option, do", [("--out", "save"), ("--export", "export")])
@pytest.mark.parametrize("limit", [0, 3000])
def test_the_command_line_says_it_in_one_line(order, written, tmp_path, option, do, limit):
    target, source = fresh(tmp_path, "one", written[do]["old"]), written["export"]["new"]
    if option == "--export":  # of a native directory, for which nothing else is written
        assert order(do="main", arguments=[str(source), "--out", str(tmp_path / "native")])["code"] == 0
        source = tmp_path / "native"
    said = order(do="main", arguments=[str(source), option, str(target)], limit=limit)
    assert said["code"] == 2, said["said"]
    assert said["said"] == f"error: [Errno {errno.EFBIG}] File too large: '{target}'\n"
    assert found(target, written[do]) == "old" and left_behind(target) == []


# --- the exchange itself


def two(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for place in (one, other):
        place.mkdir()
        (place / "config.json").write_text(json.dumps(place.name))
    return one, other


def test_this_system_exchanges_directories(tmp_path):
    """Linux and macOS do, on every file system that tests run on."""
    one, other = two(tmp_path)
    assert _swap.exchange(one, other)
    assert [json.loads((place / "config.json").read_text()) for place in (one, other)] == ["other", "one"]
    with pytest.raises(FileNotFoundError, match="other"):
        _swap.exchange(tmp_path / "nothing", other)


@pytest.mark.parametrize("code", [None, *_swap.UNKNOWN])
def test_without_the_system_call_there_are_two_renames(tmp_path, monkeypatch, code):
    def refuse(one, other):
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(_swap, "_system_call", lambda: code and refuse)
    one, other = two(tmp_path)
    _swap.swap(one, other)
    assert json.loads((other / "config.json").read_text()) == "one"
    assert list(tmp_path.iterdir()) == [other]


def test_an_error_of_the_exchange_is_raised_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_swap, "_system_call", lambda: lambda one, other: ctypes.set_errno(errno.EACCES) or -1)
    _, other = two(tmp_path)
    with pytest.raises(PermissionError, match="other"), replacing(other) as new:
        (new / "config.json").write_text('"new"')
    assert json.loads((other / "config.json").read_text()) == "other"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other"]


@pytest.mark.parametrize("module, name", [("linux", "renameat2"), ("darwin", "renamex_np"), ("win32", None)])
def test_each_system_has_its_call(monkeypatch, module, name):
    asked = []

    class Library:
        def __getattr__(self, name):
            return lambda *arguments: asked.append((name, len(arguments))) or 0

    monkeypatch.setattr(sys, "platform", module)
    monkeypatch.setattr(ctypes, "CDLL", lambda *a, **k: Library())
    call = _swap._system_call()
    assert (call is None) == (name is None)
    if call is not None:
        assert call(b"one", b"other") == 0 and asked == [(name, 5 if name == "renameat2" else 3)]


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    one, _ = two(tmp_path)
    (tmp_path / "link").symlink_to(one)
    with replacing(tmp_path / "link") as new:
        (new / "config.json").write_text('"new"')
    assert (tmp_path / "link").is_symlink() and json.loads((one / "config.json").read_text()) == "new"
    assert len(list(tmp_path.iterdir())) == 3
