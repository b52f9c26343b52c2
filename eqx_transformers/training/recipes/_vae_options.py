"""The options of `t5_vae`: which lines, which model, which loss."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from ..objectives import autoencoder_loss
from ..regularisers import logistic_weight
from ._options import WrongUsage, expect_at_least, expect_dropout, expect_share, option

LATENT_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Which lines there are. Raises `WrongUsage` for what is out of range."""

    length: int = option(
        16, "tokens of a line with its end at most; longer lines are skipped (the T5-VAE's set_seq_size)"
    )
    limit: int | None = option(None, "how many lines are read, a sample of all")
    hold_out: float = option(0.02, "the share of the lines that is not trained on, chosen by a hash of each")
    evaluate_lines: int = option(512, "held-out lines of an evaluation; at the end eight times as many")
    vocab_size: int = option(1000, "tokens of a tokenizer that is made of the lines")
    tokenizer: str | None = option(None, "a tokenizer.json, or a directory with one, in its place", metavar="PATH")
    check: str | None = option(None, "whether a line is valid: python, or MODULE:FUNCTION of a text", metavar="CHECK")
    pairs: int = option(4, "pairs of held-out lines between which interpolations are printed")
    points: int = option(11, "lines of an interpolation, both ends included")

    def __post_init__(self):
        least = {"length": 2, "limit": 2, "evaluate_lines": 2, "vocab_size": 300, "pairs": 0, "points": 2}
        expect_at_least(self, least)
        expect_share("--hold-out", self.hold_out)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model. Where a T5 is given, only the options of the codes count."""

    pooling: str = option(
        "first",
        "whose states become codes: the first tokens', one each, or all in one code, side by side (flat) or their mean",
        choices=("first", "flat", "mean"),
    )
    latent_tokens: int | None = option(None, f"how many of the first tokens become codes (default {LATENT_TOKENS})")
    latent_size: int = option(64, "numbers of a code (the T5-VAE's ae_latent_size)")
    inner_dim: int = option(100, "numbers of a token on its way into a flat code")
    embed_dim: int = option(96, "width")
    layers: int = option(2, "blocks of the encoder")
    decoder_layers: int = option(1, "blocks of the decoder")
    heads: int = option(3, "of attention; their width is the embed-dim's part")
    mlp_dim: int = option(192, "width inside the feed-forward networks")
    dropout: float = option(0.0, "of a model that is made anew")

    def __post_init__(self):
        sizes = [one.name for one in fields(self) if one.name not in ("pooling", "dropout")]
        expect_at_least(self, dict.fromkeys(sizes, 1))
        if self.embed_dim % self.heads:
            raise WrongUsage(f"--embed-dim {self.embed_dim} must be a multiple of --heads {self.heads}.")
        expect_dropout(self.dropout)
        if self.latent_tokens is not None and self.pooling != "first":
            raise WrongUsage(
                f"--latent-tokens {self.latent_tokens} needs --pooling first: {self.pooling} gives one code."
            )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss: see `autoencoder_loss`."""

    regulariser: str = option(
        "mmd", "what keeps codes near a normal; kl is of codes that are drawn", choices=("mmd", "kl", "none")
    )
    regulariser_slope: float = option(0.0025, "of its weight by the step, a logistic curve (reg_schedule_k)")
    regulariser_offset: float = option(6.25, "likewise (reg_schedule_b)")
    regulariser_weight: float | None = option(None, "in the place of the curve (reg_constant_weight)")
    reconstruct: bool = option(False, "the rebuilt states are to be the encoder's (use_recon_loss)")

    def loss(self) -> Callable[..., Any]:
        curve = partial(logistic_weight, slope=self.regulariser_slope, offset=self.regulariser_offset)
        weight = curve if self.regulariser_weight is None else self.regulariser_weight
        return autoencoder_loss(weight=weight, regulariser=self.regulariser, reconstruct=self.reconstruct)  # pyright: ignore[reportArgumentType]
