"""The options of `masked_lm`: which texts, what is hidden of them, and what a new model looks like."""

from dataclasses import dataclass, fields

from ._encoders import LONGEST, SHAPES
from ._options import WrongUsage, expect_at_least, expect_dropout, expect_share, option


@dataclass(frozen=True, kw_only=True)
class Options:
    """How texts are read and corrupted. Raises `WrongUsage` for what is out of range."""

    text: str = option("text", "the column of the texts, where a file has columns", metavar="COLUMN")
    hold_out: float = option(0.1, "the share of the texts that is not trained on, chosen by a hash of each")
    mask_rate: float = option(0.15, "the share of the tokens that are to be restored")
    whole_words: bool = option(False, "hide whole words, not single tokens")
    pack: bool = option(False, "several texts in a row of --max-length tokens, each sees itself alone")
    max_length: int | None = option(
        None, f"tokens; longer texts are cut (default: the model's room, {LONGEST} at most)"
    )
    max_shapes: int = option(SHAPES, "lengths that batches are padded to")

    def __post_init__(self):
        expect_share("--hold-out", self.hold_out)
        expect_share("--mask-rate", self.mask_rate)
        expect_at_least(self, {"max_shapes": 1, "max_length": 3})
        if self.pack and self.max_shapes not in (1, SHAPES):
            raise WrongUsage("--pack has one length, --max-length: leave out --max-shapes.")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A new model, a RoBERTa, and its tokenizer. Raises `WrongUsage` for what is out of range."""

    layers: int = option(4, "blocks")
    heads: int = option(4, "of attention; their width is the embed-dim's part")
    embed_dim: int = option(256, "width")
    mlp_dim: int = option(1024, "width inside the feed-forward networks")
    vocab_size: int = option(8000, "tokens of the tokenizer, byte-level BPE, that is made of the texts")
    dropout: float = option(0.1, "of all parts")

    def __post_init__(self):
        expect_at_least(self, dict.fromkeys([one.name for one in fields(self) if one.name != "dropout"], 1))
        if self.embed_dim % self.heads:
            raise WrongUsage(f"--embed-dim {self.embed_dim} must be a multiple of --heads {self.heads}.")
        expect_dropout(self.dropout)
