"""Directories that the tests of a process share; they are removed when it has run its last test."""

import functools
import shutil
import tempfile
from pathlib import Path


@functools.cache
def _all() -> Path:
    return Path(tempfile.mkdtemp(prefix="eqx-transformers-"))


def directory(name: str) -> Path:
    """A new and empty one."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_all()))


def remove() -> None:
    if _all.cache_info().currsize:
        shutil.rmtree(_all())
        _all.cache_clear()
