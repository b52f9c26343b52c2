"""T5 and its line: an encoder and a decoder whose attention knows where tokens stand by their distance alone.

T5 1.0 and 1.1, Flan-T5, ByT5, mT5 and UMT5 are one implementation; the differences are facts of the config.
Sources: Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020, arXiv:2002.05202; Xue et al. 2021, arXiv:2010.11934 and
arXiv:2105.13626; Chung et al. 2023, arXiv:2304.09151.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from ..nn import AbstractCache, Cache, Embedding, Linear
from ..nn._errors import error_if, within
from .decoder import dtype_of, real_of
from .head_parts import Factors, matrix_of
from .inputs import Attended, Ids, TargetAttended, TargetIds, mask_of, whole_numbers
from .t5_config import T5Config
from .t5_parts import Memory, T5Half, expect_one

Key = PRNGKeyArray | None


class Reader(eqx.Module):
    """What all of T5's models share: a table of tokens and an encoder that reads them."""

    embedding: eqx.AbstractVar[eqx.Module]
    encoder: eqx.AbstractVar[T5Half]

    @property
    def room(self) -> None:
        """How many tokens a sequence may have: distances have no end."""
        return None

    @property
    def hidden_id(self) -> None:
        """Without a mask, all tokens are seen."""
        return None

    def encoded(self, token_ids: Ids, attention_mask: Attended | None, key: Key) -> Float[Array, "seq embed_dim"]:
        """The encoder's hidden states."""
        ids: Any = whole_numbers("token_ids", token_ids)
        mask = mask_of(attention_mask, None, len(ids), causal=False)
        with within("embedding"):
            x = self.embedding(ids)
        with within("encoder"):
            return self.encoder(x, mask, key=key)


class T5Encoder(Reader):
    """Token ids -> hidden states `seq embed_dim`: the first half of a T5. One sequence; `jax.vmap` it."""

    embedding: eqx.Module
    encoder: T5Half
    padding_id: int | None = eqx.field(static=True)
    config: Any = eqx.field(static=True)

    def __init__(self, config: T5Config, *, key: PRNGKeyArray):
        tokens, encoder = jax.random.split(key)
        self.embedding = table(config, key=tokens)
        self.encoder = T5Half(config, decoder=False, key=encoder)
        self.padding_id = config.padding_id
        self.config = config

    def __call__(
        self, token_ids: Ids, *, attention_mask: Attended | None = None, key: Key = None
    ) -> Float[Array, "seq embed_dim"]:
        """`attention_mask`: 1 or True where a key exists (` seq`) or may be seen (`seq seq`: queries, keys).

        `key` switches dropout on. Raises a `ValueError` for a batch (`jax.vmap` the model) and for floating-point ids
        or masks.
        """
        return self.encoded(token_ids, attention_mask, key)


class EncoderDecoder(Reader):
    """What the two models with both halves share: `embedding` serves both.

    A decoder's input is what stands before each token that it predicts: it begins with `start_id`.
    """

    decoder: eqx.AbstractVar[T5Half]
    padding_id: eqx.AbstractVar[int | None]
    start_id: eqx.AbstractVar[int | None]
    config: eqx.AbstractVar[Any]

    @property
    def memory_axes(self) -> Any:
        """How many axes each array has that `encode` gives."""
        return Memory(2, 1)  # pyright: ignore[reportArgumentType]

    @property
    def counts_padding(self) -> bool:
        """Whether it matters to the encoder where padding stands, and how much: only distances do, to the text."""
        return False

    def encode(self, token_ids: Ids, *, attention_mask: Attended | None = None, key: Key = None) -> Memory:
        """What the decoder looks at: the encoder's hidden states, and which tokens exist.

        `attention_mask` is ` seq`: 1 or True where a token exists.
        """
        states = self.encoded(token_ids, attention_mask, key)
        return Memory(states, real_of(attention_mask, len(states)))

    def decoded(
        self, memory: Memory, decoder_token_ids: TargetIds, decoder_attention_mask: TargetAttended | None, key: Key
    ) -> Float[Array, "target embed_dim"]:
        """The decoder's hidden states."""
        expect_one(memory)
        ids: Any = whole_numbers("decoder_token_ids", decoder_token_ids)
        mask = mask_of(decoder_attention_mask, None, len(ids), causal=True)
        with within("embedding"):
            x = self.embedding(ids)
        with within("decoder"):
            return self.decoder(x, mask, memory, key=key)

    def init_cache(self, memory: Memory, length: int) -> Cache:
        """An empty cache with room for `length` tokens of the decoder, and what each layer needs of the memory.

        Raises a `ValueError` for stacked blocks: a cache runs on a tuple of blocks, one cache a layer.
        """
        expect_one(memory)
        with within("decoder"):
            return self.decoder.init_cache(memory, length, dtype_of(self.embedding))

    def advanced(
        self, decoder_token_ids: TargetIds, cache: AbstractCache, attention_mask: TargetAttended | None
    ) -> tuple[Float[Array, "target embed_dim"], AbstractCache]:
        """Hidden states of the decoder's tokens that come after those in `cache`, and the cache with theirs."""
        ids: Any = whole_numbers("decoder_token_ids", decoder_token_ids)
        with within("embedding"):
            x = self.embedding(ids)
        with within("decoder"):
            return self.decoder.step(x, cache, real_of(attention_mask, len(ids)))


class T5Model(EncoderDecoder):
    """Token ids of both sides -> the decoder's hidden states `target embed_dim`. One sequence; `jax.vmap` it."""

    embedding: eqx.Module
    encoder: T5Half
    decoder: T5Half
    padding_id: int | None = eqx.field(static=True)
    start_id: int | None = eqx.field(static=True)
    end_id: int | None = eqx.field(static=True)
    config: Any = eqx.field(static=True)

    def __init__(self, config: T5Config, *, key: PRNGKeyArray):
        tokens, encoder, decoder = jax.random.split(key, 3)
        self.embedding = table(config, key=tokens)
        self.encoder = T5Half(config, decoder=False, key=encoder)
        self.decoder = T5Half(config, decoder=True, key=decoder)
        self.padding_id = config.padding_id
        self.start_id = config.start_id
        self.end_id = config.end_id
        self.config = config

    def __call__(
        self,
        token_ids: Ids,
        decoder_token_ids: TargetIds | None = None,
        *,
        attention_mask: Attended | None = None,
        decoder_attention_mask: TargetAttended | None = None,
        key: Key = None,
    ) -> Float[Array, "target embed_dim"]:
        """Without `decoder_token_ids` the decoder reads the encoder's, moved one place on, as heads of this model do.

        Masks: 1 or True where a token exists; the decoder's may be `target target`. `key` switches dropout on.
        """
        first, second = (None, None) if key is None else jax.random.split(key)
        memory = self.encode(token_ids, attention_mask=attention_mask, key=first)
        ids = shifted(token_ids, self.start_id) if decoder_token_ids is None else decoder_token_ids
        return self.decoded(memory, ids, decoder_attention_mask, second)

    def step(
        self, decoder_token_ids: TargetIds, cache: AbstractCache, *, attention_mask: TargetAttended | None = None
    ) -> tuple[Float[Array, "target embed_dim"], AbstractCache]:
        """The hidden states of tokens that come after those in `cache`, and the cache with theirs."""
        return self.advanced(decoder_token_ids, cache, attention_mask)

    def summary(
        self, hidden: Float[Array, "target embed_dim"], token_ids: Ids, **inputs: Any
    ) -> Float[Array, " embed_dim"]:
        """What a classifier of whole sequences reads: the state at the last `end_id` of the sequence.

        A sequence without one is a `ValueError` where the ids are known while tracing, an error at run time under
        `EQX_TRANSFORMERS_CHECK=1`, and otherwise gives NaN.
        """
        if self.end_id is None:
            raise ValueError("The config names no end_id, the token whose state a classifier reads; T5's own is 1.")
        ends = jnp.asarray(token_ids) == self.end_id
        if len(hidden) != len(ends):
            raise ValueError(
                f"A classifier reads the state of one of {len(ends)} tokens, but the decoder has {len(hidden)}: leave"
                " decoder_token_ids out."
            )
        said = f"token_ids must hold the end token, {self.end_id}: a classifier reads its state."
        if not isinstance(ends, jax.core.Tracer) and not ends.any():
            raise ValueError(said)
        hidden = error_if(hidden, ~ends.any(), said)
        last = jnp.max(jnp.where(ends, jnp.arange(len(hidden)), 0))
        return jnp.where(ends.any(), hidden[last], jnp.nan)


class T5(EncoderDecoder):
    """Token ids of both sides -> the scores of every next token, `target vocab`. One sequence; `jax.vmap` it.

    `head` is None where the output scores against the token embedding: one leaf in the tree. With `scaled`, the states
    are divided by the root of `embed_dim` before that.
    """

    embedding: eqx.Module
    encoder: T5Half
    decoder: T5Half
    head: eqx.Module | None
    scaled: bool = eqx.field(static=True)
    padding_id: int | None = eqx.field(static=True)
    start_id: int | None = eqx.field(static=True)
    config: Any = eqx.field(static=True)

    def __init__(self, config: T5Config, *, key: PRNGKeyArray):
        tokens, encoder, decoder, head = jax.random.split(key, 4)
        self.embedding = table(config, key=tokens)
        self.encoder = T5Half(config, decoder=False, key=encoder)
        self.decoder = T5Half(config, decoder=True, key=decoder)
        init = config.drawn(1.0)
        dense = lambda: Linear(config.embed_dim, config.vocab_size, use_bias=False, init=init, key=head)
        self.head = None if config.tied else dense()
        self.scaled = config.scaled
        self.padding_id = config.padding_id
        self.start_id = config.start_id
        self.config = config

    def __call__(
        self,
        token_ids: Ids,
        decoder_token_ids: TargetIds,
        *,
        attention_mask: Attended | None = None,
        decoder_attention_mask: TargetAttended | None = None,
        key: Key = None,
    ) -> Float[Array, "target vocab"]:
        """Masks: 1 or True where a token exists; the decoder's may be `target target`. `key` switches dropout on."""
        first, second = (None, None) if key is None else jax.random.split(key)
        memory = self.encode(token_ids, attention_mask=attention_mask, key=first)
        return self.decode(memory, decoder_token_ids, decoder_attention_mask=decoder_attention_mask, key=second)

    def decode(
        self,
        memory: Memory,
        decoder_token_ids: TargetIds,
        *,
        decoder_attention_mask: TargetAttended | None = None,
        key: Key = None,
    ) -> Float[Array, "target vocab"]:
        """The scores of every next token, with what `encode` gave, or anything else of its shape."""
        return self.scores(self.decoded(memory, decoder_token_ids, decoder_attention_mask, key))

    def step(
        self,
        decoder_token_ids: TargetIds,
        cache: AbstractCache,
        *,
        last: bool = False,
        attention_mask: TargetAttended | None = None,
    ) -> tuple[Float[Array, "scored vocab"], AbstractCache]:
        """The scores at tokens that come after those in `cache`, and the cache with theirs.

        `last` computes those at the last token alone, `1 vocab`. See `Decoder.step`.
        """
        hidden, cache = self.advanced(decoder_token_ids, cache, attention_mask)
        return self.scores(hidden[-1:] if last else hidden), cache

    def scores(self, hidden: Float[Array, "*axes embed_dim"]) -> Float[Array, "*axes vocab"]:
        """What the output makes of the decoder's hidden states."""
        hidden = self._scaled(hidden)
        with within("head"):
            return self.embedding.attend(hidden) if self.head is None else self.head(hidden)

    def factors(self, hidden: Float[Array, "*axes embed_dim"]) -> Factors:
        """The scores before they are computed; see `matrix_of`."""
        return Factors(self._scaled(hidden), *matrix_of(self.embedding if self.head is None else self.head))

    def _scaled(self, hidden: Float[Array, "*axes embed_dim"]) -> Float[Array, "*axes embed_dim"]:
        return hidden * hidden.shape[-1] ** -0.5 if self.scaled else hidden


def table(config: T5Config, *, key: PRNGKeyArray) -> Embedding:
    return Embedding(config.vocab_size, config.embed_dim, init=config.drawn(1.0), key=key)


def shifted(token_ids: Integer[Array | np.ndarray, " seq"], start_id: int | None) -> Integer[Array, " seq"]:
    """What a decoder reads to predict `token_ids`: these, one place on, behind `start_id`.

    Raises a `ValueError` where there is no start_id.
    """
    if start_id is None:
        raise ValueError("The config names no start_id, with which the decoder's input begins; T5's own is 0.")
    ids: Any = whole_numbers("token_ids", token_ids)
    return jnp.concatenate([jnp.full(1, start_id, ids.dtype), ids[:-1]])
