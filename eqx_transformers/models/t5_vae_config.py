"""What T5-VAEs differ in, as data: how hidden states become codes, and codes what a decoder looks at."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from .facts import expect_at_least, expect_words
from .t5_config import T5_V1, T5Config


@dataclass(frozen=True, kw_only=True)
class T5VAEConfig:
    """A T5 with a bottleneck of codes between its encoder and its decoder.

    - `pooling`: whose states become codes. "mean": the average of all tokens, one code. "first": the first
      `latent_tokens` tokens, a code each; None means all of them. "flat": all `max_tokens` tokens, each narrowed to
      `inner_dim` numbers and laid side by side, one code; its way back is as long, token by token.
    - `latent_dim`: numbers of a code.
    - `variational`: a code is drawn from a normal whose mean and variance are learned. If not, it is a number for
      number tanh, between -1 and 1.
    - `hides_padding`: where a call gives no mask, tokens with the T5's `padding_id` are hidden.
    - `as_published`: codes of the first tokens as the first T5-VAE's program takes them, whatever it meant: of fewer
      tokens than codes there are fewer codes, `latent_tokens = -1` is all but the last one, and the codes of padding
      are what its states give. Without, a text must have as many tokens as codes, and those of padding are zero.
    """

    family: Literal["t5_vae", "transformer_vae", "t5_vae_torch"] = "t5_vae"
    t5: T5Config = field(default=T5_V1)
    pooling: Literal["mean", "first", "flat"] = "mean"
    latent_tokens: int | None = None
    latent_dim: int = 32
    max_tokens: int = 60
    inner_dim: int = 100
    variational: bool = True
    hides_padding: bool = True
    as_published: bool = False
    causal: ClassVar[bool] = False

    def __post_init__(self):
        expect_words(self)
        expect_at_least(1, self, ["latent_dim", "max_tokens", "inner_dim"])
        if self.as_published and (self.pooling != "first" or self.variational):
            raise ValueError("as_published is of codes of the first tokens that are not variational.")
        if self.latent_tokens is not None and self.pooling != "first":
            raise ValueError(f"latent_tokens = {self.latent_tokens}: pooling = {self.pooling!r} gives one code.")
        least = -1 if self.as_published else 1
        if self.latent_tokens is not None and (self.latent_tokens < least or self.latent_tokens == 0):
            raise ValueError(f"latent_tokens = {self.latent_tokens} must be at least 1; None means all tokens.")

    @property
    def num_layers(self) -> int:
        """The number of blocks of the encoder."""
        return self.t5.num_layers

    @property
    def decoder_layers(self) -> int:
        """The number of blocks of the decoder."""
        return self.t5.decoder_layers

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return self.t5.vocab_size

    @property
    def padding_id(self) -> int | None:
        """The padding token."""
        return self.t5.padding_id


# What two published programs build: the one of 2021 in Flax, and its ancestor of 2020 in torch.
FLAX_T5_VAE = T5VAEConfig(
    family="transformer_vae",
    pooling="first",
    latent_tokens=6,
    variational=False,
    hides_padding=False,
    as_published=True,
)
TORCH_T5_VAE = T5VAEConfig(family="t5_vae_torch", pooling="flat", variational=False)
