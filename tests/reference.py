"""Random tiny models of the reference library, saved as a user would find them, with what they compute."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from converters.families import FAMILIES
from eqx_transformers import T5, MultipleChoice, SentenceEmbedder, T5Model

from . import kept
from .tiny import Row

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny products: threads only cost

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


@dataclass(frozen=True)
class Reference:
    """A saved checkpoint, its torch model, inputs of several rows, and outputs and gradients of torch on them."""

    row: Row
    directory: Path
    model: Any
    inputs: dict[str, np.ndarray]
    output: np.ndarray
    weights: np.ndarray
    gradients: dict[str, np.ndarray]


def make(row: Row, seed: int = 0) -> Any:
    """The torch model with every parameter perturbed: fresh biases and gains hide mistakes."""
    torch.manual_seed(seed)
    model_class = getattr(transformers, row.architecture)
    config = model_class.config_class(**(row.config | {"attn_implementation": "eager"}))
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model: Any, row: Row, directory: Path, **options: Any) -> Path:
    """As `save_pretrained` writes it; a sentence embedder with sentence-transformers' files."""
    model.save_pretrained(directory, **options)
    if row.head is SentenceEmbedder:
        (directory / "modules.json").write_text(json.dumps(MODULES))
        (directory / "1_Pooling").mkdir(exist_ok=True)
        pooling = {"word_embedding_dimension": 21, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory


def inputs(row: Row, seed: int = 0, length: int = 13) -> dict[str, np.ndarray]:
    """Four rows: whole, padded right, padded left, one token; padding where the mask is 0.

    For multiple choice, the same rows are the choices of two examples. Where there is a decoder, every row ends once,
    and what the decoder reads is shorter.
    """
    rng, sizes = np.random.default_rng(seed), row.config
    pad = sizes["pad_token_id"] or 0
    ids = rng.integers(3, sizes["vocab_size"], (4, length))
    mask = np.ones_like(ids)
    mask[1, 8:], mask[2, :5], mask[3, 1:] = 0, 0, 0
    ids[mask == 0] = pad
    given = {"ids": ids, "attention_mask": mask}
    if "decoder_start_token_id" in sizes:
        ids[np.arange(4), [length - 1, 7, length - 1, 0]] = sizes["eos_token_id"]
    if row.head in (T5, T5Model):
        given["decoder_token_ids"] = rng.integers(3, sizes["vocab_size"], (4, length - 4))
    if "type_vocab_size" in sizes:
        given["token_type_ids"] = rng.integers(0, sizes["type_vocab_size"], ids.shape)
    return {name: x.reshape(2, 2, length) for name, x in given.items()} if row.head is MultipleChoice else given


def seen(row: Row, given: dict[str, Any], output: Any) -> Any:
    """The output without a decoder's padding: before the first token a query sees nothing, and libraries differ."""
    causal = row.on_decoder or row.config.get("is_decoder")
    return output * given["attention_mask"][..., None] if causal and output.ndim == 3 else output


def run(model: Any, row: Row, given: dict[str, np.ndarray]) -> Any:
    """The torch output that our head's output stands for; several side by side, a line a row.

    A decoder is told the positions, which it does not count itself as ours do: padding takes none.
    """
    called = FAMILIES[row.family].called
    tensors = {called.get(name, name): torch.from_numpy(x) for name, x in given.items()}
    if row.on_decoder:
        tensors["position_ids"] = (tensors["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    result = model(tensors.pop("ids"), **tensors)
    if "start_logits" in result:
        return torch.stack([result.start_logits, result.end_logits], dim=-1)
    if "prediction_logits" in result:
        return torch.cat([result.prediction_logits.flatten(1), result.seq_relationship_logits], dim=1)
    if row.head is not SentenceEmbedder:
        found = result.logits if "logits" in result else result.last_hidden_state
        return seen(row, tensors, found)
    mask = tensors["attention_mask"][..., None].to(result.last_hidden_state.dtype)
    return torch.nn.functional.normalize((result.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


@functools.cache
def reference(row: Row) -> Reference:
    """Made once a session for each row of the table."""
    directory = kept.directory("reference")
    model = make(row)
    save(model, row, directory)
    given = inputs(row)
    output = run(model, row, given)
    weights = np.random.default_rng(1).standard_normal(tuple(output.shape)).astype(np.float32)
    (output * torch.from_numpy(weights)).sum().backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gradients = {name: p.grad.numpy().copy() for name, p in parameters.items() if p.grad is not None}
    model.zero_grad()
    return Reference(row, directory, model, given, output.detach().numpy(), weights, gradients)


def changes_nothing(row: Row, config: dict[str, Any]) -> bool:
    """Whether the reference computes the same, bit for bit, under another config."""
    ref = reference(row)
    model = type(ref.model)(ref.model.config_class.from_dict(config | {"attn_implementation": "eager"}))
    model.load_state_dict(ref.model.state_dict())
    with torch.no_grad():
        return torch.equal(run(model.eval(), row, ref.inputs), torch.from_numpy(ref.output))


def forward(model: Any, given: dict[str, np.ndarray]) -> Any:
    """Our model on the rows of `given`, under `jax.vmap`; several outputs side by side, a line a row."""
    import jax
    import jax.numpy as jnp

    kwargs = {name: x for name, x in given.items() if name != "ids"}
    call: Callable[..., Any] = lambda ids, kwargs: model(ids, **kwargs)
    output = jax.vmap(call)(given["ids"], kwargs)
    if model.config.causal and getattr(output, "ndim", 0) == 3:
        output = output * given["attention_mask"][..., None]
    leaves = jax.tree.leaves(output)
    return leaves[0] if len(leaves) == 1 else jnp.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)
