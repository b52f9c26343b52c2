"""The directory of an adapter, which appears whole or not at all."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eqx_transformers._swap import flush, swap

from .settings import CONFIG


def expect_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; an adapter is written as a directory. Choose another name.")
    found = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if found and (CONFIG not in found or "config.json" in found):
        there = ", ".join(found[:5])
        raise FileExistsError(f"{target} exists and is no adapter's directory (it has {there}). Choose another name.")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `target`, what lies there beside an adapter with it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    fresh.mkdir()
    try:
        yield fresh
        for path in target.iterdir() if target.is_dir() else ():
            if not path.name.startswith("adapter_"):
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, fresh / path.name)
        flush(fresh)
        swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
