"""Small files of a checkpoint, read with an explanation of what is wrong with them."""

import json
from pathlib import Path
from typing import Any

from eqx_transformers.tensor_file import named_once

from .errors import MalformedCheckpoint

MOST = 1 << 26  # bytes of one such file; the index of a model of a trillion parameters has some 10 MB


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON value of a file, of this type. Raises a `MalformedCheckpoint` for anything else."""
    try:
        if (size := path.stat().st_size) > MOST:
            raise MalformedCheckpoint(f"{path} has {size / 1e6:.0f} MB: too much for a file of names and settings.")
        text = path.read_bytes()
        value = json.loads(text, object_pairs_hook=named_once)
        json.dumps(value, ensure_ascii=False).encode()  # half of a pair of surrogates can be escaped, but not written
    except RecursionError as error:
        raise MalformedCheckpoint(f"{path} is nested too deeply to be a file of a model.") from error
    except ValueError as error:
        raise MalformedCheckpoint(f"{path} is not JSON: {error}. {_usual_cause(path)}") from error
    except OSError as error:
        raise MalformedCheckpoint(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(value, kind):
        raise MalformedCheckpoint(f"{path} holds {_json_name(value)}; expected {_json_name(kind())}.")
    return value


def is_one_component(name: str) -> bool:
    """Whether a name can only be that of a file in the directory at hand."""
    return Path(name).name == name and name != ".." and not set(name) & set("/\\\0")


def _json_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _usual_cause(path: Path) -> str:
    with open(path, "rb") as file:
        found = foreign(file.read(64), path.stat().st_size)
    return found or "Was it edited by hand, or cut off? Fetch it again."


def foreign(start: bytes, size: int) -> str | None:
    """What a file is whose first bytes are `start`, if it is what often lies in the place of another."""
    start = start.lstrip()
    if not start and size < 64:
        return "It is empty: a download or copy that stopped early? Fetch it again."
    if start.startswith(b"version https://git-lfs"):
        return "It is a Git LFS pointer: run `git lfs pull` where you cloned it."
    if start.startswith(b"<"):
        return "It is a web page, probably an error page of the download. Download it again."
    return None
