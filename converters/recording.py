"""What the reference computed, as a value and as one safetensors file: a machine without torch verifies against it."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eqx_transformers import tensor_file
from eqx_transformers._files import writing

from . import noise, reference_names, taps
from .errors import ConversionError, MalformedCheckpoint, SourceNotFound
from .noise import Exact

FORMAT, VERSION = "eqx_transformers.recording", 1
# Facts of training: two models that differ in them alone compute the same.
OF_TRAINING = ("init", "init_std")
AGAIN = "Record it again with the reference: verify(…, record=…)."
# The JSON of a record: its fields and their types.
FIELDS: dict[str, tuple[type, ...]] = {
    "family": (str,),
    "model": (str,),
    "architecture": (str,),
    "facts": (dict,),
    "versions": (dict,),
    "tensors": (dict,),
    "noise": (dict, type(None)),
    "arrays": (dict,),
}


@dataclass(frozen=True)
class Tensor:
    """What a record keeps of a tensor: enough to know whether another is the same bit for bit."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, x: np.ndarray) -> "Tensor":
        if np.isnan(x).any():  # every NaN is one: libraries keep other bits of it when they cast
            x = np.where(np.isnan(x), np.array(np.nan, x.dtype), x)
        return cls(str(x.dtype), x.shape, digest(x))


@dataclass(frozen=True)
class Gradients:
    """By the reference's names, of the output's sum weighted with `cotangent` (a line of numbers a row)."""

    cotangent: np.ndarray
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class Recording:
    """What the reference computed of one model.

    - `family`, `model`, `architecture`: the family, our class and the reference's; `facts` of the config that decide
      the function; `versions` of the libraries that computed it
    - `tensors`: every tensor by the reference's name
    - `inputs`, and `layers`: by our paths what each part gave in float32, the model's output at ""
    - `gradients`: None where they were not asked for; `noise`: None where the model is not in half precision
    """

    family: str
    model: str
    architecture: str
    facts: dict[str, Any]
    versions: dict[str, str]
    tensors: dict[str, Tensor]
    inputs: dict[str, np.ndarray]
    layers: dict[str, np.ndarray]
    gradients: Gradients | None = None
    noise: Exact | None = None


def digest(x: np.ndarray) -> str:
    """The SHA-256 of an array's dtype, shape and bytes."""
    found = hashlib.sha256(f"{x.dtype}{list(x.shape)}".encode())
    found.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def facts(config: Any) -> dict[str, Any]:
    """The facts of a config that decide what a model computes, as JSON has them."""
    stated = dataclasses.asdict(config).items()
    return json.loads(json.dumps({k: x for k, x in stated if "dropout" not in k and k not in OF_TRAINING}))


def tensors(model: Any) -> dict[str, Tensor]:
    """Every tensor of our model by the reference's name."""
    specs, get = reference_names.tensors(model)
    return {name: Tensor.of(get(name).astype(compared(spec.dtype))) for name, spec in specs.items()}


def compared(dtype: Any) -> np.dtype:
    """The dtype in which a tensor is compared: its own half precision, else float32, which is the reference's."""
    return np.dtype(dtype) if str(dtype) in noise.HALF else np.dtype(np.float32)


# ---- is it a record of this model


def expect_of(record: Recording, model: Any, gradients: bool, path: Any) -> None:
    """Raises a `ConversionError` where a record is not of such a model, or lacks what was asked for."""
    ours = {"family": model.config.family, "model": type(model).__name__}
    for name, mine in ours.items():
        if getattr(record, name) != mine:
            raise ConversionError(f"{path} is the record of another {name}, {getattr(record, name)}: this is {mine}.")
    stated = facts(model.config)
    if wrong := [k for k in {**stated, **record.facts} if stated.get(k, ...) != record.facts.get(k, ...)]:
        said = lambda facts, k: repr(facts[k]) if k in facts else "not stated"
        first = "; ".join(f"{k} is {said(record.facts, k)} there and {said(stated, k)} here" for k in wrong[:4])
        raise ConversionError(f"{path} is the record of a model with another config: {first}.")
    _expect_dtypes(record, model, path)
    if record.layers.keys() != {*taps.probes(model), ""}:
        raise ConversionError(f"{path} was recorded at other places of the model than are compared now. {AGAIN}")
    if gradients and record.gradients is None:
        raise ConversionError(
            f"{path} holds no gradients. Compare without gradients, or record it again with them:"
            " verify(…, gradients=True, record=…)."
        )


def _expect_dtypes(record: Recording, model: Any, path: Any) -> None:
    specs, _ = reference_names.tensors(model)
    theirs = sorted({x.dtype for x in record.tensors.values()})
    ours = sorted({str(compared(spec.dtype)) for spec in specs.values()})
    if ours != theirs:
        raise ConversionError(
            f"{path} was recorded of a model in {', '.join(theirs)}, but this one is in {', '.join(ours)}. Load it in"
            " the dtype of the record (dtype=…, --dtype …), or record it again in this one."
        )
    if (record.noise is None) != (noise.dtype_of(model) is None):
        raise MalformedCheckpoint(f"{path} does not hold what a record of a model in {', '.join(ours)} does. {AGAIN}")


# ---- out


def expect_writable(path: str | os.PathLike[str]) -> None:
    """Raises where `write` could not, or would replace something else than a record: before the work, not after it."""
    path = Path(path).absolute()
    if not path.parent.is_dir():
        raise SourceNotFound(
            f"{path.parent} is not a directory, so {path.name} cannot be written there. Make it first."
        )
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory; a record is one file. Name a file in it.")
    if path.exists():
        try:
            _said(path)
        except ConversionError as error:
            raise FileExistsError(f"{path} exists and is no record, so it stays. Choose another name.") from error


def write(path: str | os.PathLike[str], record: Recording) -> None:
    """Writes a record, which is then whole or as it was before."""
    path, arrays = Path(path).absolute(), _arrays(record)
    said = {
        **{name: getattr(record, name) for name in ("family", "model", "architecture", "facts", "versions")},
        "tensors": {name: [x.dtype, list(x.shape), x.sha256] for name, x in record.tensors.items()},
        "noise": record.noise and {name: getattr(record.noise, name) for name in ("dtype", "path", "reference")},
        "arrays": {name: digest(x) for name, x in arrays.items()},
    }
    text = json.dumps(said)
    metadata = {"format": FORMAT, "version": str(VERSION), "record": text, "sha256": _sha256(text)}
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    with writing(path) as fresh:
        tensor_file.write(fresh, specs, lambda name: arrays[name], metadata)


def _arrays(record: Recording) -> dict[str, np.ndarray]:
    """Every array by its name in the file."""
    arrays = {f"inputs/{name}": x for name, x in record.inputs.items()}
    arrays |= {f"layers/{name}": x for name, x in record.layers.items()}
    if record.gradients is not None:
        arrays["cotangent"] = record.gradients.cotangent
        arrays |= {f"gradients/{name}": x for name, x in record.gradients.values.items()}
    if record.noise is not None:
        arrays |= {f"noise/inputs/{name}": x for name, x in record.noise.inputs.items()}
        arrays["noise/outputs"] = record.noise.outputs
    return arrays


# ---- in


def read(path: str | os.PathLike[str]) -> Recording:
    """The record in a file. Raises `SourceNotFound`, or `MalformedCheckpoint` for what is no whole record."""
    path = Path(path)
    if not path.is_file():
        what = "is a directory; a record is one file" if path.is_dir() else "is not there"
        raise SourceNotFound(f"{path} {what}: verify(…, record=…) writes one where torch is.")
    said = _said(path)
    arrays = _read_arrays(path, said["arrays"])
    under = lambda start: {k.removeprefix(start): x for k, x in arrays.items() if k.startswith(start)}
    try:
        known = {name: Tensor(dtype, tuple(shape), sha) for name, (dtype, shape, sha) in said["tensors"].items()}
        exact = said["noise"] and Exact(**said["noise"], inputs=under("noise/inputs/"), outputs=arrays["noise/outputs"])
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedCheckpoint(f"{path} is not a whole record ({error}). {AGAIN}") from error
    inputs, cotangent = under("inputs/"), arrays.get("cotangent")
    _expect_inputs(path, inputs)
    return Recording(
        **{name: said[name] for name in ("family", "model", "architecture", "facts", "versions")},
        tensors=known,
        inputs=inputs,
        layers=under("layers/"),
        gradients=None if cotangent is None else Gradients(cotangent, under("gradients/")),
        noise=exact,
    )


def _said(path: Path) -> dict[str, Any]:
    """The JSON in a record's header."""
    try:
        _, metadata = tensor_file.read_header(path)
    except tensor_file.DamagedFile as error:
        raise MalformedCheckpoint(str(error)) from error
    except OSError as error:
        raise MalformedCheckpoint(f"{path} cannot be read: {error.strerror or error}.") from error
    if metadata.get("format") != FORMAT:
        raise MalformedCheckpoint(f"{path} holds tensors, but it is no record of a reference. {AGAIN}")
    if metadata.get("version") != str(VERSION):
        raise ConversionError(
            f"{path} is a record of version {metadata.get('version')}; this library reads {VERSION}. {AGAIN}"
        )
    if metadata.get("sha256") != _sha256(metadata.get("record", "")):
        raise MalformedCheckpoint(f"{path}: the record's description was changed after it was written. {AGAIN}")
    try:
        said = json.loads(metadata.get("record", ""))
    except (ValueError, RecursionError) as error:
        raise MalformedCheckpoint(f"{path}: the record's description is not JSON ({error}). {AGAIN}") from error
    wrong = [k for k, kinds in FIELDS.items() if not isinstance(said, dict) or not isinstance(said.get(k, ...), kinds)]
    if wrong:
        raise MalformedCheckpoint(f"{path}: the record's description does not say {', '.join(wrong)}. {AGAIN}")
    return said


def _read_arrays(path: Path, listed: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every array, if they are those that were written: an edited number would pass for a wrong conversion."""
    specs, _ = tensor_file.read_header(path)
    if specs.keys() != listed.keys():
        names = ", ".join(sorted(specs.keys() ^ listed.keys())[:4])
        raise MalformedCheckpoint(f"{path}: the record's arrays are not those that it lists ({names}). {AGAIN}")
    arrays = {}
    with open(path, "rb", buffering=0) as file:
        for name, spec in specs.items():
            if spec.numpy_dtype is not None:
                arrays[name] = tensor_file.read_tensor(file, spec)
            if name not in arrays or digest(arrays[name]) != listed[name]:
                raise MalformedCheckpoint(f"{path}: {name} was changed after it was recorded. {AGAIN}")
    return arrays


def _expect_inputs(path: Path, inputs: dict[str, np.ndarray]) -> None:
    whole = {"ids", "attention_mask"} <= inputs.keys() and len({x.shape for x in inputs.values()}) == 1
    if not whole or not all(np.issubdtype(x.dtype, np.integer) for x in inputs.values()):
        raise MalformedCheckpoint(f"{path} does not hold the inputs of a model: ids and a mask. {AGAIN}")
