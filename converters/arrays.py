"""Models from dictionaries of arrays: systems that have no checkpoint directory."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from eqx_transformers import tensor_file
from eqx_transformers.tensor_file import DamagedFile, Spec

from . import convert
from .checkpoint import Checkpoint
from .errors import ConversionError, MalformedCheckpoint, SourceNotFound
from .families import FORMATS
from .files import read_json
from .filling import Form, expected_memory, filled
from .joblib_reader import open_joblib
from .origin import Origin
from .plan import Plan
from .report import Report
from .request import Request


def from_arrays(
    format: str,
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    head: type | None = None,
    labels: int | Sequence[str] | None = None,
    override: Mapping[str, Any] | None = None,
    stacked: bool = False,
    dtype: str = "auto",
    strict: bool = True,
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
    allow_overflow: bool = False,
    key: PRNGKeyArray | None = None,
    announce: Callable[[Report], None] | None = None,
    source: str | None = None,
) -> tuple[Any, Origin]:
    """(model, origin) of a dictionary of arrays. The options are those of `load`.

    - `format` and `config`, the original system's own configuration:
        - "roberta-tf": RoBERTa by TensorFlow's names (raw or with prefix, suffix and `self/` deleted) or by the Haiku
          port's. `vocab_size`, `hidden_size`, `n_layers`, `n_heads`, `intermediate_size`, `position_rows`, `n_classes`
          (of `n_heads`, heads of 64 alone are assumed); `position_offset` (2), `mask_id` (1), `layer_norm_eps` (1e-5),
          `weight_stddev` (0.02), `embed_dropout_rate`, `fully_connected_drop_rate`, `attention_drop_rate` and
          `classifier_drop_rate` (0.1 each).
        - "haiku-lm-tutorial": the causal LM of the Haiku tutorial. `vocab_size`, `d_model`, `num_layers`, `num_heads`,
          `key_size`, `widening_factor`, `sequence_length`; `layer_norm_eps` (1e-5), `pad_id` (0), `dropout_rate` (0.1).
          One of `num_heads` and `key_size` tells the other; without both, heads of 64 are assumed, as the original's.
        - "haiku-lm-example": that of Haiku's official example. The same, but `model_size`, `attn_size` and `pad_token`
          for `d_model`, `key_size` and `pad_id`; heads are of any width, so that one of the two fields is needed.
        - "functional-transformer": the purely functional one, by the paths of its parameters
          (`layers[0]/heads[1]/query`). `n_vocab`, `d_model`, `n_layers`, `n_heads`, `d_k`, `d_ff`, `max_len`; `eps`
          (1e-5), `lambda_e` (`d_model ** -0.5`), `lambda_pe` (1), `tau` (`d_k ** -0.5`). `use_bias` and `merge` ("sum"
          or "concatenate") say which of the two models it is: with biases the article's, whose heads are summed.

        - "t5-vae-torch": the T5-VAE of 2020, by the names of its state dict. `ae_latent_size`, `set_seq_size`, and the
          config of its T5 under `t5`. It makes a `T5VAE`.

      Sizes that are missing are those of the arrays; a nested dictionary of arrays will do.
    - `head`: of "roberta-tf", a classifier's parameters make a `SequenceClassifier`, others an `Encoder`, and
      `MaskedLM` or `SentenceEmbedder` may be asked for (others are put on the encoder by `Head.of`). The others make a
      `CausalLM`, or the bare `Transformer` or `FunctionalTransformer`.
    - `source` names where the arrays came from, for the origin.

    The model computes what the original does. That is not always what the reference library computes: `export` says
    which facts stand in the way, and `reconfigure` gives them other values.

    The arrays are copied. Raises `ConversionError`s; see `converters.errors`.
    """
    plan, checkpoint = _planned(
        format, tensors, config, Request(head, labels, override, stacked, strict, allow_missing, allow_unexpected)
    )
    model = filled(plan, checkpoint, Form(dtype, allow_overflow), key, announce)
    return model, convert.origin_of(source or format, None, checkpoint, plan, labels)


def inspect_arrays(
    format: str,
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    head: type | None = None,
    labels: int | Sequence[str] | None = None,
    override: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    strict: bool = True,
) -> Report:
    """What `from_arrays` would do; nothing is raised for a report that is not clean."""
    plan, checkpoint = _planned(format, tensors, config, Request(head, labels, override, strict=strict))
    return replace(plan.report, memory=expected_memory(plan, checkpoint, Form(dtype)))


def read_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, or of what joblib wrote; nothing in a file is run."""
    _expect_file(path)
    if Path(path).suffix != ".safetensors":
        return open_joblib(path)
    try:
        specs, _ = tensor_file.read_header(path)
    except DamagedFile as error:
        raise MalformedCheckpoint(str(error)) from error
    if odd := [f"{name} is {spec.dtype}" for name, spec in specs.items() if spec.numpy_dtype is None]:
        raise MalformedCheckpoint(f"{path}: {odd[0]}, which NumPy does not have. Save it in float32 or bfloat16.")
    try:
        with open(path, "rb", buffering=0) as file:
            return {name: tensor_file.read_tensor(file, spec) for name, spec in specs.items()}
    except EOFError as error:
        raise MalformedCheckpoint(f"{path} ended while it was read ({error}). Did it change?") from error


def read_config(path: str | os.PathLike[str], given: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The config that was given, or the config.json beside the file, or nothing: sizes are then the arrays' own."""
    beside = Path(path).parent / "config.json"
    if given is None and not beside.is_file():
        return {}
    if given is not None:
        _expect_file(given)
    return read_json(beside if given is None else Path(given))


def _expect_file(path: str | os.PathLike[str]) -> None:
    if Path(path).is_dir():
        raise SourceNotFound(f"{os.fspath(path)!r} is a directory; a file of arrays or its config is expected.")
    if not Path(path).is_file():
        raise SourceNotFound(f"There is no file {os.fspath(path)!r}.")


def _planned(format: str, tensors: Any, config: Any, request: Request) -> tuple[Plan, Checkpoint]:
    if format not in FORMATS:
        raise ConversionError(f"format = {format!r} is not one of {', '.join(FORMATS)}.")
    for name, given in (("tensors", tensors), ("config", config)):
        if not isinstance(given, Mapping):
            raise ConversionError(
                f"{name} must be a dictionary, but it is {type(given).__name__} (read the file first)."
            )
    family, prepare = FORMATS[format]
    arrays, config, notes = prepare(_flat(tensors), config)
    specs = {name: _spec(name, x) for name, x in arrays.items()}
    checkpoint = Checkpoint(None, config, specs, arrays=arrays)
    return convert.settled(checkpoint, request, family=family, notes=notes), checkpoint


def _flat(tensors: Mapping[str, Any], before: str = "") -> dict[str, np.ndarray]:
    """Nested dictionaries joined by "/", as Haiku joins them in print."""
    flat: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        if not isinstance(name, str):
            raise MalformedCheckpoint(f"{before}{name!r} is not a string; arrays are found by their names.")
        found = _flat(x, f"{before}{name}/") if isinstance(x, Mapping) else {before + name: _array(before + name, x)}
        if twice := found.keys() & flat.keys():
            raise MalformedCheckpoint(f"{min(twice)} is there twice, once inside a dictionary of its own.")
        flat |= found
    return flat


def _array(name: str, x: Any) -> np.ndarray:
    array = np.asarray(x)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in tensor_file.NAMES:
        raise MalformedCheckpoint(f"{name} is {type(x).__name__} of {array.dtype}; expected an array of numbers.")
    return array


def _spec(name: str, x: np.ndarray) -> Spec:
    return Spec(x.shape, tensor_file.NAMES[x.dtype], 0, x.nbytes)
