"""What T5 and its kin differ in, as data: one config class, and the facts of each family."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from jax.nn.initializers import Initializer

from ..nn._shapes import normal
from .facts import expect_activations, expect_at_least, expect_rates, expect_words


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """What decides the function that a model of T5's line computes: `T5_V1`, `T5_V1_1`, `MT5`, `UMT5` are such facts.

    - `head_dim`: width of one head, whatever `embed_dim / num_heads` is.
    - `num_layers`, `num_decoder_layers`: blocks of the encoder and of the decoder; None means as many.
    - `num_buckets`, `max_distance`: see `nn.RelativeBias`; `bias_per_layer`: every block has one of its own, or the
      first one's serves all.
    - `gated`: the feed-forward network is a `GatedMLP`.
    - `tied`: the output scores against the token embedding. `scaled`: what it scores is divided by the root of
      `embed_dim` first.
    - `dropout`: of embeddings, attention weights, inside the feed-forward network, of what is added to the stream, and
      of both stacks' results; `classifier_dropout`: of a classifier.
    - `start_id`: what a decoder's input begins with. `end_id`: the end of a sequence, whose state a classifier reads.
    - `init_factor`: multiplies every deviation that a matrix is drawn with.
    """

    family: Literal["t5", "mt5", "umt5"]
    vocab_size: int = 32128
    embed_dim: int = 512
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 2048
    num_buckets: int = 32
    max_distance: int = 128
    bias_per_layer: bool = False
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    tied: bool = True
    scaled: bool = True
    dropout: float = 0.1
    classifier_dropout: float = 0.0
    padding_id: int | None = 0
    start_id: int | None = 0
    end_id: int | None = 1
    init_factor: float = 1.0
    labels: int = 2
    causal: ClassVar[bool] = False
    classifier: ClassVar[str] = "dense"
    classifier_activation: ClassVar[str] = "tanh"
    classifier_input_dropout: ClassVar[bool] = True

    def __post_init__(self):
        expect_activations(self, ["activation"])
        sizes = ["vocab_size", "embed_dim", "num_heads", "head_dim", "mlp_dim", "num_buckets", "max_distance", "labels"]
        expect_at_least(1, self, sizes)
        expect_at_least(0, self, ["num_layers", "num_decoder_layers"])
        expect_words(self)
        expect_rates(self)
        for name in ("padding_id", "start_id", "end_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} = {token} is not one of the {self.vocab_size} tokens.")

    @property
    def decoder_layers(self) -> int:
        """The number of blocks of the decoder."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def initializer(self) -> Initializer:
        """How a matrix is drawn that reads the stream: the query's apart, and those of heads."""
        return self.drawn(self.embed_dim**-0.5)

    def drawn(self, std: float) -> Initializer:
        """A normal of this deviation times `init_factor`."""
        return normal(self.init_factor * std)

    def rate(self, site: str) -> float:
        """The dropout of a head: a classifier's, and none of question answering's."""
        return 0.0 if site == "answer_dropout" else self.classifier_dropout


T5_V1 = T5Config(family="t5")
T5_V1_1 = replace(T5_V1, mlp_dim=1024, num_layers=8, num_heads=6, activation="gelu_tanh", gated=True)
T5_V1_1 = replace(T5_V1_1, tied=False, scaled=False)
MT5 = replace(T5_V1_1, family="mt5", vocab_size=250112)
UMT5 = replace(MT5, family="umt5", bias_per_layer=True)
