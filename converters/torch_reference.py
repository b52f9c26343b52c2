"""The reference library's model of a checkpoint, and what it computes."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from eqx_transformers import MultipleChoice

from . import reference_names
from .families import FAMILIES
from .origin import Origin


def expect() -> None:
    """Raises an ImportError with the pip line when the reference cannot be imported."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("Verification needs the reference: pip install 'eqx_transformers[verify]'") from error


def load(model: Any, origin: Origin) -> Any:
    """The reference's model from the checkpoint itself; arrays that were drawn, not read, are copied from ours."""
    import torch
    import transformers

    reference_class = getattr(transformers, FAMILIES[model.config.family].architecture(type(model)))
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
            **_options(model),
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    specs, get = reference_names.tensors(model)
    state = reference.state_dict()
    # What the file has under the name of one of ours, but for another head, was dropped: ours was drawn.
    dropped = {origin.renamed.get(key, key) for key in origin.dropped}
    drawn = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"]), *dropped}
    with torch.no_grad():
        for name in drawn & specs.keys() & state.keys():
            state[name].copy_(torch.from_numpy(np.array(get(name), np.float32)))
        for name, spec in specs.items():
            if name in state:
                state[name].copy_(state[name].to(getattr(torch, str(spec.dtype))))
    return reference.eval()


def _options(model: Any) -> dict[str, Any]:
    """What the file's config does not say of this class: its labels, a pooler, a head that made it causal."""
    family = FAMILIES[model.config.family]
    causal = {"is_decoder": True} if model.config.causal else {}
    if not family.is_bare(type(model)):
        return {"num_labels": model.config.labels, **causal}
    if not family.defaults.pooler:
        return causal
    return {"add_pooling_layer": getattr(model, "backbone", model).pooler is not None, **causal}


def outputs(
    reference: Any, model: Any, probes: Mapping[str, str], inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """By our paths, what the reference's modules of these names give, and its output at ""."""
    import torch

    seen: dict[str, np.ndarray] = {}

    def keep(path: str) -> Callable[..., None]:
        first = lambda out: out[0] if isinstance(out, tuple) else out
        return lambda module, args, out: seen.__setitem__(path, first(out).detach().numpy())

    hooks = [reference.get_submodule(name).register_forward_hook(keep(path)) for path, name in probes.items()]
    try:
        with torch.no_grad():
            found = [x.numpy() for x in _called(reference, model, inputs)]
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(model, MultipleChoice):
        return seen | {"": found[0].reshape(-1)}
    return seen | {"": found[0] if len(found) == 1 else np.concatenate([x.reshape(len(x), -1) for x in found], axis=1)}


def gradients(reference: Any, model: Any, inputs: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """The gradient of the weighted sum of the output (a line of numbers a row), by the reference's names."""
    import torch

    found = torch.cat([x.reshape(len(x), -1) for x in _called(reference, model, inputs)], dim=1)
    reference.zero_grad()
    (found * torch.from_numpy(weights)).sum().backward()
    parameters = dict(reference.named_parameters(remove_duplicate=False))
    return {name: p.grad.numpy() for name, p in parameters.items() if p.grad is not None}


def _called(reference: Any, model: Any, inputs: dict[str, np.ndarray]) -> list[Any]:
    """The outputs that our model's output stands for, in order."""
    import torch

    given = {name: torch.from_numpy(x) for name, x in inputs.items()}
    result = reference(given.pop("ids"), **given)
    if "start_logits" in result:
        return [torch.stack([result.start_logits, result.end_logits], dim=-1)]
    if "prediction_logits" in result:
        return [result.prediction_logits, result.seq_relationship_logits]
    if not hasattr(model, "pooling"):
        return [result.logits if "logits" in result else result.last_hidden_state]
    hidden, mask = result.last_hidden_state, given["attention_mask"][..., None].float()
    first = mask.argmax(1, keepdim=True).expand(-1, 1, hidden.shape[-1])
    x = (hidden * mask).sum(1) / mask.sum(1) if model.config.pooling == "mean" else hidden.gather(1, first)[:, 0]
    return [torch.nn.functional.normalize(x, dim=-1) if model.config.normalize else x]
