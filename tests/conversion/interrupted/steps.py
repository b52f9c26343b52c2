"""The calls by which a write reaches the disk, each a step at which something may happen."""

import builtins
import functools
import io
import os

from eqx_transformers import _swap

CALLS = [(os, name) for name in ("mkdir", "open", "fsync", "chmod", "rename", "unlink", "rmdir")] + [
    (_swap, "exchange")
]


def watch(step):
    """From now on this process calls `step(name, path, half)` before each of them; `half()` writes half of it."""
    for module, name in CALLS:
        setattr(module, name, functools.partial(_call, getattr(module, name), name, step))
    builtins.open = io.open = functools.partial(_open, io.open, step)


def _call(call, name, step, *args, **options):
    step(name, args[0] if isinstance(args[0], str | os.PathLike) else None, lambda: None)
    return call(*args, **options)


def _open(call, step, file, mode="r", *args, **options):
    if not set(mode) & set("wax+"):
        return call(file, mode, *args, **options)
    step("create", file, lambda: None)
    return _Writer(call(file, mode, *args, **options), step)


class _Writer:
    def __init__(self, file, step):
        self._file, self._step = file, step

    def write(self, data):
        self._step("write", None, lambda: (self._file.write(data[: len(data) // 2]), self._file.flush()))
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()
