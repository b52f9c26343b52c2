"""A T5 with a bottleneck between its halves: texts become a few codes, and codes texts.

The decoder looks at nothing but what is rebuilt from the codes. Sources: the T5-VAEs of 2020 and 2021, whose programs
are published and whose loss is that of Zhao et al. 2017, arXiv:1706.02262; the variational one: Kingma & Welling 2014,
arXiv:1312.6114.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..nn import MLP, AbstractCache, Cache, LayerNorm, Linear, RMSNorm, relu
from ..nn._dtypes import wider
from ..nn._errors import within
from .backbones import part_of
from .inputs import Attended, Ids, TargetAttended, TargetIds
from .t5 import T5
from .t5_parts import Memory
from .t5_vae_config import T5VAEConfig

Key = PRNGKeyArray | None
NORM_EPS = 1e-6


class Posterior(NamedTuple):
    """What the encoder says of a text's codes: their means, and where they are variational the logarithm of their
    variances; `real` are the codes that are not of padding. Those of padding are the prior's, 0 and 0, which cost a
    divergence nothing."""

    mean: Float[Array, "*batch codes latent_dim"]
    log_variance: Float[Array, "*batch codes latent_dim"] | None
    real: Bool[Array, "*batch codes"]


class T5VAEOutput(NamedTuple):
    """What a `T5VAE` computes of a text: the scores of every next token, the codes, and the encoder's hidden states
    before (`states`) and after the bottleneck (`reconstructed_states`), which a reconstruction loss compares."""

    logits: Float[Array, "*batch target vocab"]
    latents: Float[Array, "*batch codes latent_dim"]
    reconstructed_states: Float[Array, "*batch rebuilt embed_dim"]
    states: Float[Array, "*batch seq embed_dim"]
    posterior: Posterior


class EncoderToLatent(eqx.Module):
    """Hidden states -> codes: tanh(dense(pooled)), or where they are variational the two parameters of a normal.

    `narrow` stands before a "flat" pooling. See `T5VAEConfig`.
    """

    narrow: eqx.Module | None
    dense: eqx.Module
    log_variance: eqx.Module | None
    pooling: str = eqx.field(static=True)
    latent_tokens: int | None = eqx.field(static=True)
    max_tokens: int = eqx.field(static=True)
    as_published: bool = eqx.field(static=True)

    def __init__(self, config: T5VAEConfig, *, key: PRNGKeyArray):
        narrow, mean, variance = jax.random.split(key, 3)
        flat, width = config.pooling == "flat", config.t5.embed_dim
        pooled = config.inner_dim * config.max_tokens if flat else width
        self.narrow = Linear(width, config.inner_dim, key=narrow) if flat else None
        self.dense = Linear(pooled, config.latent_dim, key=mean)
        self.log_variance = Linear(pooled, config.latent_dim, key=variance) if config.variational else None
        self.pooling = config.pooling
        self.latent_tokens = config.latent_tokens
        self.max_tokens = config.max_tokens
        self.as_published = config.as_published

    def __call__(self, states: Float[Array, "seq embed_dim"], real: Bool[Array, " seq"]) -> Posterior:
        pooled, real = self._pooled(states, real)
        there = lambda x: jnp.where(jnp.broadcast_to(real[:, None], x.shape), x, 0)
        with within("dense"):
            mean = self.dense(pooled)
        if self.log_variance is None:
            return Posterior(there(jnp.tanh(mean)), None, real)
        with within("log_variance"):
            return Posterior(there(mean), there(self.log_variance(pooled)), real)

    def _pooled(self, states: Array, real: Array) -> tuple[Array, Array]:
        one = jnp.ones(1, bool)
        if self.pooling == "mean":
            weights = real.astype(wider(states.dtype, jnp.float32))
            mean = weights @ states.astype(weights.dtype) / jnp.maximum(weights.sum(), 1)
            return mean[None].astype(states.dtype), one
        if self.narrow is None:
            return self._first(states, real)
        if len(states) != self.max_tokens:
            raise ValueError(f"A sequence must have max_tokens = {self.max_tokens} tokens, not {len(states)}: pad it.")
        with within("narrow"):
            return self.narrow(states).reshape(1, -1), one

    def _first(self, states: Array, real: Array) -> tuple[Array, Array]:
        count = len(states) if self.latent_tokens is None else self.latent_tokens
        if self.as_published:
            return states[:count], jnp.ones(len(states[:count]), bool)
        if count > len(states):
            raise ValueError(f"A sequence of {len(states)} tokens has not {count} codes: pad it to at least as many.")
        return states[:count], real[:count]


class LatentToDecoder(eqx.Module):
    """Codes -> what the decoder looks at: norm(dense(code)), a state for each."""

    dense: eqx.Module
    norm: eqx.Module

    def __init__(self, config: T5VAEConfig, *, key: PRNGKeyArray):
        self.dense = Linear(config.latent_dim, config.t5.embed_dim, key=key)
        self.norm = LayerNorm(config.t5.embed_dim, eps=NORM_EPS)

    def __call__(self, latents: Float[Array, "codes latent_dim"]) -> Float[Array, "codes embed_dim"]:
        with within("dense"):
            x = self.dense(latents)
        with within("norm"):
            return self.norm(x)


class FlatToDecoder(eqx.Module):
    """One code -> a state for every token: x + mlp(norm(x)) where x = widen(grow(dense(code))), token by token."""

    dense: eqx.Module
    grow: eqx.Module
    widen: eqx.Module
    norm: eqx.Module
    mlp: eqx.Module
    inner_dim: int = eqx.field(static=True)

    def __init__(self, config: T5VAEConfig, *, key: PRNGKeyArray):
        dense, grow, widen, mlp = jax.random.split(key, 4)
        tokens, inner, width = config.max_tokens, config.inner_dim, config.t5.embed_dim
        self.dense = Linear(config.latent_dim, max(1, inner // 10) * tokens, key=dense)
        self.grow = Linear(max(1, inner // 10) * tokens, inner * tokens, key=grow)
        self.widen = Linear(inner, width, key=widen)
        self.norm = RMSNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, config.t5.mlp_dim, relu, use_bias=False, key=mlp)
        self.inner_dim = inner

    def __call__(self, latents: Float[Array, "1 latent_dim"]) -> Float[Array, "max_tokens embed_dim"]:
        with within("dense"):
            x = self.dense(latents[0])
        with within("grow"):
            x = self.grow(x).reshape(-1, self.inner_dim)
        with within("widen"):
            x = self.widen(x)
        with within("mlp"):
            return x + self.mlp(self.norm(x))


class T5VAE(eqx.Module):
    """Token ids of both sides -> `T5VAEOutput`. One sequence; `jax.vmap` it.

    What the decoder is to say is the same text: `generate(model, token_ids, …)` reads texts and says them again, and
    `generate(model, memory=latents, …)` says what codes stand for, `batch codes latent_dim`.
    """

    t5: T5
    encoder_to_latent: EncoderToLatent
    latent_to_decoder: eqx.Module
    hides_padding: bool = eqx.field(static=True)
    config: Any = eqx.field(static=True)

    def __init__(self, config: T5VAEConfig, *, key: PRNGKeyArray, t5: T5 | None = None):
        whole, down, up = jax.random.split(key, 3)
        self.t5 = part_of(T5(config.t5, key=whole) if t5 is None else t5)
        self.encoder_to_latent = EncoderToLatent(config, key=down)
        self.latent_to_decoder = (FlatToDecoder if config.pooling == "flat" else LatentToDecoder)(config, key=up)
        self.hides_padding = config.hides_padding
        self.config = config

    @classmethod
    def from_t5(cls, t5: T5, config: T5VAEConfig, *, key: PRNGKeyArray) -> "T5VAE":
        """The bottleneck that `config` describes, drawn from `key`, in a T5 that is there: the way to begin training.

        The T5's own config takes the place of `config.t5`.
        """
        if t5.config is None:
            raise ValueError("This T5 is a part of another model, which has the config: pass one that stands alone.")
        return cls(replace(config, t5=t5.config), key=key, t5=t5)

    @property
    def room(self) -> int | None:
        """How many tokens a sequence may have."""
        return self.config.max_tokens if self.config.pooling == "flat" else None

    @property
    def hidden_id(self) -> int | None:
        """The id of the tokens that are hidden where a call gives no mask; None where none are."""
        return self.t5.padding_id if self.hides_padding else None

    @property
    def memory_axes(self) -> int:
        """How many axes the codes of a text have."""
        return 2

    @property
    def counts_padding(self) -> bool:
        """Whether it matters to the codes where padding stands, and how much: but for their average, it does."""
        return self.encoder_to_latent.pooling != "mean"

    @property
    def start_id(self) -> int | None:
        """What a decoder's input begins with."""
        return self.t5.start_id

    def __call__(
        self,
        token_ids: Ids,
        decoder_token_ids: TargetIds,
        *,
        attention_mask: Attended | None = None,
        decoder_attention_mask: TargetAttended | None = None,
        key: Key = None,
    ) -> T5VAEOutput:
        """`key` switches dropout on, and draws the codes where they are variational; without it they are the means."""
        first, draw, second = (None, None, None) if key is None else jax.random.split(key, 3)
        states, posterior = self.posterior(token_ids, attention_mask=attention_mask, key=first)
        latents = drawn(posterior, draw)
        memory = self.remembered(latents)
        logits = self.t5.decode(memory, decoder_token_ids, decoder_attention_mask=decoder_attention_mask, key=second)
        return T5VAEOutput(logits, latents, memory.states, states, posterior)

    def posterior(
        self, token_ids: Ids, *, attention_mask: Attended | None = None, key: Key = None
    ) -> tuple[Float[Array, "seq embed_dim"], Posterior]:
        """The encoder's hidden states, and what it says of the codes."""
        if attention_mask is None and self.hidden_id is not None:
            attention_mask = jnp.asarray(token_ids) != self.hidden_id
        with within("t5"):
            memory = self.t5.encode(token_ids, attention_mask=attention_mask, key=key)
        with within("encoder_to_latent"):
            return memory.states, self.encoder_to_latent(memory.states, memory.real)

    def encode(
        self, token_ids: Ids, *, attention_mask: Attended | None = None, key: Key = None
    ) -> Float[Array, "codes latent_dim"]:
        """The codes of a text: with a `key` drawn where they are variational (and with dropout), else the means."""
        first, draw = (None, None) if key is None else jax.random.split(key)
        posterior = self.posterior(token_ids, attention_mask=attention_mask, key=first)[1]
        return drawn(posterior, draw)

    def decode(
        self,
        latents: Float[Array, "codes latent_dim"],
        decoder_token_ids: TargetIds,
        *,
        decoder_attention_mask: TargetAttended | None = None,
        key: Key = None,
    ) -> Float[Array, "target vocab"]:
        """The scores of every next token, of codes."""
        memory = self.remembered(latents)
        return self.t5.decode(memory, decoder_token_ids, decoder_attention_mask=decoder_attention_mask, key=key)

    def remembered(self, latents: Float[Array, "codes latent_dim"]) -> Memory:
        """What the decoder looks at: the states that are rebuilt from codes, all of them.

        Raises a `ValueError` for another number of codes than a text has, or of numbers in a code.
        """
        self._expect_codes(jnp.shape(latents))
        with within("latent_to_decoder"):
            states = self.latent_to_decoder(latents)
        return Memory(states, jnp.ones(len(states), bool))

    def _expect_codes(self, found: tuple[int, ...]) -> None:
        bottleneck = self.encoder_to_latent
        count = bottleneck.latent_tokens if bottleneck.pooling == "first" else 1
        free = count is None or bottleneck.as_published
        if len(found) != 2 or found[1] != bottleneck.dense.out_features or not (free or found[0] == count):
            wanted = f"({'codes' if free else count}, {bottleneck.dense.out_features})"
            raise ValueError(
                f"The latents of a text are {wanted}, but these are {found}. jax.vmap over a batch of them."
            )

    def init_cache(self, latents: Float[Array, "codes latent_dim"], length: int) -> Cache:
        """An empty cache with room for `length` tokens of the decoder, which looks at these codes."""
        with within("t5"):
            return self.t5.init_cache(self.remembered(latents), length)

    def step(
        self, decoder_token_ids: TargetIds, cache: AbstractCache, *, last: bool = False, attention_mask: Any = None
    ) -> tuple[Float[Array, "scored vocab"], AbstractCache]:
        """See `T5.step`."""
        with within("t5"):
            return self.t5.step(decoder_token_ids, cache, last=last, attention_mask=attention_mask)

    def scores(self, hidden: Float[Array, "*axes embed_dim"]) -> Float[Array, "*axes vocab"]:
        """What the output makes of the decoder's hidden states."""
        return self.t5.scores(hidden)


def drawn(posterior: Posterior, key: Key) -> Float[Array, "codes latent_dim"]:
    """Codes: with a `key` mean + exp(log_variance / 2) * noise where they are variational, else the means; 0 for those
    of padding."""
    mean, log_variance, real = posterior
    if log_variance is not None and key is not None:
        mean = reparameterised(mean, log_variance, key=key)
    return jnp.where(jnp.broadcast_to(real[:, None], mean.shape), mean, 0)


def reparameterised(
    mean: Float[Array, "*shape"], log_variance: Float[Array, "*shape"], *, key: PRNGKeyArray
) -> Float[Array, "*shape"]:
    r"""$\mu + \sigma \epsilon$: a draw from $N(\mu, \sigma^2)$ through which gradients reach both.

    Computed in float32 at least; the result has the dtype of `mean`. Raises a `ValueError` where the shapes differ.
    Source: Kingma & Welling 2014, arXiv:1312.6114.
    """
    if mean.shape != log_variance.shape:
        raise ValueError(
            f"mean and log_variance must have one shape, but they are {mean.shape} and {log_variance.shape}."
        )
    dtype = wider(mean.dtype, log_variance.dtype, jnp.float32)
    noise = jax.random.normal(key, mean.shape, dtype)
    return (mean.astype(dtype) + jnp.exp(log_variance.astype(dtype) / 2) * noise).astype(mean.dtype)
