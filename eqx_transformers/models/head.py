"""What all heads share: a backbone below, the config of the whole, and the way onto a backbone that is there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from ..nn._errors import within
from .backbones import BACKBONES, ENCODERS, part_of
from .encoder_config import EncoderConfig
from .inputs import Ids
from .roberta import Encoder, Pooler

Input = Integer[Array | np.ndarray, "..."] | Bool[Array | np.ndarray, "..."] | None
Key = PRNGKeyArray | None
H = TypeVar("H", bound="Head")
DECODERS = tuple(kind for kind in BACKBONES if kind not in (EncoderConfig, *ENCODERS))
EVERY = tuple(BACKBONES)
TWO_HALVES = tuple(ENCODERS)


class Head(eqx.Module):
    """What all heads share: the encoder or decoder in `backbone`, the config of the whole, and the way onto a backbone.

    `stands_on`: the kinds of config that describe what it may stand on. `tokenwise`: of models with two halves, it
    stands on the encoder alone.
    """

    backbone: eqx.AbstractVar[Any]
    config: eqx.AbstractVar[Any]
    takes_labels: ClassVar[bool] = False
    stands_on: ClassVar[tuple[type, ...]] = (EncoderConfig,)
    tokenwise: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    @classmethod
    def of(cls: type[H], encoder: Any, labels: int | None = None, *, key: Key = None) -> H:
        """This head on `encoder` (or a decoder), its own parameters drawn from `key`.

        `labels` says how many where the head has labels (one of a `SequenceClassifier`: a regression), and is None
        where it has none. Raises a `ValueError` otherwise, for a head that is none of this kind of backbone, and for a
        backbone that is a part of another model.
        """
        kinds = tuple(cls.kind_of(config) for config in cls.stands_on)
        if not isinstance(encoder, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            found = f"expected an {expected}, but it is {type(encoder).__name__}"
            raise ValueError(f"{cls.__name__}.of: {found}. {_standing_on(type(encoder))}".rstrip())
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

    @classmethod
    def kind_of(cls, config: type) -> Any:
        """The class that this head stands on, of a model that this kind of config describes."""
        return ENCODERS.get(config, BACKBONES[config]) if cls.tokenwise else BACKBONES[config]

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

    Of a config of anything else, which has no pooler, its backbone. Raises a `ValueError` where the head does not stand
    on such a model.
    """
    if not isinstance(config, head.stands_on):
        expected = " or ".join(kind.__name__ for kind in head.stands_on)
        found = f"expected an {expected}, but the config is a {type(config).__name__}"
        raise ValueError(f"{type(head).__name__}: {found}. {_standing_on(BACKBONES.get(type(config)))}".rstrip())
    if not isinstance(config, EncoderConfig):
        return config, part_of(head.kind_of(type(config))(config, key=key) if backbone is None else backbone)
    pooler = pooler(config) if callable(pooler) else pooler
    config = replace(config, pooler=pooler)
    encoder = Encoder(config, key=key) if backbone is None else backbone
    kept = encoder.pooler if pooler else None
    if pooler and kept is None:
        kept = Pooler(config, key=jax.random.fold_in(key, 1))
    return config, part_of(encoder, pooler=kept, causal=config.causal)


def _standing_on(kind: Any) -> str:
    """Which heads there are for this class of backbones."""
    heads = Head.__subclasses__()
    names = [head.__name__ for head in heads if any(head.kind_of(config) is kind for config in head.stands_on)]
    return f"On a {kind.__name__} stand {', '.join(names)}." if names else ""


def two(key: Key) -> tuple[Key, Key]:
    """A key for the encoder and one for what stands on it; none of none."""
    return (None, None) if key is None else tuple(jax.random.split(key))
