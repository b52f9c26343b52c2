"""Two directories that change places in one step, where the system can; and what makes a rename outlast a power cut."""

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# What says that the system, or the file system, does not know the call.
UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2


def swap(fresh: Path, target: Path) -> None:
    """`fresh` takes the place of `target`; what was there is gone, or is at `fresh`.

    At every moment there is one of the two at `target`. Only where neither the system nor the file system can exchange
    directories, there is nothing for the moment between two renames, and a process that is killed then leaves the old
    one in a hidden directory beside it.
    """
    if not os.path.lexists(target):
        os.rename(fresh, target)
    elif not exchange(fresh, target):
        _in_two_steps(fresh, target)
    flush_path(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Each gets the other's name, at once. False where that is not known."""
    call = _system_call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    if (code := ctypes.get_errno()) in UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), os.fspath(one), None, os.fspath(other))


def _system_call() -> Callable[[bytes, bytes], int] | None:
    """Linux's or macOS's, from the C library that Python runs on; older ones lack it."""
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform)
    call = None if name is None else getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is None:
        return None
    if name == "renamex_np":
        return lambda one, other: call(one, other, ctypes.c_uint(RENAME_SWAP))
    return lambda one, other: call(AT_FDCWD, one, AT_FDCWD, other, ctypes.c_uint(RENAME_EXCHANGE))


def _in_two_steps(fresh: Path, target: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        os.rename(target, aside / target.name)
        os.rename(fresh, target)
    finally:  # an interrupt may come between the two: never is the only model deleted
        if not os.path.lexists(target):
            os.rename(aside / target.name, target)
        shutil.rmtree(aside, ignore_errors=True)


def flush(directory: Path) -> None:
    """Waits until the disk has all that the directory holds, so that no rename survives a power cut without it."""
    for folder, _, names in os.walk(directory):
        for name in names:
            if not os.path.islink(path := Path(folder, name)):
                flush_path(path)
        flush_path(Path(folder))


def flush_path(path: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened, nor a file that is open for reading be flushed
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNKNOWN:  # of a file system that has no such thing
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(descriptor)
