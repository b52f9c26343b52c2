"""A `pytorch_model.bin`, read without torch and without Python's unpickler: where each tensor lies.

The format, from torch/serialization.py (1.6 and later): a zip archive of one folder (`torch_archive`), whose
`data.pkl` is a pickle of protocol 2 (`torch_tensors`).
"""

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

from eqx_transformers.tensor_file import Spec

from . import files, pickle_reader
from .errors import ConversionError, MalformedCheckpoint
from .torch_archive import AGAIN, SCRIPT, open_archive
from .torch_tensors import STEPS, Tensors, built, said

DIRECTORY = 1 << 16  # bytes at the end of an archive, which name its last members

ADVICE = (
    "Only a dictionary of tensors is read. If you trust the file, save the tensors alone: torch.save(state_dict, path),"
    " where state_dict is what torch.load(path, weights_only=False) gives, or the model's entry in it."
)
MODULE = (
    "It looks like a whole module, from torch.save(model, path). If you trust the file, save its tensors instead:"
    " torch.save(torch.load(path, weights_only=False).state_dict(), path)."
)
# torch.save of old began with a pickle of this number, 0x1950a86a20f9469cfc6c.
MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
OLD = "Save it again with a newer torch: torch.save(torch.load(path, weights_only=True), path)."
OLDEST = "save it again with torch: torch.save(torch.load(path, weights_only=False), path)."
STARTS = (
    (b"\x89HDF", "It is an HDF5 file, of Keras or TensorFlow for one, under this name. Get the weights of torch."),
    (b"\x93NUMPY", "It is an .npy file under this name. Save the tensors with torch, or as safetensors."),
    (b"GGUF", "It is a GGUF file under this name. Get the weights of torch, or safetensors."),
    (b"\x80", f"It is a pickle, but not one of torch: from pickle.dump or joblib.dump? {ADVICE}"),
)


def read_header(path: Path) -> tuple[dict[str, Spec], dict[str, str]]:
    """The tensors of a file that `torch.save(state_dict, path)` wrote, by name, and no metadata.

    Each has its exact range of bytes, and strides where it is not in C order; no tensor is read. Complex ones have the
    dtypes C64 and C128, those of 8 bits safetensors' names.

    Raises `UnsafeCheckpoint` for a pickle that names anything but tensors, `MalformedCheckpoint` for a file that is
    damaged, is not torch's, or holds something else than a dictionary of dense tensors, and `OSError`.
    """
    try:
        with open(path, "rb") as file:
            return _read(file), {}
    except ConversionError as error:
        raise type(error)(f"{path}: {error}") from error


def _read(file: BinaryIO) -> dict[str, Spec]:
    size = os.fstat(file.fileno()).st_size
    if why := _foreign(file.read(512), size):
        raise MalformedCheckpoint(why)
    file.seek(max(0, size - DIRECTORY))
    if b"/constants.pkl" in file.read():  # before the archive is judged: a script's code is compressed in it
        raise MalformedCheckpoint(SCRIPT)
    archive = open_archive(file)
    code = archive.record("data.pkl", pickle_reader.MAX_BYTES)
    if code[:2] != b"\x80\2":
        raise MalformedCheckpoint(
            "Its data.pkl is no pickle of protocol 2, the only one that torch.load(path, weights_only=True) reads. Save"
            " it again without pickle_protocol: torch.save(state_dict, path)."
        )
    tensors, stream = Tensors(archive, os.fstat(file.fileno()).st_size), io.BytesIO(code)
    advice = MODULE if b"_parameters" in code and b"_modules" in code else ADVICE
    value = pickle_reader.read(stream, tensors.build, built, tensors.storage, advice, STEPS)
    if stream.read(1):
        raise MalformedCheckpoint(f"Its data.pkl goes on after the end of the pickle: it is damaged. {AGAIN}")
    return _state_dict(value)


def _foreign(start: bytes, size: int) -> str | None:
    """What the file is, unless it begins like a zip archive."""
    if start.startswith(b"PK\3\4"):
        return None
    if MAGIC in start[:32]:
        return (
            f"It is in the format of torch before 1.6 (_use_new_zipfile_serialization=False), which is not read. {OLD}"
        )
    if start[257:262] == b"ustar":
        return f"It is a tar archive, the first format of torch, which is not read. If you trust the file: {OLDEST}"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size:
        return "It is a safetensors file under this name. Rename it to end in .safetensors."
    known = next((why for prefix, why in STARTS if start.startswith(prefix)), None)
    return known or files.foreign(start, size) or f"It is no file of torch: it begins with {start[:8]!r}. {AGAIN}"


def _state_dict(value: Any) -> dict[str, Spec]:
    if isinstance(value, Spec):
        raise MalformedCheckpoint(f"It holds a lone tensor of size {value.shape}, without a name. {ADVICE}")
    if not isinstance(value, dict):
        raise MalformedCheckpoint(f"It holds {said(value)}, not a dictionary of tensors. {ADVICE}")
    for key, x in value.items():
        if not isinstance(x, Spec):
            raise MalformedCheckpoint(_not_a_tensor(value, key))
    return dict(value)


def _not_a_tensor(value: dict[str, Any], key: str) -> str:
    held = (k for k, x in value.items() if isinstance(x, dict) and any(isinstance(y, Spec) for y in x.values()))
    if inner := next(held, None):
        return (
            f"It is a training checkpoint: its entry {inner[:80]!r} is a dictionary of tensors. Save that alone:"
            f" torch.save(torch.load(path, weights_only=True)[{inner[:80]!r}], path)."
        )
    return f"Its entry {key[:80]!r} is {said(value[key])}, not a tensor. {ADVICE}"
