"""The reference library's model of a checkpoint, and what it computes."""

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eqx_transformers import MultipleChoice, tensor_file

from . import noise, reference_names, taps
from .checkpoint import Checkpoint, open_directory
from .families import FAMILIES
from .noise import Exact
from .origin import Origin
from .recording import Gradients, Recording, Tensor, compared, facts

FLAX = ".msgpack"


def expect(adapter: bool = False) -> None:
    """Raises an ImportError with the pip line when the reference, or with an `adapter` PEFT, cannot be imported."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Verification needs the reference: pip install 'eqx_transformers[verify]'. Where that cannot be, verify"
            " against a record that was made elsewhere: verify(…, against=FILE)."
        ) from error
    if adapter:
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise ImportError("Verification with an adapter needs PEFT: pip install 'peft>=0.21.2'") from error


def recorded(model: Any, origin: Origin, *, with_gradients: bool, adapter: Path | None = None) -> Recording:
    """All that a verification of `model` compares with, computed here; what it computes, with an adapter of PEFT's."""
    import torch
    import transformers

    reference = load(model, origin)
    plain = tensors(reference, model)
    if adapter is not None:
        _adapt(reference, adapter)
    inputs = taps.random_inputs(model)
    layers = outputs(reference, model, taps.probes(model), inputs)
    found = gradients(reference, model, inputs) if with_gradients else None
    return Recording(
        family=model.config.family,
        model=type(model).__name__,
        architecture=type(reference).__name__,
        facts=facts(model.config),
        versions={"torch": str(torch.__version__), "transformers": transformers.__version__},
        tensors=plain,
        inputs=inputs,
        layers=layers,
        gradients=found,
        noise=_noise(reference, model, layers, inputs),  # last: it leaves the reference in half precision
    )


def load(model: Any, origin: Origin) -> Any:
    """The reference's model from the checkpoint itself; arrays that were drawn, not read, are copied from ours."""
    import torch
    import transformers

    reference_class = getattr(transformers, FAMILIES[model.config.family].architecture(type(model)))
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with _readable(origin) as directory:
            reference, info = reference_class.from_pretrained(
                directory,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **FAMILIES[model.config.family].options(model),
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    FAMILIES[model.config.family].settle(reference, model)
    specs, get = reference_names.tensors(model)
    state = reference.state_dict()
    # What the file has under the name of one of ours, but for another head, was dropped: ours was drawn.
    dropped = {_torch_name(origin.renamed.get(key, key)) for key in origin.dropped}
    drawn = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"]), *dropped}
    with torch.no_grad():
        for name in drawn & specs.keys() & state.keys():
            state[name].copy_(torch.from_numpy(np.array(get(name), np.float32)))
        for name, spec in specs.items():
            if name in state:
                state[name].copy_(state[name].to(getattr(torch, str(spec.dtype))))
    return reference.eval()


@contextlib.contextmanager
def _readable(origin: Origin) -> Iterator[Path]:
    """The checkpoint's directory as the reference reads it: it has forgotten what Flax wrote."""
    directory = Path(str(origin.directory))
    if not any(name.endswith(FLAX) for name in origin.layout):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="reference-") as made:
        shutil.copy(directory / "config.json", made)
        _as_torch(open_directory(directory), Path(made) / "model.safetensors")
        yield Path(made)


def _as_torch(checkpoint: Checkpoint, path: Path) -> None:
    """Flax's tensors, which are turned already, by torch's names. This knows no table of ours: it is to check them."""
    keys = {_torch_name(key): key for key in checkpoint.specs}
    for name in [name for name in keys if name.endswith(".decoder.weight")]:  # untied: torch lists the bias twice
        head = name.removesuffix("decoder.weight")
        keys |= {f"{head}decoder.bias": keys[f"{head}bias"]} if f"{head}bias" in keys else {}
    spec = lambda key: jax.ShapeDtypeStruct(checkpoint.specs[key].shape, checkpoint.specs[key].numpy_dtype)
    specs = {name: spec(key) for name, key in keys.items()}
    tensor_file.write(path, specs, lambda name: checkpoint.get(keys[name]), {"format": "pt"})


def _torch_name(key: str) -> str:
    *steps, last = key.split("/")
    return ".".join([*steps, "weight" if last in ("kernel", "scale", "embedding") else last])


def _adapt(reference: Any, adapter: Path) -> None:
    """Puts the adapter's layers into the reference; what its modules are called stays."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # one library's, about another
        PeftModel.from_pretrained(reference, adapter).eval()


def tensors(reference: Any, model: Any) -> dict[str, Tensor]:
    """The reference's tensors under the names of ours, in the dtype of ours."""
    specs, _ = reference_names.tensors(model)
    state = reference.state_dict()
    return {
        name: Tensor.of(state[name].numpy().astype(compared(spec.dtype)))
        for name, spec in specs.items()
        if name in state
    }


def outputs(
    reference: Any, model: Any, probes: Mapping[str, str], inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """By our paths, what the reference's modules of these names give, and its output at ""; all in float32."""
    import torch

    seen: dict[str, np.ndarray] = {}

    def keep(path: str) -> Callable[..., None]:
        first = lambda out: out[0] if isinstance(out, tuple) else out
        return lambda module, args, out: seen.__setitem__(path, first(out).detach().float().numpy())

    hooks = [reference.get_submodule(name).register_forward_hook(keep(path)) for path, name in probes.items()]
    try:
        with torch.no_grad():
            found = [x.float().numpy() for x in _called(reference, model, inputs)]
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(model, MultipleChoice):
        return seen | {"": found[0].reshape(-1)}
    return seen | {"": found[0] if len(found) == 1 else np.concatenate([x.reshape(len(x), -1) for x in found], axis=1)}


def gradients(reference: Any, model: Any, inputs: dict[str, np.ndarray]) -> Gradients:
    """The gradient of a weighted sum of the output, for those of our tensors that have one."""
    import torch

    weights = taps.cotangent(model, inputs)
    found = torch.cat([x.reshape(len(x), -1) for x in _called(reference, model, inputs)], dim=1)
    reference.zero_grad()
    (found * torch.from_numpy(weights)).sum().backward()
    parameters = dict(reference.named_parameters(remove_duplicate=False))
    found = {name: parameters[name].grad for name in reference_names.paths(model) if name in parameters}
    reference.zero_grad()
    return Gradients(weights, {name: grad.numpy() for name, grad in found.items() if grad is not None})


def _noise(reference: Any, model: Any, layers: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Exact | None:
    """The reference on the inputs of every seed in float32, then in the model's dtype, in which it is left."""
    import torch

    dtype = noise.dtype_of(model)
    if dtype is None:
        return None
    path = noise.place(model, layers, inputs)
    probe = {path: taps.probes(model)[path]} if path else {}
    given = [taps.random_inputs(model, seed) for seed in noise.SEEDS]
    run = lambda inputs: noise.counted(outputs(reference, model, probe, inputs)[path], inputs)
    exact = np.stack([run(inputs) for inputs in given])
    reference.to(getattr(torch, dtype))
    errors = [run(inputs) - theirs for inputs, theirs in zip(given, exact, strict=True)]
    return Exact(dtype, path, noise.rms(errors), {k: np.stack([x[k] for x in given]) for k in inputs}, exact)


def _called(reference: Any, model: Any, inputs: dict[str, np.ndarray]) -> list[Any]:
    """The outputs that our model's output stands for, in order."""
    import torch

    called = FAMILIES[model.config.family].called
    given = {called.get(name, name): torch.from_numpy(x) for name, x in inputs.items()}
    result = reference(given.pop("ids"), **given)
    if "start_logits" in result:
        return [torch.stack([result.start_logits, result.end_logits], dim=-1)]
    if "prediction_logits" in result:
        return [result.prediction_logits, result.seq_relationship_logits]
    if not hasattr(model, "pooling"):
        return [result.logits if "logits" in result else result.last_hidden_state]
    hidden = result.last_hidden_state
    mask = given["attention_mask"][..., None].to(hidden.dtype)
    first = mask.argmax(1, keepdim=True).expand(-1, 1, hidden.shape[-1])
    x = (hidden * mask).sum(1) / mask.sum(1) if model.config.pooling == "mean" else hidden.gather(1, first)[:, 0]
    return [torch.nn.functional.normalize(x, dim=-1) if model.config.normalize else x]
