"""One odd-sized config a family, and the table of family x head that every law runs over.

Sizes are coprime where they may be, so that a swapped axis is an error and not a coincidence.
"""

from dataclasses import dataclass, field
from typing import Any

from eqx_transformers import Encoder, MaskedLM, SentenceEmbedder, SequenceClassifier

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
}

PREFIX = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
SUFFIX = {
    Encoder: "Model",
    SentenceEmbedder: "Model",
    MaskedLM: "ForMaskedLM",
    SequenceClassifier: "ForSequenceClassification",
}


@dataclass(frozen=True)
class Row:
    """A family, a head, and options of the reference's config; `id` names it in test output."""

    family: str
    head: type
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return PREFIX[self.family] + SUFFIX[self.head]

    @property
    def id(self) -> str:
        extra = "".join(f"-{k}={v}" for k, v in self.options.items())
        return f"{self.family}-{self.head.__name__}{extra}"

    def __hash__(self) -> int:
        return hash(self.id)


ROWS = [
    *(Row(family, head) for family in TINY for head in SUFFIX),
    Row("bert", MaskedLM, {"tie_word_embeddings": False}),
    Row("roberta", MaskedLM, {"tie_word_embeddings": False}),
    Row("bert", SequenceClassifier, {"num_labels": 5, "hidden_act": "silu"}),
    Row("roberta", SequenceClassifier, {"num_labels": 1, "problem_type": "regression"}),
]
