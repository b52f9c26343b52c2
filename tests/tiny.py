"""One odd-sized config a family, and the table of family x head that every law runs over.

Sizes are coprime where they may be, so that a swapped axis is an error and not a coincidence.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from converters.families import FAMILIES
from eqx_transformers import (
    GPT2,
    T5,
    CausalLM,
    Encoder,
    Llama,
    MaskedLM,
    PreTraining,
    SequenceClassifier,
    TokenClassifier,
)

from .full import FULL

# In the reference's words, for its own config classes. 31 positions: RoBERTa's first two are not for tokens.
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 31,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.3,
}

# Heads of another width than `hidden_size / num_attention_heads`; a base so small that 13 tokens turn every pair far.
DECODER: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 37,
    "max_position_embeddings": 31,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}

# Halves of unlike depth; so few buckets and so near an end that 13 tokens reach beyond it on both sides.
TWO_HALVES: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 21,
    "d_kv": 5,
    "d_ff": 37,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 7,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

TINY: dict[str, dict[str, Any]] = {
    "bert": SIZES | {"pad_token_id": 0, "hidden_act": "gelu_new"},
    "roberta": SIZES | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1},
    "xlm-roberta": SIZES | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "relu"},
    "distilbert": {
        "vocab_size": 61,
        "dim": 21,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": 37,
        "max_position_embeddings": 31,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    },
    "electra": SIZES | {"pad_token_id": 0, "embedding_size": 13, "hidden_act": "silu"},
    "gpt2": {
        "vocab_size": 61,
        "n_embd": 21,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": 37,
        "n_positions": 31,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": DECODER,
    "mistral": DECODER | {"sliding_window": 5},
    "qwen2": DECODER,
    "qwen3": DECODER,
    "t5": TWO_HALVES,
    "mt5": TWO_HALVES,
    "umt5": TWO_HALVES,
}
LAYERS = 2


@dataclass(frozen=True)
class Row:
    """A family, a head, and options of the reference's config; `id` names it in test output."""

    family: str
    head: type
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return FAMILIES[self.family].architecture(self.head)

    @property
    def config(self) -> dict[str, Any]:
        """The reference's config."""
        made_causal = {"is_decoder": True} if self.head is CausalLM and not self.on_decoder else {}
        return deepcopy(TINY[self.family] | made_causal | self.options)

    @property
    def on_decoder(self) -> bool:
        """Whether the family has no other models than causal ones."""
        return FAMILIES[self.family].reads == "last"

    @property
    def prefix(self) -> str:
        """What stands before the backbone's keys in this file."""
        family = FAMILIES[self.family]
        return family.prefix if family.is_prefixed(self.head) else ""

    @property
    def id(self) -> str:
        said = lambda v: v["rope_type"] if isinstance(v, dict) and "rope_type" in v else v
        extra = "".join(f"-{k}={said(v)}" for k, v in self.options.items())
        return f"{self.family}-{self.head.__name__}{extra}"

    def __hash__(self) -> int:
        return hash(self.id)


# The first layers see all, the others a window: they cannot be stacked.
MIXED = Row("qwen2", CausalLM, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1})
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
# Of 13 tokens, more than the original 8; of three pairs, one stays, one is between, one is divided.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 30.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 9,
}
LONGER = Row("llama", CausalLM, {"rope_parameters": LLAMA3})
BIASED = Row("llama", Llama, {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True})
WINDOWED = Row("qwen3", SequenceClassifier, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0})

GATED = Row("t5", T5, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
ROWS = [
    *(
        Row(name, head)
        for name, family in FAMILIES.items()
        for head in family.models.values()
        if FULL or name not in ("mt5", "umt5") or head is T5  # all of whose classes are T5's
    ),
    Row("bert", MaskedLM, {"tie_word_embeddings": False}),
    Row("bert", PreTraining, {"tie_word_embeddings": False}),
    Row("roberta", MaskedLM, {"tie_word_embeddings": False}),
    Row("electra", MaskedLM, {"tie_word_embeddings": False}),
    Row("distilbert", MaskedLM, {"tie_word_embeddings": False}),
    Row("electra", Encoder, {"embedding_size": 21}),
    Row("bert", Encoder, {"is_decoder": True}),
    Row("bert", SequenceClassifier, {"num_labels": 5, "hidden_act": "silu"}),
    Row("roberta", SequenceClassifier, {"num_labels": 1, "problem_type": "regression"}),
    Row("xlm-roberta", TokenClassifier, {"num_labels": 7, "classifier_dropout": 0.3}),
    Row("gpt2", CausalLM, {"tie_word_embeddings": False}),
    Row("gpt2", GPT2, {"n_inner": None, "activation_function": "relu"}),
    Row("llama", CausalLM, {"tie_word_embeddings": True, "hidden_size": 24, "head_dim": None}),
    LONGER,
    BIASED,
    MIXED,
    WINDOWED,
    Row("qwen3", CausalLM, {"attention_bias": True, "num_key_value_heads": 4}),
    GATED,
]
# A head knows nothing of how its encoder's blocks are laid out: one without a head and one with stand for the family.
BOTH = [row for row in ROWS if row.head in (Encoder, MaskedLM) and not row.options]
# Families whose table and heads are Llama's, or T5's: laws that know nothing else run on what else differs.
ALIKE = ("mistral", "qwen2", "qwen3", "mt5", "umt5")
# Of one family, files of a decoder or a T5 have one config under any head.
ONE_CONFIG = ("t5", *ALIKE)
CONFIGS = [
    row for row in ROWS if row.options or row.head in (CausalLM, T5) or not (row.on_decoder or row.family in ONE_CONFIG)
]
TABLES = [row for row in ROWS if row.family not in ALIKE or row in CONFIGS]
# Every row is verified, which compiles it once. Laws that compile it again run on these: of decoders, whose heads are
# one matrix, those that differ in what their blocks compute.
COMPILED = [row for row in ROWS if not row.on_decoder and row.family != "mt5"]
COMPILED += [Row("gpt2", CausalLM), Row("llama", CausalLM), LONGER, BIASED, MIXED, WINDOWED]
