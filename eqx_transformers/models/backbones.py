"""Which backbone a config describes, and a backbone as a part of a model."""

from typing import Any, TypeVar

import equinox as eqx

from ..nn._trees import rebuilt
from .encoder_config import EncoderConfig
from .functional import FunctionalConfig, FunctionalTransformer
from .gpt2 import GPT2, GPT2Config
from .llama import Llama, LlamaConfig
from .roberta import Encoder
from .t5 import T5Encoder, T5Model
from .t5_config import T5Config
from .transformer import Transformer, TransformerConfig

B = TypeVar("B", bound=eqx.Module)

BACKBONES: dict[type, Any] = {
    EncoderConfig: Encoder,
    GPT2Config: GPT2,
    LlamaConfig: Llama,
    TransformerConfig: Transformer,
    FunctionalConfig: FunctionalTransformer,
    T5Config: T5Model,
}
# Of models with two halves, the one that a head for each of the tokens stands on.
ENCODERS: dict[type, Any] = {T5Config: T5Encoder}


def part_of(backbone: B, **changed: Any) -> B:
    """The backbone as a part of a model: without a config of its own, which the model carries, and so changed."""
    return rebuilt(backbone, {"config": None, **changed})
