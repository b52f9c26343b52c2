"""What all heads share: a backbone below, the config of the whole, and the way onto a backbone that is there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from ..nn._errors import within
from .backbones import BACKBONES, part_of
from .encoder_config import EncoderConfig
from .inputs import Ids
from .roberta import Encoder, Pooler

Input = Integer[Array | np.ndarray, "..."] | Bool[Array | np.ndarray, "..."] | None
Key = PRNGKeyArray | None
H = TypeVar("H", bound="Head")
DECODERS = tuple(kind for kind in BACKBONES.values() if kind is not Encoder)
_DECODERS = "On a decoder, whose tokens see nothing that follows them, stand CausalLM and SequenceClassifier."


class Head(eqx.Module):
    """What all heads share: the encoder or decoder in `backbone`, the config of the whole, and the way onto a backbone.

    `on_decoders` says whether the head is one of decoders too.
    """

    backbone: eqx.AbstractVar[Any]
    config: eqx.AbstractVar[Any]
    takes_labels: ClassVar[bool] = False
    on_decoders: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    @classmethod
    def of(cls: type[H], encoder: Any, labels: int | None = None, *, key: Key = None) -> H:
        """This head on `encoder` (or a decoder), its own parameters drawn from `key`.

        `labels` says how many where the head has labels (one of a `SequenceClassifier`: a regression), and is None
        where it has none. Raises a `ValueError` otherwise, for a head that is none of this kind of backbone, and for a
        backbone that is a part of another model.
        """
        kinds = tuple(BACKBONES.values()) if cls.on_decoders else (Encoder,)
        if not isinstance(encoder, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            found = f"expected an {expected}, but it is {type(encoder).__name__}"
            raise ValueError(f"{cls.__name__}.of: {found}. {_DECODERS if type(encoder) in DECODERS else ''}".rstrip())
        if encoder.config is None:
            raise ValueError(
                "This encoder is a part of another model, which has the config:"
                " Head(replace(model.config, labels=…), encoder=model.backbone, key=key) puts another head on it."
            )
        if cls.takes_labels == (labels is None):
            raise ValueError(f"labels = {labels}: " + ("say how many." if cls.takes_labels else "this head has none."))
        if labels is not None and (isinstance(labels, bool) or not isinstance(labels, int)):
            raise ValueError(f"labels = {labels!r}: say how many, as a whole number.")
        if key is None and cls.draws:
            raise ValueError(f"{cls.__name__} has parameters of its own to draw: pass key=jax.random.key(…).")
        config = encoder.config if labels is None else replace(encoder.config, labels=labels)
        return cls(config, key=jax.random.key(0) if key is None else key, encoder=encoder)

    def hidden(self, token_ids: Ids, key: Key, inputs: dict[str, Input]) -> Float[Array, "seq embed_dim"]:
        """The encoder's hidden states."""
        with within("backbone"):
            return self.backbone(token_ids, key=key, **inputs)

    def scores(self, hidden: Float[Array, "seq embed_dim"]) -> Float[Array, "seq vocab"]:
        """What a language-model head makes of them: it may score against the token embedding."""
        with within("head"):
            return self.head(hidden, self.backbone.embedding.tokens)

    def vector(
        self, hidden: Float[Array, "seq embed_dim"], token_ids: Ids, inputs: dict[str, Input]
    ) -> Float[Array, " embed_dim"]:
        """What a sentence-level head reads of them."""
        with within("backbone"):
            return self.backbone.summary(hidden, token_ids, **inputs)


def backbone_of(
    head: Head, config: Any, backbone: Any, key: PRNGKeyArray, *, pooler: Callable[[EncoderConfig], bool] | bool
) -> tuple[Any, Any]:
    """The config of a model whose encoder has a pooler or none, and that encoder: `backbone`, or a new one.

    Of a config of decoders, which have no poolers, its backbone. Raises a `ValueError` where the head is one of
    encoders alone.
    """
    kinds = tuple(BACKBONES) if head.on_decoders else (EncoderConfig,)
    if not isinstance(config, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        found = f"expected an {expected}, but the config is a {type(config).__name__}"
        raise ValueError(f"{type(head).__name__}: {found}. {_DECODERS if type(config) in BACKBONES else ''}".rstrip())
    if not isinstance(config, EncoderConfig):
        return config, part_of(BACKBONES[type(config)](config, key=key) if backbone is None else backbone)
    pooler = pooler(config) if callable(pooler) else pooler
    config = replace(config, pooler=pooler)
    encoder = Encoder(config, key=key) if backbone is None else backbone
    kept = encoder.pooler if pooler else None
    if pooler and kept is None:
        kept = Pooler(config, key=jax.random.fold_in(key, 1))
    return config, part_of(encoder, pooler=kept, causal=config.causal)


def two(key: Key) -> tuple[Key, Key]:
    """A key for the encoder and one for what stands on it; none of none."""
    return (None, None) if key is None else tuple(jax.random.split(key))
