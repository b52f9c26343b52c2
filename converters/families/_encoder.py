"""What files of BERT and its kin have in common."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from eqx_transformers import CausalLM, Encoder, EncoderConfig, MaskedLM, PreTraining, QuestionAnswerer, SentenceEmbedder

from ..config import Fact, choice, fact, flag, optional, rate, size, some, whole
from ..errors import UnsupportedConfig
from ..rules import Ignore, Rule, Table, Tie, affine, rule
from . import _shared
from ._shared import ACTIVATIONS, EVERYWHERE, labels, ours

# Endings of keys as files of TensorFlow's days have them, and what they are called now.
LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

FIXED = _shared.FIXED | {"position_embedding_type": ("absolute",)}

# Fields that do not change what the network computes from its inputs.
IRRELEVANT = EVERYWHERE | {
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
}

# What Flax calls the weight of a module whose name ends so.
FLAX = {"layernorm": "scale", "layer_norm": "scale", "_embeddings": "embedding"}


def facts(**defaults: Any) -> tuple[Fact, ...]:
    """The fields of a BERT-like config.json. `defaults` are the reference's own where families differ."""
    return (
        fact("vocab_size", "vocab_size", whole, defaults["vocab_size"]),
        fact("hidden_size", "embed_dim", whole, defaults.get("embed_dim", 768)),
        fact("num_hidden_layers", "num_layers", whole, 12),
        fact("num_attention_heads", "num_heads", whole, defaults.get("num_heads", 12)),
        fact("intermediate_size", "mlp_dim", whole, defaults.get("mlp_dim", 3072)),
        fact("max_position_embeddings", "max_positions", whole, 512),
        fact("type_vocab_size", "token_types", some, 2),
        fact("layer_norm_eps", "norm_eps", size, 1e-12),
        choice("hidden_act", "activation", ACTIVATIONS, "gelu"),
        fact("pad_token_id", "padding_id", optional(whole), defaults["padding_id"]),
        fact("hidden_dropout_prob", "dropout", rate, 0.1),
        fact("attention_probs_dropout_prob", "attention_dropout", rate, 0.1),
        fact("classifier_dropout", "classifier_dropout", optional(rate), None),
        fact("initializer_range", "init_std", size, 0.02),
        fact("is_decoder", "causal", flag, False),
        fact("tie_word_embeddings", "tied", flag, True),
        labels(),
    )


def encoder_table(prefix: str, model_class: type, config: EncoderConfig) -> Table:
    """The encoder itself, and the pooler where the config has one."""
    layer, block = f"{prefix}encoder.layer.{{i}}", f"{ours(model_class)}stack.blocks.{{i}}"
    inside, embedding = f"{prefix}embeddings", f"{ours(model_class)}embedding"
    pooler = affine(f"{prefix}pooler.dense", f"{ours(model_class)}pooler.dense") if config.pooler else ()
    return (
        rule(f"{inside}.word_embeddings.weight", f"{embedding}.tokens.weight"),
        rule(f"{inside}.position_embeddings.weight", f"{embedding}.positions.weight"),
        rule(f"{inside}.token_type_embeddings.weight", f"{embedding}.token_types.weight"),
        *affine(f"{inside}.LayerNorm", f"{embedding}.norm"),
        *affine(f"{layer}.attention.self.query", f"{block}.attention.query_proj"),
        *affine(f"{layer}.attention.self.key", f"{block}.attention.key_proj"),
        *affine(f"{layer}.attention.self.value", f"{block}.attention.value_proj"),
        *affine(f"{layer}.attention.output.dense", f"{block}.attention.output_proj"),
        *affine(f"{layer}.attention.output.LayerNorm", f"{block}.attention_norm"),
        *affine(f"{layer}.intermediate.dense", f"{block}.mlp.up_proj"),
        *affine(f"{layer}.output.dense", f"{block}.mlp.down_proj"),
        *affine(f"{layer}.output.LayerNorm", f"{block}.mlp_norm"),
        *pooler,
        Ignore(f"{inside}.position_ids", "a counter 0, 1, 2, …: positions are computed"),
        Ignore(f"{inside}.token_type_ids", "a buffer of zeros: token types are an input"),
        Ignore(f"{prefix}pooler.*", "the pooler: this head does not read it", parameter=True),
    )


def output_table(config: EncoderConfig, prefix: str, head: str) -> Table:
    """The masked-LM head's last step: the decoder, tied to the token embedding or its own, and its bias.

    The reference lists the bias twice (`HEAD.bias` and `HEAD.decoder.bias`). Tied, it computes with the first and
    files have only that; untied, it computes with the second and files have both.
    """
    tokens = f"{prefix}embeddings.word_embeddings.weight"
    if config.tied:
        return (
            rule(f"{head}.bias", "head.bias"),
            Tie(f"{head}.decoder.weight", tokens),
            Tie(f"{head}.decoder.bias", f"{head}.bias"),
        )
    spare: tuple[Rule | Tie, ...] = (Tie(f"{head}.bias", f"{head}.decoder.bias", written=True),)
    if config.spare_bias:
        spare = (rule(f"{head}.bias", "head.spare_bias"),)
    return (
        rule(f"{head}.decoder.weight", "head.decoder.weight"),
        rule(f"{head}.decoder.bias", "head.bias"),
        *spare,
    )


def linear_output(config: EncoderConfig, prefix: str, head: str) -> Table:
    """The same where the reference's decoder is a plain linear layer: one bias, its own, tied or not."""
    if config.tied:
        return (
            rule(f"{head}.bias", "head.bias"),
            Tie(f"{head}.weight", f"{prefix}embeddings.word_embeddings.weight"),
        )
    return rule(f"{head}.weight", "head.decoder.weight"), rule(f"{head}.bias", "head.bias")


def observe(prefix: str, head: str | None = None) -> Any:
    """What only the tensors decide: whether a bare encoder has a pooler, and a head a second output bias.

    `head`: where the reference has two biases of one output.
    """

    def observed(
        config: EncoderConfig, model_class: type, keys: frozenset[str], fields: Mapping[str, Any]
    ) -> EncoderConfig:
        pooler = any(key.startswith(f"{prefix}pooler.") for key in keys)
        # transformers 4 shared the two biases and saved one; from 5 on an untied file must have both.
        old = str(fields.get("transformers_version", "4")).startswith(("2", "3", "4"))
        two = head is not None and not config.tied and model_class in (MaskedLM, CausalLM, PreTraining)
        spare = two and (not old or {f"{head}.bias", f"{head}.decoder.bias"} <= keys)
        _expect_agreement(config, model_class, fields)
        return replace(config, pooler=pooler, spare_bias=spare)

    return observed


def _expect_agreement(config: EncoderConfig, model_class: type, fields: Mapping[str, Any]) -> None:
    """A file whose config contradicts its architecture is not for us to settle; another head that was asked for may."""
    listed = fields.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    if model_class is CausalLM and not config.causal and named.endswith(("LMHeadModel", "ForCausalLM")):
        raise UnsupportedConfig(
            f"config.json names {named} but has is_decoder = false, with which the reference lets every token see"
            " the ones that follow it. Load it as head=MaskedLM, which is that, or with override={'causal': True}."
        )
    if model_class is QuestionAnswerer and config.labels != 2 and named.endswith("ForQuestionAnswering"):
        raise UnsupportedConfig(
            f"config.json names {named} but its id2label has {config.labels} labels; question answering has two, the"
            " answer's start and its end."
        )


Probes = tuple[tuple[str, str], ...]


def probes(
    prefix: str, head: Mapping[type, Probes], embedding: Probes = (("embedding", "embeddings"),)
) -> Callable[[type], Probes]:
    """The encoder's parts, and each head's; `embedding` without what stands before its names on either side."""

    def listed(model_class: type) -> Probes:
        before = "" if model_class in (Encoder, SentenceEmbedder) else prefix
        block, layer = f"{ours(model_class)}stack.blocks.{{i}}", f"{before}encoder.layer.{{i}}"
        return (
            *((f"{ours(model_class)}{own}", f"{before}{theirs}") for own, theirs in embedding),
            (f"{block}.attention.query_proj", f"{layer}.attention.self.query"),
            (f"{block}.attention.key_proj", f"{layer}.attention.self.key"),
            (f"{block}.attention.value_proj", f"{layer}.attention.self.value"),
            (f"{block}.attention.output_proj", f"{layer}.attention.output.dense"),
            (f"{block}.attention_norm", f"{layer}.attention.output"),
            (f"{block}.mlp.up_proj", f"{layer}.intermediate.dense"),
            (f"{block}.mlp", f"{layer}.output.dense"),
            (f"{block}.mlp_norm", f"{layer}.output"),
            *head.get(model_class, ()),
        )

    return listed


def inputs(model: Any, ids: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random token types, where the model has any."""
    types = model.config.token_types
    return {"token_type_ids": rng.integers(0, types, ids.shape)} if types else {}


def options(model: Any) -> dict[str, Any]:
    """Labels, a pooler, a head that made the encoder causal."""
    causal = {"is_decoder": True} if model.config.causal else {}
    if type(model) not in (Encoder, SentenceEmbedder):
        return {"num_labels": model.config.labels, **causal}
    return {"add_pooling_layer": getattr(model, "backbone", model).pooler is not None, **causal}


def options_without_pooler(model: Any) -> dict[str, Any]:
    """The same of a family whose encoders never have one."""
    return {name: value for name, value in options(model).items() if name != "add_pooling_layer"}
