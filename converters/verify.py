"""The proof of a conversion: the reference library and ours on the same inputs, layer by layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformers import MultipleChoice, unstack
from eqx_transformers.skeletons import stacked_paths, stacks

from . import convert, reference_names, torch_reference
from .errors import ConversionError
from .families import FAMILIES
from .origin import Origin
from .taps import at, outputs

TOLERANCE = 1e-4
SEED, ROWS, LENGTH = 0, 4, 24


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
    not bit for bit ours, with our paths; `gradients`, if asked for, each tensor's relative error."""

    tolerance: float
    layers: tuple[Layer, ...]
    weights: dict[str, str]
    gradients: dict[str, float]

    @property
    def max_error(self) -> float:
        return max((layer.error for layer in self.layers), default=0.0)

    @property
    def passed(self) -> bool:
        return self.first_divergence is None

    @property
    def first_divergence(self) -> str | None:
        """The path of the first layer that is not the reference's; of a tensor, where outputs do not show it."""
        wrong = [layer.path for layer in self.layers if not layer.error <= self.tolerance]
        wrong += list(self.weights.values())
        return (wrong + [name for name, error in self.gradients.items() if not error <= self.tolerance] + [None])[0]

    def as_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "max_error": self.max_error,
            "tolerance": self.tolerance,
            "first_divergence": self.first_divergence,
            "layers": [vars(layer) for layer in self.layers],
            "weights": self.weights,
            "gradients": self.gradients,
        }

    def __str__(self) -> str:
        if self.passed:
            where = max(self.layers, key=lambda layer: layer.error).path or "the output"
            worst = f", gradients {max(self.gradients.values()):.1e}" if self.gradients else ""
            return f"verified: max error {self.max_error:.1e} (at {where}; tolerance {self.tolerance:.0e}){worst}"
        lines = [f"NOT verified: {self.first_divergence} is the first that differs from the reference"]
        lines += [f"  {layer.error:9.1e}  {layer.path}" for layer in self.layers if not layer.error <= self.tolerance][
            :8
        ]
        lines += [f"  {name} (our {path}) holds other numbers" for name, path in list(self.weights.items())[:8]]
        wrong = {name: error for name, error in self.gradients.items() if not error <= self.tolerance}
        lines += [f"  {error:9.1e}  gradient of {name}" for name, error in list(wrong.items())[:8]]
        return "\n".join(lines)


def verify(
    source: convert.Source,
    *,
    gradients: bool = False,
    model: Any = None,
    origin: Origin | None = None,
    **options: Any,
) -> Verification:
    """Runs the torch reference and ours on the same random rows (padded ones among them), in float32.

    `model` and `origin` are the result of a `load` that is to be verified; without them, `source` is loaded here with
    `options`. A directory in the native format is compared with the checkpoint that its origin names.
    Every tensor is compared bit for bit too, so that a difference shows which these inputs do not reach. Where the
    model was loaded in another dtype than the file's, the reference's numbers are rounded to that dtype first.
    Raises an `ImportError` with the pip line when torch or transformers is missing.
    """
    torch_reference.expect()
    if model is None:
        model, origin = convert.load(source, **options)
    if origin is not None and origin.family not in FAMILIES:
        raise ConversionError(
            f"{source}: {origin.family} is no format of the reference library, nothing to compare with."
        )
    if origin is None or origin.directory is None or not Path(origin.directory).is_dir():
        raise ConversionError(
            f"{source}: the checkpoint that it came from is not here any more, nothing to compare with."
        )
    model = _plain(model)
    reference = torch_reference.load(model, origin)
    model = _float32(model)
    weights = _different_weights(model, reference)
    inputs, probes = _inputs(model), _probes(model)
    with jax.default_matmul_precision("highest"):
        ours = outputs(model, list(probes), inputs)
        theirs = torch_reference.outputs(reference, model, probes, inputs)
        grads = _gradients(model, reference, inputs) if gradients else {}
    if model.config.causal:
        ours, theirs = (_seen(layers, inputs["attention_mask"]) for layers in (ours, theirs))
    names = probes | {"": "output"}
    layers = tuple(Layer(path, names[path], _error(ours[path], theirs[path])) for path in names)
    return Verification(TOLERANCE, layers, weights, grads)


def _plain(model: Any) -> Any:
    """A tuple of blocks, nothing recomputed: every module call can then be seen."""
    model = unstack(model) if stacked_paths(model) else model
    return eqx.tree_at(lambda m: [s.remat for s in stacks(m).values()], model, [False] * len(stacks(model)))


def _float32(model: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, model)


def _different_weights(model: Any, reference: Any) -> dict[str, str]:
    specs, get = reference_names.tensors(model)
    state = {name: x.detach().numpy() for name, x in reference.state_dict().items()}
    different = [
        name for name in specs if name not in state or not np.array_equal(get(name), state[name], equal_nan=True)
    ]
    paths = reference_names.paths(model)
    return {name: paths[name] for name in different}


def _inputs(model: Any) -> dict[str, np.ndarray]:
    """Random rows: a whole one, one padded right, one padded left, a short one; random token types.

    For multiple choice, the same rows are the choices of two examples.
    """
    config, rng = model.config, np.random.default_rng(SEED)
    first = config.position_offset if config.positions == "index" else config.padding_id + 1
    length = min(LENGTH, config.max_positions - first)
    ids = rng.integers(0, config.vocab_size, (ROWS, length))
    mask = np.ones((ROWS, length), np.int64)
    mask[1, (2 * length + 2) // 3 :] = 0
    mask[2, : length // 3] = 0
    mask[3, max(1, length // 6) :] = 0
    if config.padding_id is not None:
        ids[ids == config.padding_id] = (config.padding_id + 1) % config.vocab_size
        ids[mask == 0] = config.padding_id
    given = {"ids": ids, "attention_mask": mask}
    if config.token_types:
        given["token_type_ids"] = rng.integers(0, config.token_types, ids.shape)
    return {name: x.reshape(2, -1, length) if type(model) is MultipleChoice else x for name, x in given.items()}


def _probes(model: Any) -> dict[str, str]:
    """Our path -> the reference's module name, for every probe that the model has, in order of execution."""
    listed = FAMILIES[model.config.family].probes(type(model))
    depth = next(iter(stacks(model).values())).num_layers
    repeated = [p for p in listed if "{i}" in p[0]]
    before, after = listed[: listed.index(repeated[0])], listed[listed.index(repeated[-1]) + 1 :]
    layers = [(ours.format(i=i), theirs.format(i=i)) for i in range(depth) for ours, theirs in repeated]
    return {ours: theirs for ours, theirs in [*before, *layers, *after] if at(model, ours) is not None}


def _seen(layers: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    """Without the padding: before the first token, a causal query sees nothing, and each library fills in its own."""
    of_tokens = lambda x: x.shape[:2] == mask.shape
    return {path: x[mask == 1] if of_tokens(x) else x[mask[:, 0] == 1] for path, x in layers.items()}


def _gradients(model: Any, reference: Any, inputs: dict[str, np.ndarray]) -> dict[str, float]:
    """Each tensor's gradient of the output's sum with random weights, against the reference's."""
    weights = _weights(model, inputs)
    theirs = torch_reference.gradients(reference, model, inputs, weights)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model: Any) -> Any:
        return (_called(model, inputs) * weights).sum()

    specs, get = reference_names.tensors(eqx.combine(gradient(model), model))
    # A key's bias has no gradient in exact arithmetic, only noise of the size of the others' last digits: an error is
    # relative to the tensor's own largest gradient, but to no less than a hundredth of the largest of all.
    floor = 1e-2 * max(float(np.abs(g).max()) for g in theirs.values())
    zero = lambda name: np.zeros(specs[name].shape, np.float32)
    error = lambda a, b: float(np.abs(a - b).max() / max(float(np.abs(b).max()), floor))
    return {name: error(get(name), theirs.get(name, zero(name))) for name in specs}


def _weights(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Random numbers for all of a row's outputs; none for what a causal model gives where it sees nothing."""
    shapes = [x.shape for x in jax.eval_shape(lambda: _outputs(model, inputs))]
    rng, mask = np.random.default_rng(SEED), inputs["attention_mask"]
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    if model.config.causal:
        seen = lambda x: mask if x.shape[:2] == mask.shape else mask[:, 0]
        weights = [x * seen(x).reshape(*seen(x).shape, *[1] * (x.ndim - seen(x).ndim)) for x in weights]
    return np.concatenate([x.reshape(len(x), -1) for x in weights], axis=1)


def _called(model: Any, inputs: dict[str, np.ndarray]) -> Any:
    """The model on every row, as one line of numbers a row."""
    return jnp.concatenate([x.reshape(len(x), -1) for x in _outputs(model, inputs)], axis=1)


def _outputs(model: Any, inputs: dict[str, np.ndarray]) -> list[Any]:
    given = {name: jnp.asarray(x) for name, x in inputs.items()}
    return jax.tree.leaves(jax.vmap(lambda ids, kwargs: model(ids, **kwargs))(given.pop("ids"), given))


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(theirs).max())))
