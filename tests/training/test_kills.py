"""A run that is killed at random moments, and ended by Ctrl-C, ends with the bits of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..full import FULL

ROOT = Path(__file__).parent.parent.parent
KILLS = 24 if FULL else 2
STEPS = 240 if FULL else 30


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What the first child compiles, the others read."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs"))}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return {**os.environ, **cache}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment):
    directory = tmp_path_factory.mktemp("uninterrupted")
    child = start(directory, environment)
    assert finished(child) == 0
    return directory


def start(directory: Path, environment) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", "-m", "tests.training.small_run", str(directory), str(STEPS)]
    with open(directory / "output", "a") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def finished(child: subprocess.Popen) -> int:
    return child.wait(timeout=240)


def newest(directory: Path) -> int:
    """The step of the newest complete checkpoint."""
    names = os.listdir(directory / "checkpoints") if (directory / "checkpoints").is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def half_written(directory: Path) -> list[str]:
    names = os.listdir(directory / "checkpoints") if (directory / "checkpoints").is_dir() else []
    return [name for name in names if "tmp" in name]


def wait_until(child: subprocess.Popen, so) -> bool:
    """Whether it came before the child ended."""
    until = time.monotonic() + 240
    while child.poll() is None:
        if so():
            return True
        assert time.monotonic() < until
        time.sleep(0.0005)
    return False


def outcome(directory: Path):
    """The digest of the last state, and the log without what depends on time."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return (directory / "digest").read_text(), [
        {name: x for name, x in line.items() if name != "tokens_per_second"} for line in lines
    ]


def test_killed_at_random_moments_and_ended_by_ctrl_c_it_ends_with_the_same_bits(tmp_path, environment, uninterrupted):
    draw, in_writing = random.Random(0), 0
    said = lambda: (tmp_path / "output").read_text()
    for kill in range(KILLS):
        child, begun = start(tmp_path, environment), newest(tmp_path)
        ahead = draw.randint(1, 5)
        came = wait_until(child, lambda at=begun + ahead: newest(tmp_path) >= at)
        if kill % 3 != 2:  # in the middle of a checkpoint's writing, early or late in it
            came = came and wait_until(child, lambda: half_written(tmp_path))
        time.sleep(draw.uniform(0, 0.02))
        child.send_signal(signal.SIGKILL)
        assert came and finished(child) == -signal.SIGKILL, said()[-3000:]
        in_writing += bool(half_written(tmp_path))
    assert in_writing > 0

    child, begun = start(tmp_path, environment), newest(tmp_path)
    assert wait_until(child, lambda: newest(tmp_path) > begun)
    child.send_signal(signal.SIGINT)
    assert finished(child) == 128 + signal.SIGINT, said()[-3000:]
    step = newest(tmp_path)
    assert f"SIGINT: saved at step {step} of {STEPS} in {tmp_path / 'checkpoints'}." in said()
    assert "Run the same again" in said() and not half_written(tmp_path)

    child = start(tmp_path, environment)
    assert finished(child) == 0, said()[-3000:]
    assert f"Going on from step {step} of {STEPS}" in said()
    assert outcome(tmp_path) == outcome(uninterrupted)
