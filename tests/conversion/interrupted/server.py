"""`python -m tests.conversion.interrupted.server`: a process that has everything imported and forks a child an order.

An order is a line of JSON: `do` (`export`, `save` or `main`, with `arguments`), and what is to happen:

- `at`, `how`: at this step the child kills itself (`kill`), or gets an error (`full`) or a KeyboardInterrupt
- `after`: seconds after which the child is killed from outside
- `limit`: the largest file that it may write, in bytes
- `plain`: it runs where directories cannot be exchanged

The answer: whether it was `killed`, the `error`, the `steps` that it took, the `seconds`, of `main` `code` and `said`.
No JAX backend is started before a fork: the models' arrays are NumPy's.
"""

import contextlib
import dataclasses
import errno
import io
import json
import os
import resource
import signal
import sys
import time

import jax
import numpy as np

import eqx_transformers
from converters import export, hf
from converters.families import FAMILIES
from eqx_transformers import MaskedLM, _swap
from eqx_transformers.skeletons import skeleton

from .steps import watch

SIZES = {"vocab_size": 500, "embed_dim": 24, "num_heads": 3, "num_layers": 2, "mlp_dim": 40, "max_positions": 40}
SHARDS = ("5KB", "8KB")


def made(seed):
    config = dataclasses.replace(FAMILIES["roberta"].defaults, **SIZES)
    numbers = np.random.default_rng(seed)
    fill = lambda s: numbers.standard_normal(s.shape).astype(s.dtype) if isinstance(s, jax.ShapeDtypeStruct) else s
    return jax.tree.map(fill, skeleton(MaskedLM, config))


MODELS = [made(0), made(1)]


def act(order):
    if order["do"] == "main":
        return hf.main(order["arguments"])
    directory, number = order["arguments"]
    if order["do"] == "save":
        return eqx_transformers.save(MODELS[number], directory, extras={"number": number})
    return export(MODELS[number], directory, max_shard_size=SHARDS[number])


def happening(order, steps):
    def step(name, path, half):
        steps.append(name)
        if len(steps) - 1 != order.get("at"):
            return
        half()
        if order["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if order["how"] == "interrupt":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path and os.fspath(path))

    return step


def child(order, pipe):
    steps, said, printed = [], {"error": None}, io.StringIO()
    if "limit" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    if order.get("plain"):
        _swap._system_call = lambda: None
    if "after" not in order:
        watch(happening(order, steps))
    os.write(pipe, b"\n")
    begin = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            said["code"] = act(order)
    except (OSError, KeyboardInterrupt) as error:
        said |= {"error": type(error).__name__, "message": str(error), "path": getattr(error, "filename", None)}
    said |= {"seconds": time.perf_counter() - begin, "steps": steps, "said": printed.getvalue()}
    os.write(pipe, json.dumps(said).encode())


def run(order):
    ours, theirs = os.pipe()
    number = os.fork()
    if not number:
        try:
            child(order, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as pipe:
        pipe.read(1)
        if "after" in order:
            time.sleep(order["after"])
            os.kill(number, signal.SIGKILL)
        said = pipe.readall()
    return {"killed": os.WIFSIGNALED(os.waitpid(number, 0)[1]), **json.loads(said or "{}")}


def main():
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
