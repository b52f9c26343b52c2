"""What stands on an encoder: each head is one composition, made from a config or put on an encoder that is there.

A head is called as its encoder is: `**inputs` are the keyword arguments of `Encoder.__call__`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from ..nn import ACTIVATIONS, LayerNorm, Linear
from ..nn._dtypes import wider
from ..nn._errors import within
from .roberta import Encoder, EncoderConfig, Pooler, as_part, normal

Ids = Integer[Array | np.ndarray, " seq"]
Input = Integer[Array | np.ndarray, "..."] | Bool[Array | np.ndarray, "..."] | None


class MaskedLMHead(eqx.Module):
    """decoder(norm(activation(dense(x)))) + bias, where the tied decoder is the token embedding's `attend`.

    `decoder` is None when tied: one leaf in the tree, in the embedding. `spare_bias` is an array of an untied file
    that the reference never computes with; it is kept so that it goes back, and has no effect.
    """

    dense: eqx.Module
    activation: Callable
    norm: eqx.Module
    decoder: eqx.Module | None
    bias: Float[Array, " vocab_size"]
    spare_bias: Float[Array, " vocab_size"] | None

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray):
        dense, decoder = jax.random.split(key)
        linear = lambda outer, use_bias, k: Linear(
            config.embed_dim, outer, use_bias=use_bias, init=normal(config), key=k
        )
        self.dense = linear(config.embed_dim, True, dense)
        self.activation = ACTIVATIONS[config.prediction_activation or config.activation]
        self.norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.decoder = None if config.tied else linear(config.vocab_size, False, decoder)
        self.bias = jnp.zeros(config.vocab_size)
        self.spare_bias = jnp.zeros(config.vocab_size) if config.spare_bias else None

    def __call__(
        self, hidden: Float[Array, "*axes embed_dim"], tokens: eqx.Module
    ) -> Float[Array, "*axes {self.bias.shape[-1]}"]:
        with within("dense"):
            x = self.activation(self.dense(hidden))
        with within("norm"):
            x = self.norm(x)
        with within("decoder"):
            logits = tokens.attend(x) if self.decoder is None else self.decoder(x)
        return logits + jnp.broadcast_to(self.bias.astype(logits.dtype), logits.shape)


class MaskedLM(eqx.Module):
    """Scores of every vocabulary entry for every token: `seq vocab`."""

    backbone: Encoder
    head: eqx.Module
    config: EncoderConfig = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray, encoder: Encoder | None = None):
        body, head = jax.random.split(key)
        self.config = replace(config, pooler=False)
        self.backbone = as_part(Encoder(self.config, key=body) if encoder is None else encoder, None)
        self.head = MaskedLMHead(config, key=head)

    @classmethod
    def of(cls, encoder: Encoder, labels: int | None = None, *, key: PRNGKeyArray) -> "MaskedLM":
        """A fresh masked-LM head on `encoder`; `labels` has no meaning here and must be None."""
        return cls(_config(encoder, labels, takes_labels=False), key=key, encoder=encoder)

    def __call__(
        self, token_ids: Ids, *, key: PRNGKeyArray | None = None, **inputs: Input
    ) -> Float[Array, "seq vocab"]:
        with within("backbone"):
            hidden = self.backbone(token_ids, key=key, **inputs)
        with within("head"):
            return self.head(hidden, self.backbone.embedding.tokens)


class ClassificationHead(eqx.Module):
    """output(dropout(tanh(dense(dropout(x))))) of one vector; without `dense`, output(dropout(x))."""

    dense: eqx.Module | None
    output: eqx.Module
    dropout: eqx.nn.Dropout

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray):
        dense, output = jax.random.split(key)
        linear = lambda outer, k: Linear(config.embed_dim, outer, init=normal(config), key=k)
        self.dense = linear(config.embed_dim, dense) if config.classifier == "dense" else None
        self.output = linear(config.labels, output)
        rate = config.dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = eqx.nn.Dropout(rate)

    def __call__(self, x: Float[Array, " embed_dim"], *, key: PRNGKeyArray | None = None) -> Float[Array, " labels"]:
        first, second = (None, None) if key is None else jax.random.split(key)
        if self.dense is not None:
            x = self.dropout(x, key=first, inference=True if key is None else None)
            with within("dense"):
                x = jnp.tanh(self.dense(x))
        x = self.dropout(x, key=second, inference=True if key is None else None)
        with within("output"):
            return self.output(x)


class SequenceClassifier(eqx.Module):
    """Logits ` labels` of a whole sequence; with one label, a regression."""

    backbone: Encoder
    head: eqx.Module
    config: EncoderConfig = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray, encoder: Encoder | None = None):
        body, pooler, head = jax.random.split(key, 3)
        reads_pooler = config.classifier == "pooler"
        self.config = replace(config, pooler=reads_pooler)
        if encoder is None:
            encoder = Encoder(self.config, key=body)
        kept = encoder.pooler if reads_pooler else None
        self.backbone = as_part(encoder, Pooler(config, key=pooler) if reads_pooler and kept is None else kept)
        self.head = ClassificationHead(config, key=head)

    @classmethod
    def of(cls, encoder: Encoder, labels: int, *, key: PRNGKeyArray) -> "SequenceClassifier":
        """A fresh classifier of `labels` classes on `encoder` (1: a regression), and its pooler if need be."""
        return cls(_config(encoder, labels, takes_labels=True), key=key, encoder=encoder)

    def __call__(self, token_ids: Ids, *, key: PRNGKeyArray | None = None, **inputs: Input) -> Float[Array, " labels"]:
        body, head = (None, None) if key is None else jax.random.split(key)
        with within("backbone"):
            hidden = self.backbone(token_ids, key=body, **inputs)
        with within("backbone.pooler"):
            x = hidden[0] if self.backbone.pooler is None else self.backbone.pooler(hidden)
        with within("head"):
            return self.head(x, key=head)


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


class SentenceEmbedder(eqx.Module):
    """One vector ` embed_dim` of a text, as sentence-transformers makes it."""

    backbone: Encoder
    pooling: eqx.Module
    config: EncoderConfig = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray, encoder: Encoder | None = None):
        encoder = Encoder(config, key=key) if encoder is None else encoder
        self.config = config
        self.backbone = as_part(encoder, encoder.pooler)
        self.pooling = Pooling(config.pooling, config.normalize)

    @classmethod
    def of(cls, encoder: Encoder, labels: int | None = None, *, key: PRNGKeyArray | None = None) -> "SentenceEmbedder":
        """The pooling of the encoder's config on `encoder`. Nothing is drawn from `key`; `labels` must be None."""
        config = _config(encoder, labels, takes_labels=False)
        return cls(config, key=jax.random.key(0) if key is None else key, encoder=encoder)

    def __call__(
        self,
        token_ids: Ids,
        *,
        attention_mask: Integer[Array | np.ndarray, " seq"] | Bool[Array | np.ndarray, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
        **inputs: Input,
    ) -> Float[Array, " embed_dim"]:
        """`attention_mask` must be ` seq` here: it also says which hidden states are averaged."""
        with within("backbone"):
            hidden = self.backbone(token_ids, attention_mask=attention_mask, key=key, **inputs)
        keys = None if attention_mask is None else jnp.asarray(attention_mask) != 0
        if keys is not None and keys.ndim != 1:
            raise ValueError(f"SentenceEmbedder: attention_mask must be 'seq' (it is averaged over), not {keys.shape}.")
        with within("pooling"):
            return self.pooling(hidden, keys)


def _config(encoder: Encoder, labels: int | None, *, takes_labels: bool) -> EncoderConfig:
    if encoder.config is None:
        raise ValueError(
            "This encoder is a part of another model, which has the config:"
            " Head(replace(model.config, labels=…), encoder=model.backbone, key=key) puts another head on it."
        )
    if takes_labels == (labels is None):
        raise ValueError(f"labels = {labels}: " + ("say how many." if takes_labels else "this head has none."))
    return encoder.config if labels is None else replace(encoder.config, labels=labels)
