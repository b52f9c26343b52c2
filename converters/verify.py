"""The proof of a conversion: the reference library and ours on the same inputs, layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformers import unstack
from eqx_transformers.skeletons import stacked_paths, stacks

from . import convert, reference_names
from .errors import ConversionError
from .families import FAMILIES
from .origin import Origin

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
    import_reference()
    if model is None:
        model, origin = convert.load(source, **options)
    if origin is None or origin.directory is None or not Path(origin.directory).is_dir():
        raise ConversionError(
            f"{source}: the checkpoint that it came from is not here any more, nothing to compare with."
        )
    model = _plain(model)
    reference = _reference(model, origin)
    model = _float32(model)
    weights = _different_weights(model, reference)
    inputs = _inputs(model)
    with jax.default_matmul_precision("highest"):
        ours = _our_layers(model, inputs)
        theirs = _their_layers(model, reference, inputs)
        grads = _gradients(model, reference, inputs) if gradients else {}
    names = _probes(model) | {"": "output"}
    layers = tuple(Layer(path, names[path], _error(ours[path], theirs[path])) for path in names)
    return Verification(TOLERANCE, layers, weights, grads)


def import_reference() -> None:
    """Raises an ImportError with the pip line when the reference cannot be imported."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("Verification needs the reference: pip install 'eqx_transformers[verify]'") from error


def _plain(model: Any) -> Any:
    """A tuple of blocks, nothing recomputed: every module call can then be seen."""
    model = unstack(model) if stacked_paths(model) else model
    return eqx.tree_at(lambda m: [s.remat for s in stacks(m).values()], model, [False] * len(stacks(model)))


def _float32(model: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, model)


def _reference(model: Any, origin: Origin) -> Any:
    """The reference's model from the checkpoint itself; arrays that were drawn, not read, are copied from ours."""
    import torch
    import transformers

    family = FAMILIES[model.config.family]
    reference_class = getattr(transformers, family.architecture(type(model)))
    bare = family.is_bare(type(model))
    options = {"add_pooling_layer": model.pooler is not None} if hasattr(model, "pooler") and bare else {}
    if bare and hasattr(model, "backbone"):
        options = {"add_pooling_layer": model.backbone.pooler is not None}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        reference, info = reference_class.from_pretrained(
            origin.directory,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({} if bare else {"num_labels": model.config.labels}),
            **options,
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    specs, get = reference_names.tensors(model)
    state = reference.state_dict()
    drawn = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    with torch.no_grad():
        for name in drawn:
            state[name].copy_(torch.from_numpy(np.array(get(name), np.float32)))
        for name, spec in specs.items():
            if name in state:
                state[name].copy_(state[name].to(getattr(torch, str(spec.dtype))))
    return reference.eval()


def _different_weights(model: Any, reference: Any) -> dict[str, str]:
    specs, get = reference_names.tensors(model)
    state = {name: x.detach().numpy() for name, x in reference.state_dict().items()}
    different = [
        name for name in specs if name not in state or not np.array_equal(get(name), state[name], equal_nan=True)
    ]
    paths = reference_names.paths(model)
    return {name: paths[name] for name in different}


def _inputs(model: Any) -> dict[str, np.ndarray]:
    """Random rows: a whole one, one padded right, one padded left, a short one; random token types."""
    config, rng = model.config, np.random.default_rng(SEED)
    first = 0 if config.positions == "index" else config.padding_id + 1
    length = min(LENGTH, config.max_positions - first)
    ids = rng.integers(0, config.vocab_size, (ROWS, length))
    mask = np.ones((ROWS, length), np.int64)
    mask[1, (2 * length + 2) // 3 :] = 0
    mask[2, : length // 3] = 0
    mask[3, max(1, length // 6) :] = 0
    if config.padding_id is not None:
        ids[ids == config.padding_id] = (config.padding_id + 1) % config.vocab_size
        ids[mask == 0] = config.padding_id
    return {"ids": ids, "attention_mask": mask, "token_type_ids": rng.integers(0, config.token_types, ids.shape)}


def _probes(model: Any) -> dict[str, str]:
    """Our path -> the reference's module name, for every probe that the model has, in order of execution."""
    listed = FAMILIES[model.config.family].probes(type(model))
    depth = next(iter(stacks(model).values())).num_layers
    repeated = [p for p in listed if "{i}" in p[0]]
    before, after = listed[: listed.index(repeated[0])], listed[listed.index(repeated[-1]) + 1 :]
    layers = [(ours.format(i=i), theirs.format(i=i)) for i in range(depth) for ours, theirs in repeated]
    return {ours: theirs for ours, theirs in [*before, *layers, *after] if _at(model, ours) is not None}


def _at(tree: Any, path: str) -> Any:
    for step in path.split("."):
        tree = tree[int(step)] if step.isdigit() else getattr(tree, step)
    return tree


class _Tap(eqx.Module):
    """Calls the module in its place and leaves the result in `sink`, which lives for one trace."""

    module: eqx.Module
    leave: Callable[[Any], None] = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.module(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        self.leave(result)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "module"), name)


def _our_layers(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    paths = sorted(_probes(model), key=lambda path: -path.count("."))  # inner ones first: a tap hides what it holds

    @eqx.filter_jit
    def run(model: Any, inputs: Any) -> dict[str, Any]:
        def one(ids: Any, kwargs: Any) -> dict[str, Any]:
            sink: dict[str, Any] = {}
            tapped = model
            for path in paths:
                tap = _Tap(_at(tapped, path), lambda y, path=path: sink.__setitem__(path, y))
                tapped = eqx.tree_at(lambda m, path=path: _at(m, path), tapped, tap)
            output = tapped(ids, **kwargs)
            if "pooler" in paths:  # a bare encoder holds its pooler for others, and does not call it
                tapped.pooler(output)
            return {**sink, "": output}

        kwargs = {name: x for name, x in inputs.items() if name != "ids"}
        return jax.vmap(one)(inputs["ids"], kwargs)

    return {path: np.asarray(x) for path, x in run(model, inputs).items()}


def _their_layers(model: Any, reference: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    seen: dict[str, np.ndarray] = {}

    def keep(path: str) -> Callable[..., None]:
        first = lambda out: out[0] if isinstance(out, tuple) else out
        return lambda module, args, out: seen.__setitem__(path, first(out).detach().numpy())

    hooks = [reference.get_submodule(name).register_forward_hook(keep(path)) for path, name in _probes(model).items()]
    try:
        with torch.no_grad():
            seen[""] = _reference_output(model, reference, inputs).numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _reference_output(model: Any, reference: Any, inputs: dict[str, np.ndarray]) -> Any:
    import torch

    given = {name: torch.from_numpy(x) for name, x in inputs.items()}
    result = reference(given.pop("ids"), **given)
    if not hasattr(model, "pooling"):
        return result.logits if "logits" in result else result.last_hidden_state
    hidden, mask = result.last_hidden_state, given["attention_mask"][..., None].float()
    first = mask.argmax(1, keepdim=True).expand(-1, 1, hidden.shape[-1])
    x = (hidden * mask).sum(1) / mask.sum(1) if model.config.pooling == "mean" else hidden.gather(1, first)[:, 0]
    return torch.nn.functional.normalize(x, dim=-1) if model.config.normalize else x


def _gradients(model: Any, reference: Any, inputs: dict[str, np.ndarray]) -> dict[str, float]:
    """Each tensor's gradient of the output's sum with random weights, against the reference's."""
    import torch

    output = _reference_output(model, reference, inputs)
    weights = np.random.default_rng(SEED).standard_normal(tuple(output.shape)).astype(np.float32)
    reference.zero_grad()
    (output * torch.from_numpy(weights)).sum().backward()

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model: Any) -> Any:
        kwargs = {name: jnp.asarray(x) for name, x in inputs.items() if name != "ids"}
        out = jax.vmap(lambda ids, kwargs: model(ids, **kwargs))(jnp.asarray(inputs["ids"]), kwargs)
        return (out * weights).sum()

    specs, get = reference_names.tensors(eqx.combine(gradient(model), model))
    theirs = {
        name: p.grad.numpy() for name, p in reference.named_parameters(remove_duplicate=False) if p.grad is not None
    }
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
