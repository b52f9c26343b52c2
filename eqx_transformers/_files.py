"""Directories, and files, that appear whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ._swap import flush, flush_path, swap


class Kind(NamedTuple):
    """What a directory holds, as messages say it, and the file that it is known by."""

    said: str
    mark: str


MODEL = Kind("a model", "config.json")


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` for a file that takes its place when the block ends without an error; folders are made."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        yield fresh
        flush_path(fresh)
        os.replace(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)


def written(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file that is the old one or the new one at every moment, even if the process is killed."""
    with writing(path) as fresh:
        fresh.write_bytes(content)


@contextmanager
def replacing(
    directory: str | os.PathLike[str],
    *,
    stale: Iterable[str] = (),
    replaceable: Callable[[Path], bool] = lambda _: True,
    kind: Kind = MODEL,
) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its place when the block ends without an error.

    Files of an earlier one there that were not written anew stay, but for those that match the globs `stale`.
    The two change places in one step, so that at every moment, even if the process is killed, `directory` is the old
    one or the new one (`_swap.swap` says where no system can promise it). A link is followed. Raises a
    `FileExistsError` when `directory` is a file, or holds something that is not of this `kind` (a
    directory without its mark), or not a `replaceable` one: nobody's data is swept away by a wrong path. An `OSError`
    of the disk names the directory, where it names no file.
    """
    target = Path(os.path.realpath(directory))
    expect_replaceable(target, replaceable, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    fresh.mkdir()
    try:
        yield fresh
        if target.is_dir():
            _keep_the_rest(target, fresh, tuple(stale))
        flush(fresh)
        swap(fresh, target)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(target)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def expect_replaceable(target: Path, replaceable: Callable[[Path], bool] = lambda _: True, kind: Kind = MODEL) -> None:
    """Raises the `FileExistsError` of `replacing`: for those who want to know before the work."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; {kind.said} is written as a directory. Choose another name.")
    if target.is_dir() and any(target.iterdir()) and not (target / kind.mark).is_file():
        found = ", ".join(sorted(p.name for p in target.iterdir())[:4])
        raise FileExistsError(
            f"{target} exists and is not {kind.said} directory (it has no {kind.mark}; it has {found}, …)."
            " Choose a new or empty directory."
        )
    if (target / kind.mark).is_file() and not replaceable(target):
        raise FileExistsError(
            f"{target} holds a model in another format, which would be lost. Choose another directory."
        )


def _keep_the_rest(old: Path, fresh: Path, stale: tuple[str, ...]) -> None:
    for path in old.iterdir():
        if not (fresh / path.name).exists() and not any(path.match(glob) for glob in stale):
            _copy(path, fresh / path.name)


def _copy(path: Path, to: Path) -> None:
    """A file, a link or a directory; unlike with `shutil.copytree`, what goes wrong is raised as it is."""
    if path.is_symlink() or not path.is_dir():
        shutil.copy2(path, to, follow_symlinks=False)
        return
    to.mkdir()
    for inner in path.iterdir():
        _copy(inner, to / inner.name)
    shutil.copystat(path, to)
