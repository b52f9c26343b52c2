"""The published T5-VAEs: the Flax one of 2021 (flax-community/t5-vae-python and its kin), and its ancestor in torch.

Neither is a model of the reference library. The first wrote directories as that library's Flax models did, config.json
and flax_model.msgpack; the second's have config.json and pytorch_model.bin, and its dictionaries `from_arrays` takes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from eqx_transformers import FLAX_T5_VAE, T5VAE, TORCH_T5_VAE, T5Config, T5VAEConfig

from .. import config as configs
from ..config import MISSING, Fact, fact, some, whole
from ..errors import UnsupportedConfig
from ..family import Family
from ..rules import Table, affine, rule
from . import t5

T5 = t5.FAMILY


def _read_t5(value: Any) -> tuple[T5Config]:
    """A config.json of a T5, whole, inside of the other one."""
    if not isinstance(value, Mapping):
        raise ValueError("expected the config of a T5, a dictionary")
    if value.get("model_type", "t5") != "t5":
        raise ValueError(f"its model_type must be t5, but it is {value['model_type']!r}")
    fields = configs.modern(value, T5.older)
    try:
        stated = configs.read(fields, T5.facts, fixed=T5.fixed, irrelevant=T5.irrelevant | {"bos_token_id"})
        made = replace(T5.defaults, **stated)
    except UnsupportedConfig as error:
        raise ValueError(str(error)) from error
    # Its programs begin a decoder's input with padding where nothing is said, as T5's own shift does.
    start = made.padding_id if made.start_id is None else made.start_id
    return (replace(made, start_id=start, tied=made.scaled),)


def _write_t5(config: T5Config) -> tuple[dict[str, Any]]:
    return ({"model_type": "t5", "is_encoder_decoder": True, **configs.write(config, T5.facts)},)


def facts(size: str, *own: Fact) -> tuple[Fact, ...]:
    return (
        Fact(("t5",), ("t5",), _read_t5, _write_t5, (MISSING,)),
        fact(size, "latent_dim", some, 32),
        fact("set_seq_size", "max_tokens", some, 60),
        *own,
    )


def _tied(config: T5VAEConfig, tied: bool) -> T5VAEConfig:
    """Scaled are the scores of a tied output alone."""
    return replace(config, t5=replace(config.t5, tied=tied, scaled=tied))


OUTPUT = "t5.lm_head.weight"


def observe(config: T5VAEConfig, model_class: type, keys: frozenset[str], fields: Mapping[str, Any]) -> T5VAEConfig:
    """There is an output of its own where the embeddings are not tied, and only there."""
    return _tied(config, OUTPUT not in keys and fields.get("tie_word_embeddings") is not False)


def table(config: T5VAEConfig, model_class: type) -> Table:
    return (
        *t5.body_table(config.t5, "t5.", "t5."),
        *t5.output(config.t5, OUTPUT, "t5.", "t5."),
        *affine("vae.encoder.Dense_0", "encoder_to_latent.dense"),
        *affine("vae.decoder.Dense_0", "latent_to_decoder.dense"),
        *affine("vae.decoder.LayerNorm_0", "latent_to_decoder.norm"),
    )


FAMILY = Family(
    model_type="transformer_vae",
    defaults=FLAX_T5_VAE,
    architectures={"T5VaeForAutoencoding": T5VAE},
    like={},
    carries={},
    prefix="",
    roots=(),
    facts=facts("latent_token_size", fact("n_latent_tokens", "latent_tokens", whole, 6)),
    fixed={"vae_encoder_model": ("",), "vae_decoder_model": ("",), "tie_word_embeddings": (True, False)},
    irrelevant=t5.EVERYWHERE | {"pad_token_id", "_commit_hash", "is_encoder_decoder", "is_composition", "cache_dir"},
    table=table,
    observe=observe,
    legacy={},
    flax={**(T5.flax or {}), "layernorm_0": "scale"},
    probes=lambda model_class: (),
)


# ---- the ancestor


def torch_table(config: T5VAEConfig, model_class: type) -> Table:
    narrowed, grown = "encoder_to_latent", "latent_to_decoder"
    return (
        *t5.body_table(config.t5, "t5_model.", "t5."),
        *t5.output(config.t5, "t5_model.lm_head.weight", "t5.", "t5_model."),
        *affine("vae.encoder.shrink_tokens", f"{narrowed}.narrow"),
        *affine("vae.encoder.shrink_sequence", f"{narrowed}.dense"),
        *affine("vae.decoder.decode_latent", f"{grown}.dense"),
        *affine("vae.decoder.grow_sequence", f"{grown}.grow"),
        *affine("vae.decoder.grow_tokens", f"{grown}.widen"),
        rule("vae.decoder.norm.layer_norm.weight", f"{grown}.norm.weight"),
        rule("vae.decoder.norm.DenseReluDense.wi.weight", f"{grown}.mlp.up_proj.weight"),
        rule("vae.decoder.norm.DenseReluDense.wo.weight", f"{grown}.mlp.down_proj.weight"),
    )


TORCH = replace(
    FAMILY,
    model_type="t5-vae-torch",
    defaults=TORCH_T5_VAE,
    architectures={"t5-vae-torch": T5VAE},
    facts=facts("ae_latent_size"),
    fixed={"tie_word_embeddings": (True, False)},
    table=torch_table,
    observe=lambda config, model_class, keys, fields: _tied(config, "t5_model.lm_head.weight" not in keys),
    recognise=lambda keys: "t5-vae-torch",
    flax=None,
)


def prepare(
    arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
    """As they are: the original's config says all sizes but the width between a token and the code, which is 100."""
    return dict(arrays), dict(config), ()
