"""Llama 2 and 3, SmolLM, Mistral, Qwen2 and Qwen3. Reference: transformers' llama, mistral, qwen2, qwen3.

Their tensors have the same names; that some have biases or head norms, the model's own leaves say.
"""

from dataclasses import replace

from eqx_transformers import LLAMA, MISTRAL, QWEN2, QWEN3, CausalLM, Llama, LlamaConfig, SequenceClassifier

from ..config import OLDER, Fact, choice, fact, flag, optional, rate, size, some, whole
from ..family import Family
from ..rules import Ignore, Table, affine, rule
from . import _rope, _window
from ._decoder import FIXED, IRRELEVANT, PADDING, SURPLUS, head, inputs, observe, options, probes, settle
from ._shared import ACTIVATIONS, labels, ours

PREFIX = "model."
LAYER, BLOCK = "layers.{i}", "stack.blocks.{i}"
# Our modules in a block, and theirs.
NORMS = {
    "attention_norm": "input_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
}
DENSE = {
    "attention.query_proj": "self_attn.q_proj",
    "attention.key_proj": "self_attn.k_proj",
    "attention.value_proj": "self_attn.v_proj",
    "attention.output_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
FREQUENCIES = "a buffer, the frequencies of rotary positions: computed"


def table(config: LlamaConfig, model_class: type) -> Table:
    layer, block, tokens = f"{PREFIX}{LAYER}", f"{ours(model_class)}{BLOCK}", f"{PREFIX}embed_tokens.weight"
    return (
        rule(tokens, f"{ours(model_class)}embedding.tokens.weight"),
        *(rule(f"{layer}.{theirs}.weight", f"{block}.{own}.weight") for own, theirs in NORMS.items()),
        *(one for own, theirs in DENSE.items() for one in affine(f"{layer}.{theirs}", f"{block}.{own}")),
        rule(f"{PREFIX}norm.weight", f"{ours(model_class)}norm.weight"),
        *head(config, model_class, tokens),
        Ignore(f"{PREFIX}layers.*.self_attn.rotary_emb.inv_freq", FREQUENCIES),
        Ignore(f"{PREFIX}rotary_emb.inv_freq", FREQUENCIES),
        *SURPLUS,
    )


def _part(name: str) -> tuple[str, str]:
    return f"{BLOCK}.{name}", f"{LAYER}.{(NORMS | DENSE)[name]}"


PARTS = (
    ("embedding", "embed_tokens"),
    *map(_part, ["attention_norm", "attention.query_proj", "attention.key_proj", "attention.value_proj"]),
    *map(_part, ["attention.query_norm", "attention.key_norm", "attention.output_proj", "mlp_norm"]),
    *map(_part, ["mlp.gate_proj", "mlp.up_proj"]),
    (f"{BLOCK}.mlp", f"{LAYER}.mlp"),
    (BLOCK, LAYER),
    ("norm", "norm"),
)


def facts(defaults: LlamaConfig, width: Fact, *own: Fact) -> tuple[Fact, ...]:
    """The fields that all of them have; `width` of a head, which not all may leave unsaid."""
    return (
        fact("vocab_size", "vocab_size", whole, defaults.vocab_size),
        fact("hidden_size", "embed_dim", whole, defaults.embed_dim),
        fact("intermediate_size", "mlp_dim", whole, defaults.mlp_dim),
        fact("num_attention_heads", "num_heads", some, defaults.num_heads),
        fact("num_key_value_heads", "num_kv_heads", optional(some), defaults.num_kv_heads),
        fact("max_position_embeddings", "max_positions", whole, defaults.max_positions),
        fact("rms_norm_eps", "norm_eps", size, 1e-6),
        choice("hidden_act", "activation", ACTIVATIONS, "silu"),
        PADDING,
        fact("attention_dropout", "attention_dropout", rate, 0.0),
        fact("initializer_range", "init_std", size, 0.02),
        fact("tie_word_embeddings", "tied", flag, False),
        _rope.FACT,
        width,
        *own,
        labels(),
    )


DEPTH = fact("num_hidden_layers", "num_layers", whole, 32)
WIDTH = fact("head_dim", "head_dim", optional(some), None)
# Of all four projections.
BIAS = Fact(
    ("attention_bias",),
    ("attention_bias", "output_bias"),
    lambda value: (flag(value),) * 2,
    lambda first, last: (first and last,),
    (False,),
)
# All of a head is turned, in halves: other values are of other programs, or of what the reference leaves undone.
TURNED = FIXED | {"partial_rotary_factor": (1.0,), "rope_interleaved": (False,)}
# Fields of programs that made the files. The reference reads none of them.
MADE_BY = {"is_llama_config", "max_sequence_length", "pretraining_tp", "transformers.js_config", "unsloth_fixed"}


def architectures(name: str) -> dict[str, type]:
    """The reference's classes, which differ between the families in this part of their names alone."""
    return {
        f"{name}Model": Llama,
        f"{name}ForCausalLM": CausalLM,
        f"{name}ForSequenceClassification": SequenceClassifier,
    }


FAMILY = Family(
    model_type="llama",
    defaults=LLAMA,
    architectures=architectures("Llama"),
    like={},
    carries={},
    prefix=PREFIX,
    roots=("embed_tokens", "layers", "norm"),
    facts=facts(LLAMA, WIDTH, DEPTH, BIAS, fact("mlp_bias", "mlp_bias", flag, False)),
    fixed=TURNED,
    irrelevant=IRRELEVANT | MADE_BY,
    table=table,
    observe=observe,
    legacy={},
    older=(*OLDER, _rope.OLDER),
    flax={"norm": "weight", "embed_tokens": "embedding"},
    probes=probes(PREFIX, PARTS),
    inputs=inputs,
    options=options,
    settle=settle,
    reads="last",
)

MISTRAL_FAMILY = replace(
    FAMILY,
    model_type="mistral",
    defaults=MISTRAL,
    architectures=architectures("Mistral"),
    facts=facts(MISTRAL, WIDTH, DEPTH, fact("sliding_window", "window", optional(some), 4096)),
    fixed=TURNED | {"attention_bias": (False,), "mlp_bias": (False,)},
)

QWEN2_FAMILY = replace(
    FAMILY,
    model_type="qwen2",
    defaults=QWEN2,
    architectures=architectures("Qwen2"),
    facts=facts(replace(QWEN2, num_kv_heads=32), WIDTH, _window.FACT),
    fixed=TURNED | {"use_mrope": (False,)},
    flax=None,
)

QWEN3_FAMILY = replace(
    QWEN2_FAMILY,
    model_type="qwen3",
    defaults=QWEN3,
    architectures=architectures("Qwen3"),
    facts=facts(replace(QWEN3, num_kv_heads=32), fact("head_dim", "head_dim", some, 128), _window.FACT, BIAS),
)
