"""What stands on an encoder or a decoder: each head is one composition, from a config or on a backbone that is there.

`Head(config, key=key)` builds both, `Head.of(encoder, labels, key=key)` puts a fresh head on an encoder.
A head is called as its encoder is: `**inputs` are the keyword arguments of `Encoder.__call__`.
"""

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from ..nn import AbstractCache, Cache
from ..nn._errors import within
from .encoder_config import EncoderConfig
from .head import DECODERS, EVERY, TWO_HALVES, Head, Input, Key, backbone_of, two
from .head_parts import ClassificationHead, Factors, MaskedLMHead, Pooling, classification_head, lm_head
from .inputs import ONE, Ids
from .roberta import Encoder


class MaskedLM(Head):
    """Scores of every vocabulary entry for every token: `seq vocab`."""

    backbone: Encoder
    head: eqx.Module
    config: EncoderConfig = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray, encoder: Encoder | None = None):
        body, head = jax.random.split(key)
        self.config, self.backbone = backbone_of(self, config, encoder, body, pooler=False)
        self.head = MaskedLMHead(config, key=head)

    def __call__(self, token_ids: Ids, *, key: Key = None, **inputs: Input) -> Float[Array, "seq vocab"]:
        return self.scores(self.hidden(token_ids, key, inputs))


class CausalLM(Head):
    """Scores of the next token at every token: `seq vocab`, on a decoder or on an encoder that is used as one.

    A decoder's output is one matrix, tied or not; an encoder's head is that of `MaskedLM`, and a config that is not
    causal is made so. There is no cross-attention.
    """

    backbone: Any
    head: eqx.Module
    config: Any = eqx.field(static=True)
    stands_on: ClassVar[tuple[type, ...]] = (EncoderConfig, *DECODERS)

    def __init__(self, config: Any, *, key: PRNGKeyArray, encoder: Any = None):
        body, head = jax.random.split(key)
        config = replace(config, causal=True) if isinstance(config, EncoderConfig) else config
        self.config, self.backbone = backbone_of(self, config, encoder, body, pooler=False)
        self.head = lm_head(config, key=head)

    def __call__(self, token_ids: Ids, *, key: Key = None, **inputs: Input) -> Float[Array, "seq vocab"]:
        return self.scores(self.hidden(token_ids, key, inputs))

    def init_cache(self, length: int) -> Cache:
        """An empty cache with room for `length` tokens; see `Decoder.init_cache`."""
        with within("backbone"):
            return self.backbone.init_cache(length)

    def step(
        self, token_ids: Ids, cache: AbstractCache, *, last: bool = False, **inputs: Input
    ) -> tuple[Float[Array, "scored vocab"], AbstractCache]:
        """The scores at tokens that come after those in `cache`, and the cache with theirs.

        `last` computes those at the last token alone, `1 vocab`. See `Decoder.step`.
        """
        with within("backbone"):
            hidden, cache = self.backbone.step(token_ids, cache, **inputs)
        return self.scores(hidden[-1:] if last else hidden), cache

    def factors(self, hidden: Float[Array, "*axes embed_dim"]) -> Factors:
        """The scores of hidden states before they are computed: for a loss that never holds all of them at once.

        Raises a `ValueError` where the output is not a plain `Linear` or `Embedding`.
        """
        with within("head"):
            if not hasattr(self.head, "factors"):
                found = type(self.head).__name__
                raise ValueError(
                    f"A {found} does not say what its scores are computed from (a loss's chunk=None works)."
                )
            return self.head.factors(hidden, self.backbone.embedding.tokens)


class PreTrainingLogits(NamedTuple):
    """What BERT is pre-trained on: the scores of a masked LM, and of whether B follows A (0) or is random (1)."""

    prediction: Float[Array, "*batch seq vocab"]
    next_sentence: Float[Array, "*batch 2"]


class PreTraining(Head):
    """BERT's two heads of pre-training: `PreTrainingLogits` of a pair of texts, told apart by `token_type_ids`."""

    backbone: Encoder
    head: eqx.Module
    next_sentence: eqx.Module
    config: EncoderConfig = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray, encoder: Encoder | None = None):
        body, head, pair = jax.random.split(key, 3)
        self.config, self.backbone = backbone_of(self, config, encoder, body, pooler=True)
        self.head = MaskedLMHead(config, key=head)
        self.next_sentence = ClassificationHead(config.embed_dim, 2, init=config.initializer, key=pair)

    def __call__(self, token_ids: Ids, *, key: Key = None, **inputs: Input) -> PreTrainingLogits:
        hidden = self.hidden(token_ids, key, inputs)
        prediction = self.scores(hidden)
        vector = self.vector(hidden, token_ids, inputs)
        with within("next_sentence"):
            return PreTrainingLogits(prediction, self.next_sentence(vector))


class NextSentencePredictor(Head):
    """Logits `2` of whether the second text follows the first (0) or is random (1)."""

    backbone: Encoder
    head: eqx.Module
    config: EncoderConfig = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray, encoder: Encoder | None = None):
        body, head = jax.random.split(key)
        self.config, self.backbone = backbone_of(self, config, encoder, body, pooler=True)
        self.head = ClassificationHead(config.embed_dim, 2, init=config.initializer, key=head)

    def __call__(self, token_ids: Ids, *, key: Key = None, **inputs: Input) -> Float[Array, "2"]:
        vector = self.vector(self.hidden(token_ids, key, inputs), token_ids, inputs)
        with within("head"):
            return self.head(vector)


class SequenceClassifier(Head):
    """Logits ` labels` of a whole sequence; with one label, a regression.

    On an encoder it reads the pooler or the first token, on a decoder the last token that is not padding (see
    `Decoder.summary`), on a T5 the decoder's state at the end token (see `T5Model.summary`).
    """

    backbone: Any
    head: eqx.Module
    config: Any = eqx.field(static=True)
    takes_labels: ClassVar[bool] = True
    stands_on: ClassVar[tuple[type, ...]] = EVERY

    def __init__(self, config: Any, *, key: PRNGKeyArray, encoder: Any = None):
        body, head = jax.random.split(key)
        reads = lambda config: config.classifier == "pooler"
        self.config, self.backbone = backbone_of(self, config, encoder, body, pooler=reads)
        self.head = classification_head(config, key=head)

    def __call__(self, token_ids: Ids, *, key: Key = None, **inputs: Input) -> Float[Array, " labels"]:
        body, head = two(key)
        vector = self.vector(self.hidden(token_ids, body, inputs), token_ids, inputs)
        with within("head"):
            return self.head(vector, key=head)


class TokenClassifier(Head):
    """Logits `seq labels`: a label for each token; of a T5, by its encoder."""

    backbone: Any
    head: eqx.Module
    config: Any = eqx.field(static=True)
    takes_labels: ClassVar[bool] = True
    stands_on: ClassVar[tuple[type, ...]] = (EncoderConfig, *TWO_HALVES)
    tokenwise: ClassVar[bool] = True

    def __init__(self, config: Any, *, key: PRNGKeyArray, encoder: Any = None):
        body, head = jax.random.split(key)
        self.config, self.backbone = backbone_of(self, config, encoder, body, pooler=False)
        rate, init = config.rate("token_dropout"), config.initializer
        self.head = ClassificationHead(config.embed_dim, config.labels, rate=rate, init=init, key=head)

    def __call__(self, token_ids: Ids, *, key: Key = None, **inputs: Input) -> Float[Array, "seq labels"]:
        body, head = two(key)
        hidden = self.hidden(token_ids, body, inputs)
        with within("head"):
            return self.head(hidden, key=head)


class QuestionAnswerer(Head):
    """Logits `seq 2`: column 0 scores each token as the answer's first, column 1 as its last.

    On a T5 the decoder reads the same tokens, one place on.
    """

    backbone: Any
    head: eqx.Module
    config: Any = eqx.field(static=True)
    stands_on: ClassVar[tuple[type, ...]] = (EncoderConfig, *TWO_HALVES)

    def __init__(self, config: Any, *, key: PRNGKeyArray, encoder: Any = None):
        body, head = jax.random.split(key)
        # The reference counts start and end as its two labels.
        self.config, self.backbone = backbone_of(self, replace(config, labels=2), encoder, body, pooler=False)
        rate, init = config.rate("answer_dropout"), config.initializer
        self.head = ClassificationHead(config.embed_dim, 2, rate=rate, init=init, key=head)

    def __call__(self, token_ids: Ids, *, key: Key = None, **inputs: Input) -> Float[Array, "seq 2"]:
        body, head = two(key)
        hidden = self.hidden(token_ids, body, inputs)
        with within("head"):
            return self.head(hidden, key=head)


class MultipleChoice(Head):
    """One score a choice: token ids and every other input are `choices seq`, the logits ` choices`.

    The choices run under a `jax.vmap` of their own inside the model; each draws its own dropout.
    """

    backbone: Encoder
    head: eqx.Module
    config: EncoderConfig = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray, encoder: Encoder | None = None):
        body, head = jax.random.split(key)
        reads = lambda config: config.choice != "dense"
        self.config, self.backbone = backbone_of(self, config, encoder, body, pooler=reads)
        self.head = ClassificationHead(
            config.embed_dim,
            1,
            activation=config.classifier_activation if config.choice == "dense" else None,
            rate=config.rate("choice_dropout"),
            init=config.initializer,
            key=head,
        )

    def __call__(
        self, token_ids: Integer[Array | np.ndarray, "choices seq"], *, key: Key = None, **inputs: Input
    ) -> Float[Array, " choices"]:
        """Raises a `ValueError` where an input does not have the choices of `token_ids`."""
        choices = jnp.shape(token_ids)[:1]
        for name, x in {"token_ids": token_ids, **inputs}.items():
            if x is not None and (jnp.ndim(x) not in (2, 3) or jnp.shape(x)[:1] != choices or choices == (0,)):
                raise ValueError(f"MultipleChoice: {name} must be 'choices seq', but it is {jnp.shape(x)}. {ONE}")
        keys = None if key is None else jax.random.split(key, jnp.shape(token_ids)[0])
        given: dict[str, Input] = {name: None if x is None else jnp.asarray(x) for name, x in inputs.items()}
        return jax.vmap(self.score)(jnp.asarray(token_ids), given, keys)

    def score(self, token_ids: Ids, inputs: dict[str, Input], key: Key) -> Float[Array, ""]:
        """The logit of one choice."""
        body, head = two(key)
        vector = self.vector(self.hidden(token_ids, body, inputs), token_ids, inputs)
        with within("head"):
            return self.head(vector, key=head)[0]


class Discriminator(Head):
    """Logits ` seq` of whether each token was replaced: ELECTRA's head of pre-training."""

    backbone: Encoder
    head: eqx.Module
    config: EncoderConfig = eqx.field(static=True)

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray, encoder: Encoder | None = None):
        body, head = jax.random.split(key)
        self.config, self.backbone = backbone_of(self, config, encoder, body, pooler=False)
        init = config.initializer
        self.head = ClassificationHead(config.embed_dim, 1, activation=config.activation, init=init, key=head)

    def __call__(self, token_ids: Ids, *, key: Key = None, **inputs: Input) -> Float[Array, " seq"]:
        hidden = self.hidden(token_ids, key, inputs)
        with within("head"):
            return self.head(hidden)[:, 0]


class SentenceEmbedder(Head):
    """One vector ` embed_dim` of a text, as sentence-transformers makes it."""

    backbone: Encoder
    pooling: eqx.Module
    config: EncoderConfig = eqx.field(static=True)
    draws: ClassVar[bool] = False

    def __init__(self, config: EncoderConfig, *, key: PRNGKeyArray, encoder: Encoder | None = None):
        self.config, self.backbone = backbone_of(self, config, encoder, key, pooler=lambda config: config.pooler)
        self.pooling = Pooling(config.pooling, config.normalize)

    def __call__(
        self,
        token_ids: Ids,
        *,
        attention_mask: Integer[Array | np.ndarray, " seq"] | Bool[Array | np.ndarray, " seq"] | None = None,
        key: Key = None,
        **inputs: Input,
    ) -> Float[Array, " embed_dim"]:
        """`attention_mask` must be ` seq` here: it also says which hidden states are averaged."""
        hidden = self.hidden(token_ids, key, {"attention_mask": attention_mask, **inputs})
        keys = None if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        if keys is None and self.backbone.hidden_id is not None:
            keys = jnp.asarray(token_ids) != self.backbone.hidden_id
        if keys is not None and keys.ndim != 1:
            raise ValueError(f"SentenceEmbedder: attention_mask must be 'seq' (it is averaged over), not {keys.shape}.")
        with within("pooling"):
            return self.pooling(hidden, keys)


# By name, for all who list them: files, command lines, tests.
HEADS: dict[str, type[Head]] = {
    one.__name__: one
    for one in (
        MaskedLM,
        CausalLM,
        PreTraining,
        NextSentencePredictor,
        SequenceClassifier,
        TokenClassifier,
        QuestionAnswerer,
        MultipleChoice,
        Discriminator,
        SentenceEmbedder,
    )
}
