"""Of a hub id, what a report needs and no more: small files whole, of safetensors the header alone."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .containers import SAFETENSORS, read_index
from .errors import SourceNotFound
from .hub import Absent, Repository, fetch, import_hub

# What is asked for at first: nearly every header is shorter. The library that reads it refuses a longer one than MOST.
AT_FIRST, MOST = 2**16, 100_000_000


def fetch_headers(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """As `hub.fetch`, but of safetensors files only the headers come over the network, for `open_directory`.

    What is not fetched is a hole in the file, which has the right size; such files lie in a temporary directory that
    goes when Python ends. Weights in other containers, and those in the cache, are as `fetch` gives them. Raises what
    `fetch` raises.
    """
    import_hub()
    options = {"revision": revision, "subfolder": subfolder, "token": token, "local_files_only": local_files_only}
    repository = Repository(repo_id, revision, subfolder, token, local_files_only)
    directory, small = repository.open()
    into = Path(tempfile.mkdtemp(prefix="headers-"))
    atexit.register(shutil.rmtree, into, ignore_errors=True)
    if repository.offline is not None or not _heads(repository, into):
        return fetch(repo_id, **options)
    repository.expect_one_commit(directory, small)
    for path in (directory / "config.json", *small):
        (into / path.relative_to(directory)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, into / path.relative_to(directory))
    return into


def _heads(repository: Repository, into: Path) -> bool:
    """Whether the weights are safetensors that are not here yet; their headers are in `into` then."""
    if repository.is_cached(SAFETENSORS.weights):
        return False
    if _head(repository, SAFETENSORS.weights, into):
        return True
    index = repository.find(SAFETENSORS.index)
    if index is None:
        return False
    names = sorted(set(read_index(index, SAFETENSORS)[0].values()))
    if all(repository.is_cached(name) for name in names):
        return False
    shutil.copyfile(index, into / SAFETENSORS.index)
    for name in names:
        if not _head(repository, name, into):
            raise repository.without_shard(name, SAFETENSORS)
    return True


def _head(repository: Repository, name: str, into: Path) -> bool:
    """Writes the file with its header and a hole; False if the repository does not have it."""
    if name in repository.lacks:
        return False
    try:
        with repository.explained(name):
            start, size = _range(repository, name, 0, AT_FIRST)
            length = 8 + int.from_bytes(start[:8], "little")
            if AT_FIRST < length <= min(size, MOST):
                start += _range(repository, name, AT_FIRST, length)[0]
    except Absent:
        return False
    with open(into / name, "wb") as file:
        file.write(start)
        os.truncate(file.fileno(), size)
    return True


def _range(repository: Repository, name: str, first: int, end: int) -> tuple[bytes, int]:
    """(the bytes from `first` to before `end`, or to where the file ends; its size)"""
    import huggingface_hub as hub

    headers = hub.utils.build_hf_headers(token=repository.token)
    headers |= {"Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
    with hub.get_session().stream("GET", repository.url(name), headers=headers, follow_redirects=True) as response:
        if response.status_code == 416:  # an empty file has no such range
            return b"", 0
        if response.is_error:
            response.read()  # what it says is in the error
        hub.utils.hf_raise_for_status(response)
        whole = response.status_code != 206  # a server that does not know ranges
        found = _read(response, end if whole else end - first)
        size = response.headers.get("Content-Length") if whole else response.headers["Content-Range"].rpartition("/")[2]
    if size is None or not size.isdigit():
        raise SourceNotFound(
            f"{hub.constants.ENDPOINT} does not say how large {name} of {repository.name} is. Check HF_ENDPOINT, or the"
            " proxy in between."
        )
    return found[first:end] if whole else found, int(size)


def _read(response: Any, most: int) -> bytes:
    """What comes, and not more than that: the rest is never asked of the network."""
    found = bytearray()
    for piece in response.iter_bytes():
        found += piece
        if len(found) >= most:
            break
    return bytes(found[:most])
