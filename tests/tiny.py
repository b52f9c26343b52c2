"""One odd-sized config a family, and the table of family x head that every law runs over.

Sizes are coprime where they may be, so that a swapped axis is an error and not a coincidence.
"""

from dataclasses import dataclass, field
from typing import Any

from converters.families import FAMILIES
from eqx_transformers import (
    CausalLM,
    Encoder,
    MaskedLM,
    PreTraining,
    SequenceClassifier,
    TokenClassifier,
)

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
        return TINY[self.family] | ({"is_decoder": True} if self.head is CausalLM else {}) | self.options

    @property
    def prefix(self) -> str:
        """What stands before the encoder's keys in this file."""
        family = FAMILIES[self.family]
        return "" if family.is_bare(self.head) else family.prefix

    @property
    def id(self) -> str:
        extra = "".join(f"-{k}={v}" for k, v in self.options.items())
        return f"{self.family}-{self.head.__name__}{extra}"

    def __hash__(self) -> int:
        return hash(self.id)


ROWS = [
    *(Row(name, head) for name, family in FAMILIES.items() for head in family.models.values()),
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
]
# A head knows nothing of how its encoder's blocks are laid out: one without a head and one with stand for the family.
BOTH = [row for row in ROWS if row.head in (Encoder, MaskedLM) and not row.options]
