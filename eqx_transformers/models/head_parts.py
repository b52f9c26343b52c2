"""What heads are made of: each maps hidden states, or one vector of them, to logits."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..nn import ACTIVATIONS, Dropout, Embedding, LayerNorm, Linear
from ..nn._dtypes import wider
from ..nn._errors import within
from ..nn._keys import keyed
from .encoder_config import EncoderConfig


class Factors(NamedTuple):
    """What the scores of a vocabulary are computed from: `hidden @ weight.T + bias`."""

    hidden: Float[Array, "*axes width"]
    weight: Float[Array, "vocab_size width"]
    bias: Float[Array, " vocab_size"] | None


def matrix_of(output: eqx.Module) -> tuple[Array, Array | None]:
    """Weight and bias of an output layer that is a plain `Linear` or `Embedding`.

    Raises a `ValueError` for anything else: what wraps a matrix may compute something else than the matrix does.
    """
    if type(output) is Linear:
        return output.weight, output.bias
    if type(output) is Embedding:
        return output.weight, None
    raise ValueError(
        f"The output is a {type(output).__name__}, not a plain Linear or Embedding, so its scores cannot be computed"
        " from one matrix: merge what wraps it, or compute them all at once (a loss's chunk=None)."
    )


class MaskedLMHead(eqx.Module):
    """decoder(norm(activation(dense(x)))) + bias, where the tied decoder is the token embedding's `attend`.

    `dense` goes to the width of the embedding tables. `decoder` is None when tied: one leaf in the tree, in the
    embedding. `spare_bias` is an array of an untied file that the reference never computes with; it is kept so that it
    goes back, and has no effect.
    """

    dense: eqx.Module
    activation: Callable
    norm: eqx.Module
    decoder: eqx.Module | None
    bias: Float[Array, " vocab_size"]
    spare_bias: Float[Array, " vocab_size"] | None

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray):
        dense, decoder = jax.random.split(key)
        width, init = config.table_dim, config.initializer
        self.dense = Linear(config.embed_dim, width, init=init, key=dense)
        self.activation = ACTIVATIONS[config.prediction_activation or config.activation]
        self.norm = LayerNorm(width, eps=config.norm_eps)
        self.decoder = None if config.tied else Linear(width, config.vocab_size, use_bias=False, init=init, key=decoder)
        self.bias = jnp.zeros(config.vocab_size)
        self.spare_bias = jnp.zeros(config.vocab_size) if config.spare_bias else None

    def __call__(
        self, hidden: Float[Array, "*axes embed_dim"], tokens: eqx.Module
    ) -> Float[Array, "*axes {self.bias.shape[-1]}"]:
        x = self._transformed(hidden)
        with within("decoder"):
            logits = tokens.attend(x) if self.decoder is None else self.decoder(x)
        return logits + jnp.broadcast_to(self.bias.astype(logits.dtype), logits.shape)

    def factors(self, hidden: Float[Array, "*axes embed_dim"], tokens: eqx.Module) -> Factors:
        """The scores before they are computed; see `matrix_of`."""
        weight, bias = matrix_of(tokens if self.decoder is None else self.decoder)
        return Factors(self._transformed(hidden), weight, self.bias if bias is None else self.bias + bias)

    def _transformed(self, hidden: Float[Array, "*axes embed_dim"]) -> Float[Array, "*axes width"]:
        with within("dense"):
            x = self.activation(self.dense(hidden))
        with within("norm"):
            return self.norm(x)


class LMHead(eqx.Module):
    """decoder(x), where the tied decoder is the token embedding's `attend`: None, one leaf in the tree."""

    decoder: eqx.Module | None

    def __call__(self, hidden: Float[Array, "*axes embed_dim"], tokens: eqx.Module) -> Float[Array, "*axes vocab"]:
        with within("decoder"):
            return tokens.attend(hidden) if self.decoder is None else self.decoder(hidden)

    def factors(self, hidden: Float[Array, "*axes embed_dim"], tokens: eqx.Module) -> Factors:
        """The scores before they are computed; see `matrix_of`."""
        return Factors(hidden, *matrix_of(tokens if self.decoder is None else self.decoder))


def lm_head(config: Any, *, key: PRNGKeyArray) -> eqx.Module:
    """The head of a causal LM: an encoder's has a layer of its own before the output, a decoder's has not."""
    if isinstance(config, EncoderConfig):
        return MaskedLMHead(config, key=key)
    if config.tied:
        return LMHead(None)
    # Most decoders know neither word: no bias, and drawn as every other matrix is.
    bias, init = getattr(config, "head_bias", False), getattr(config, "head_initializer", config.initializer)
    return LMHead(Linear(config.embed_dim, config.vocab_size, use_bias=bias, init=init, key=key))


class ClassificationHead(eqx.Module):
    """output(dropout(activation(dense(input_dropout(x))))); without `dense`, output(dropout(x))."""

    input_dropout: Dropout
    dense: eqx.Module | None
    activation: Callable | None
    dropout: Dropout
    output: eqx.Module

    def __init__(
        self,
        embed_dim: int,
        labels: int,
        *,
        activation: str | None = None,
        input_rate: float = 0.0,
        rate: float = 0.0,
        use_bias: bool = True,
        init: Initializer,
        key: PRNGKeyArray,
    ):
        """With an `activation` there is a dense layer before it."""
        dense, output = jax.random.split(key)
        self.input_dropout = Dropout(input_rate)
        self.dense = None if activation is None else Linear(embed_dim, embed_dim, init=init, key=dense)
        self.activation = None if activation is None else ACTIVATIONS[activation]
        self.dropout = Dropout(rate)
        self.output = Linear(embed_dim, labels, use_bias=use_bias, init=init, key=output)

    def __call__(
        self, x: Float[Array, "*axes embed_dim"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes labels"]:
        first, second = (None, None) if key is None else jax.random.split(key)
        off = True if key is None else None
        if self.dense is not None and self.activation is not None:
            x = self.input_dropout(x, key=first, inference=off)
            with within("dense"):
                x = self.activation(keyed(self.dense, x, first))
        x = self.dropout(x, key=second, inference=off)
        with within("output"):
            return keyed(self.output, x, second)


def classification_head(config: Any, *, key: PRNGKeyArray) -> ClassificationHead:
    """The head of a classifier of whole sequences; a decoder's, whose config says nothing of it, is one matrix."""
    if not hasattr(config, "classifier"):
        return ClassificationHead(config.embed_dim, config.labels, use_bias=False, init=config.initializer, key=key)
    dense = config.classifier == "dense"
    rate = config.rate("classifier_dropout")
    return ClassificationHead(
        config.embed_dim,
        config.labels,
        activation=config.classifier_activation if dense else None,
        input_rate=rate if dense and config.classifier_input_dropout else 0.0,
        rate=rate,
        init=config.initializer,
        key=key,
    )


class Pooling(eqx.Module):
    """One vector of a text's hidden states: their mean over the keys that exist, or the first one; then unit length.

    The mean is taken in float32 at least. Source: Reimers & Gurevych 2019, arXiv:1908.10084.
    """

    kind: Literal["mean", "cls"] = eqx.field(static=True)
    normalize: bool = eqx.field(static=True)

    def __call__(
        self, hidden: Float[Array, "seq embed_dim"], keys: Bool[Array, " seq"] | None = None
    ) -> Float[Array, " embed_dim"]:
        wide = hidden.astype(wider(hidden.dtype, jnp.float32))
        keys = jnp.ones(hidden.shape[0], bool) if keys is None else keys
        if self.kind == "mean":
            weights = keys.astype(wide.dtype)
            x = weights @ wide / jnp.maximum(weights.sum(), 1e-9)
        else:
            x = wide[jnp.argmax(keys)]
        if self.normalize:
            # 1e-12 as in torch's normalize; the square root of the clamped square has a finite gradient at zero too.
            x = x / jnp.sqrt(jnp.maximum(jnp.square(x).sum(), 1e-24))
        return x.astype(hidden.dtype)
