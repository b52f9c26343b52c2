"""The proof of a conversion: the reference library and ours on the same inputs, layer by layer."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformers import serialisation, unstack
from eqx_transformers.skeletons import stacked_paths, stacks

from . import convert, noise, peft, recording, reference_names, taps, torch_reference
from .checkpoint import open_directory
from .errors import ConversionError
from .families import FAMILIES
from .noise import Noise
from .origin import Origin
from .recording import Gradients, Recording

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Layer:
    """One comparison: our module's path, the reference's name for it, and the largest difference between their outputs,
    relative to the reference's largest absolute value (at least 1)."""

    path: str
    reference: str
    error: float


@dataclass(frozen=True)
class Verification:
    """`layers` in order of execution, the model's output last; `weights` are the reference's names of tensors that are
    not bit for bit ours, with our paths; `gradients`, if asked for, each tensor's relative error; `noise`, of a model
    in half precision, in units of the reference's own."""

    tolerance: float
    layers: tuple[Layer, ...]
    weights: dict[str, str]
    gradients: dict[str, float]
    noise: Noise | None = None

    @property
    def max_error(self) -> float:
        return max((layer.error for layer in self.layers), default=0.0)

    @property
    def passed(self) -> bool:
        return self.first_divergence is None

    @property
    def first_divergence(self) -> str | None:
        """The path of the first layer that is not the reference's; of a tensor, where outputs do not show it; then the
        name of a gradient; then "noise in DTYPE"."""
        wrong = [layer.path for layer in self.layers if not layer.error <= self.tolerance]
        wrong += list(self.weights.values())
        wrong += [name for name, error in self.gradients.items() if not error <= self.tolerance]
        wrong += [f"noise in {x.dtype}" for x in (self.noise,) if x is not None and not x.passed]
        return wrong[0] if wrong else None

    def as_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "max_error": self.max_error,
            "tolerance": self.tolerance,
            "first_divergence": self.first_divergence,
            "layers": [vars(layer) for layer in self.layers],
            "weights": self.weights,
            "gradients": self.gradients,
            "noise": None if self.noise is None else self.noise.as_json(),
        }

    def __str__(self) -> str:
        if self.passed:
            where = max(self.layers, key=lambda layer: layer.error).path or "the output"
            worst = f", gradients {max(self.gradients.values()):.1e}" if self.gradients else ""
            half = "" if self.noise is None else f"; {self.noise}"
            return f"verified: max error {self.max_error:.1e} (at {where}; tolerance {self.tolerance:.0e}){worst}{half}"
        lines = [f"NOT verified: {self.first_divergence} is the first that differs from the reference"]
        wrong = [layer for layer in self.layers if not layer.error <= self.tolerance]
        lines += [f"  {layer.error:9.1e}  {layer.path}" for layer in wrong[:8]]
        lines += [f"  {name} (our {path}) holds other numbers" for name, path in list(self.weights.items())[:8]]
        worse = {name: error for name, error in self.gradients.items() if not error <= self.tolerance}
        lines += [f"  {error:9.1e}  gradient of {name}" for name, error in list(worse.items())[:8]]
        if self.noise is not None and not self.noise.passed:
            lines += [f"  {self.noise}, at most {noise.LIMIT} is allowed"]
        return "\n".join(lines)


def verify(
    source: convert.Source,
    *,
    gradients: bool = False,
    record: str | os.PathLike[str] | None = None,
    against: str | os.PathLike[str] | None = None,
    model: Any = None,
    origin: Origin | None = None,
    adapter: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Verification:
    """Compares ours with the torch reference on the same random rows (padded ones among them), in float32.

    `model` and `origin` are the result of a `load` that is to be verified; without them, `source` is loaded here with
    `options`. A directory in the native format is compared with the checkpoint that its origin names.
    Every tensor is compared bit for bit too, so that a difference shows which these inputs do not reach. Where the
    model was loaded in another dtype than the file's, the reference's numbers are rounded to that dtype first. A model
    all in bfloat16 or float16 is also run as it is: it may be no more than 1.1 times as far from the reference in
    float32 as the reference in that dtype is, over 20 seeds.

    `record` names a file to which all that the reference computed is written, whatever the comparison finds.
    `against` names such a file in the place of the reference: neither torch, transformers nor the checkpoint that a
    native directory came from is needed then.

    `adapter` names a directory of the PEFT library: the layers of `model`, the plain base, are compared with it on
    both sides, and the tensors without.

    Raises an `ImportError` with the pip line when torch or transformers is missing; a `FileExistsError` where `record`
    is something else than a record; a `SourceNotFound` where `against`, or the directory for `record`, is not there; a
    `MalformedCheckpoint` where `against` is no whole record, and a `ConversionError` where it is another model's.
    """
    if adapter is not None and (gradients or record is not None or against is not None):
        raise ConversionError("adapter= compares outputs with the reference run here: no gradients, record or against.")
    known = prepared(record, against, adapter=adapter is not None)
    if model is None:
        model, origin = convert.load(source, **options)
    elif origin is not None and known is None:
        _expect_same(source, origin)
    model = _plain(model)
    if known is None:
        path = None if adapter is None else Path(adapter)
        checked = _with_checkpoint(source, origin)
        known = torch_reference.recorded(model, checked, with_gradients=gradients, adapter=path)
    else:
        recording.expect_of(known, model, gradients, against)
    if record is not None:
        recording.write(record, known)
    adapted = model if adapter is None else peft.load(model, adapter, origin)
    return compared(model, known, gradients=gradients, adapted=adapted)


def _expect_same(source: convert.Source, origin: Origin) -> None:
    """`source` is where the model came from: the proof is of that directory, not of another that was named."""
    path = Path(source)
    if not path.is_dir() or serialisation.is_native(path):
        return
    if origin.directory is None or not path.samefile(origin.directory):
        raise ConversionError(
            f"{source} was named, but the origin of the model says that it came from {origin.directory}. Load it from"
            " the one that is to be verified."
        )


def prepared(record: Any, against: Any, *, adapter: bool = False) -> Recording | None:
    """The record to compare with; None for the reference itself, which can be run then. All before the work."""
    if record is not None and against is not None:
        raise ConversionError(
            "record= writes what the reference computes, against= compares without running it: choose one."
        )
    if record is not None:
        recording.expect_writable(record)
    if against is not None:
        return recording.read(against)
    torch_reference.expect(adapter)
    return None


def _with_checkpoint(source: convert.Source, origin: Origin | None) -> Origin:
    """The origin, if the reference has such a model and the checkpoint that it came from is still where it was."""
    if origin is not None and origin.family not in FAMILIES:
        raise ConversionError(
            f"{source}: {origin.family} is no format of the reference library, nothing to compare with."
        )
    if origin is None or origin.directory is None:
        raise ConversionError(
            f"{source}: no checkpoint is known that it came from (it was made from arrays, or model= was given without"
            f" its origin), so there is nothing to compare with. {ELSEWHERE}"
        )
    directory = Path(origin.directory)
    if not directory.is_dir():
        raise ConversionError(
            f"{source}: the checkpoint that it came from, {directory}, is not here any more, nothing to compare with."
            f" Put it back, or convert {origin.source} again. {ELSEWHERE}"
        )
    layout = open_directory(directory).layout if origin.layout else {}
    if {name: sorted(keys) for name, keys in layout.items()} != {k: sorted(v) for k, v in origin.layout.items()}:
        raise ConversionError(
            f"{source}: {directory} does not hold the checkpoint any more that it came from: the tensors have other"
            " names, or are in other files. Convert it again from what is there now, and verify that."
        )
    return origin


ELSEWHERE = "A record of the reference, made elsewhere with verify(…, record=FILE), will do: verify(…, against=FILE)."


def compared(model: Any, known: Recording, *, gradients: bool, adapted: Any = None) -> Verification:
    """Our model (in its own dtype, its blocks a tuple) against what the reference computed; with adapters, if any."""
    adapted = model if adapted is None else adapted
    weights = _different_weights(model, known)
    names = taps.probes(model) | {"": "output"}
    wide = _float32(adapted)
    with jax.default_matmul_precision("highest"):
        ours, theirs = taps.outputs(wide, [path for path in names if path])(known.inputs), known.layers
        grads = _gradients(wide, known.inputs, known.gradients) if gradients and known.gradients else {}
    if model.config.causal:
        ours, theirs = (_seen(model, layers, known.inputs["attention_mask"]) for layers in (ours, theirs))
    layers = tuple(Layer(path, names[path], _error(ours[path], theirs[path])) for path in names)
    del wide, ours
    half = None if known.noise is None else noise.measure(adapted, known.noise)
    return Verification(TOLERANCE, layers, weights, grads, half)


def _plain(model: Any) -> Any:
    """A tuple of blocks, nothing recomputed: every module call can then be seen."""
    model = unstack(model) if stacked_paths(model) else model
    return eqx.tree_at(lambda m: [s.remat for s in stacks(m).values()], model, [False] * len(stacks(model)))


def _float32(model: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, model)


def _different_weights(model: Any, known: Recording) -> dict[str, str]:
    paths = reference_names.paths(model)
    ours = recording.tensors(model)
    different = {name: paths[name] for name, x in ours.items() if known.tensors.get(name) != x}
    return different | dict.fromkeys(known.tensors.keys() - ours.keys(), "nothing")


def _seen(model: Any, layers: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    """Without the padding: before the first token, a causal query sees nothing, and each library fills in its own."""
    return {path: x[taps.seen(model, x, mask) == 1] for path, x in layers.items()}


def _gradients(model: Any, inputs: taps.Inputs, known: Gradients) -> dict[str, float]:
    """Each tensor's gradient of the output's sum with random weights, against the reference's."""
    theirs = known.values
    specs, get = reference_names.tensors(eqx.combine(taps.gradient(model, inputs, known.cotangent), model))
    # A key's bias has no gradient in exact arithmetic, only noise of the size of the others' last digits: an error is
    # relative to the tensor's own largest gradient, but to no less than a hundredth of the largest of all.
    floor = 1e-2 * max(float(np.abs(g).max()) for g in theirs.values())
    zero = lambda name: np.zeros(specs[name].shape, np.float32)
    error = lambda a, b: float(np.abs(a - b).max() / max(float(np.abs(b).max()), floor))
    return {name: error(get(name), theirs.get(name, zero(name))) for name in specs}


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(theirs).max())))
