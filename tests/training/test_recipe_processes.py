"""Recipes in two processes, each with a device of its own, against one process with both."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from .test_recipe_classify import folder as labelled
from .test_recipe_embed import folder as paired
from .test_recipe_masked_lm import NEW
from .test_recipe_t5_vae import LINES, TINY as VAE

__all__ = ["labelled", "paired"]  # fixtures

STATED = 1e-5


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES * 3) + "\n")
    return str(path)


def classify(labelled):
    given = [x for name in ("train", "test") for x in (f"--{name}", str(labelled / f"{name}.tsv"))]
    held = ["--validation", str(labelled / "test.tsv"), "--no-buckets", "--learning-rate", "0.01"]
    return ["--model", str(labelled / "bert"), *given, *held, "--batch-size", "8"]


def embed(paired):
    return [str(paired / "pairs.tsv"), "--model", str(paired / "bert"), "--batch-size", "32", "--max-shapes", "1"]


def masked_lm(lines):
    return [lines, *NEW, "--batch-size", "8", "--max-shapes", "1", "--hold-out", "0.3"]


def language_model(lines):
    sizes = ["--layers", "1", "--heads", "2", "--head-dim", "8", "--embed-dim", "16", "--length", "8"]
    return [lines, *sizes, "--batch-size", "8", "--sample-tokens", "4", "--sample-every", "1"]


def t5_vae(lines):
    return [lines, *VAE.replace(" --no-progress --evaluate-every 2", "").split()]


def started(recipe, arguments, devices):
    """The command as a process of its own, with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", f"eqx_transformers.training.recipes.{recipe}", *arguments, "--no-progress"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def pair(recipe, arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = [*arguments, "--coordinator", f"localhost:{port}", "--processes", "2"]
    return [started(recipe, [*together, "--process", str(i)], 1) for i in range(2)]


def ended(*processes):
    """Of each what it said, and its exit code."""
    try:
        return [(process.communicate(timeout=300)[0], process.returncode) for process in processes]
    finally:
        for process in processes:  # one that waits for the other, if that has failed
            process.kill()
            process.communicate()


def measured(out):
    """All numbers that were written, in their order."""
    flat = lambda x: [y for one in x.values() for y in flat(one)] if isinstance(x, dict) else [x]
    return [x for x in flat(json.loads((out / "metrics.json").read_text())) if isinstance(x, int | float)]


@pytest.mark.full
@pytest.mark.parametrize("recipe", [classify, embed, masked_lm, language_model, t5_vae])
def test_two_processes_measure_what_one_does(recipe, request, tmp_path):
    (data,) = recipe.__code__.co_varnames[: recipe.__code__.co_argcount]
    given = recipe(request.getfixturevalue(data))
    given += ["--steps", "6", "--evaluate-every", "3", "--mesh", "data=2", "--fully-sharded"]
    name = recipe.__name__
    ((said, code),) = ended(started(name, [*given, "--out", str(tmp_path / "one")], 2))
    assert code == 0, said
    (found, code), (silent, other) = ended(*pair(name, [*given, "--out", str(tmp_path / "two")]))
    assert (code, other) == (0, 0), found + silent
    assert measured(tmp_path / "two") == pytest.approx(measured(tmp_path / "one"), rel=STATED, abs=STATED)
    expected = said.replace(str(tmp_path / "one"), str(tmp_path / "two")).splitlines()
    assert found.splitlines()[-1] == expected[-1] and expected[-1] not in silent


@pytest.mark.full
def test_they_stop_together_and_go_on(labelled, tmp_path):
    given = [*classify(labelled), "--steps", "600", "--evaluate-every", "200", "--checkpoint-every", "20"]
    given += ["--mesh", "data=2", "--fully-sharded"]
    ((said, code),) = ended(started("classify", [*given, "--out", str(tmp_path / "one")], 2))
    assert code == 0, said
    given += ["--out", str(tmp_path / "two")]
    processes = pair("classify", given)
    while not (tmp_path / "two" / "checkpoints" / "20").is_dir() and processes[0].poll() is None:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGINT)  # one of them alone
    (said, code), (silent, other) = ended(*processes)
    assert (code, other) == (130, 130), said + silent
    assert 20 <= max(int(path.name) for path in (tmp_path / "two" / "checkpoints").glob("[0-9]*")) < 600
    (said, code), (silent, other) = ended(*pair("classify", given))
    assert (code, other) == (0, 0), said + silent
    assert measured(tmp_path / "two") == measured(tmp_path / "one")
