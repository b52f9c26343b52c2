"""What BERT and its kin differ in, as data: one config class, and the facts of each family."""

from dataclasses import dataclass, replace
from typing import Literal

from jax.nn.initializers import Initializer

from ..nn._shapes import normal
from .facts import expect_activations, expect_at_least, expect_rates, expect_words


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What decides the function that an encoder and its heads compute: `BERT`, `ROBERTA`, … are such facts.

    The stream through the model:

    - `embedding_dim`: width of the embedding tables; None means `embed_dim`, another width is projected to it.
    - `token_types`: 0 means that the model has none.
    - `positions`: "index" counts `position_offset`, `position_offset + 1`, …; "after_padding" counts the tokens that
      are not padding, from `padding_id + 1`, and gives padding the row `padding_id`.
    - `padding_rows`: tables whose row `padding_id` gets no gradient from lookups.
    - `causal`: a token sees only itself and what stands before it.
    - `hides_padding`: keys with the id `padding_id` are hidden where the call gives no attention mask.
    - `empty`: what a query gets that may attend to nothing, zeros or ("uniform") the mean of all values.
    - `init`: every matrix is drawn normal with standard deviation `init_std`; "truncated" cuts at twice that.

    Dropout rates; None means `dropout`, a name another one's:

    - `embedding_dropout` after the embedding, `attention_dropout` on the attention weights,
      `attention_output_dropout` after the attention, `dropout` after the feed-forward network.
    - `classifier_dropout`, `token_dropout`, `choice_dropout`, `answer_dropout` in the heads.

    Heads:

    - `classifier`: a sequence classifier reads the "pooler" of the encoder, has a "dense" layer of its own (with
      `classifier_activation`, and dropout before it where `classifier_input_dropout`), or is "linear" in the first
      token's state. `choice`: the same for multiple choice.
    - `prediction_activation`: of the masked-LM head; None means `activation`.
    - `tied`: the masked-LM head scores against the token embedding; `spare_bias`: an untied file keeps a second,
      unused output bias, carried so that it goes back.
    - `pooling`, `normalize`: how a sentence embedder makes one vector.
    """

    family: Literal["bert", "roberta", "xlm-roberta", "distilbert", "electra"]
    vocab_size: int
    embed_dim: int = 768
    embedding_dim: int | None = None
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_positions: int = 512
    token_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    positions: Literal["index", "after_padding"] = "index"
    position_offset: int = 0
    padding_id: int | None = 0
    padding_rows: tuple[Literal["tokens", "positions"], ...] = ("tokens",)
    causal: bool = False
    hides_padding: bool = False
    empty: Literal["zeros", "uniform"] = "zeros"
    dropout: float = 0.1
    embedding_dropout: float | None = None
    attention_dropout: float = 0.1
    attention_output_dropout: float | None = None
    init: Literal["normal", "truncated"] = "normal"
    init_std: float = 0.02
    pooler: bool = True
    labels: int = 2
    classifier: Literal["pooler", "dense", "linear"] = "pooler"
    classifier_activation: str = "tanh"
    classifier_input_dropout: bool = True
    classifier_dropout: float | None = None
    token_dropout: Literal["classifier_dropout", "dropout"] = "classifier_dropout"
    choice: Literal["pooler", "dense"] = "pooler"
    choice_dropout: float | Literal["classifier_dropout", "dropout"] = "classifier_dropout"
    answer_dropout: float = 0.0
    prediction_activation: str | None = None
    tied: bool = True
    spare_bias: bool = False
    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = True

    def __post_init__(self):
        expect_activations(self, ["activation", "prediction_activation", "classifier_activation"])
        sizes = ["vocab_size", "embed_dim", "embedding_dim", "num_heads", "mlp_dim", "max_positions", "labels"]
        expect_at_least(1, self, sizes)
        expect_at_least(0, self, ["num_layers", "token_types", "position_offset"])
        expect_words(self)
        expect_rates(self)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim = {self.embed_dim} is not a multiple of num_heads = {self.num_heads}.")
        if self.padding_id is None and (self.positions == "after_padding" or self.hides_padding):
            raise ValueError("positions = 'after_padding' and hides_padding need a padding_id, but it is None.")

    def rate(self, site: str) -> float:
        """The dropout rate of a site, such as "choice_dropout"."""
        value = getattr(self, site)
        while isinstance(value, str):
            value = getattr(self, value)
        return self.dropout if value is None else value

    @property
    def initializer(self) -> Initializer:
        """How every matrix is drawn."""
        return normal(self.init_std, truncated=self.init == "truncated")

    @property
    def table_dim(self) -> int:
        """The width of the embedding tables."""
        return self.embed_dim if self.embedding_dim is None else self.embedding_dim


BERT = EncoderConfig(family="bert", vocab_size=30522)
ROBERTA = EncoderConfig(
    family="roberta",
    vocab_size=50265,
    max_positions=514,
    token_types=1,
    norm_eps=1e-5,
    positions="after_padding",
    padding_id=1,
    padding_rows=("tokens", "positions"),
    classifier="dense",
    choice_dropout="dropout",
    prediction_activation="gelu",
)
XLM_R = replace(ROBERTA, family="xlm-roberta", vocab_size=250002)
DISTILBERT = EncoderConfig(
    family="distilbert",
    vocab_size=30522,
    num_layers=6,
    token_types=0,
    attention_output_dropout=0.0,
    pooler=False,
    classifier="dense",
    classifier_activation="relu",
    classifier_input_dropout=False,
    classifier_dropout=0.2,
    token_dropout="dropout",
    choice="dense",
    answer_dropout=0.1,
)
ELECTRA = EncoderConfig(
    family="electra",
    vocab_size=30522,
    embed_dim=256,
    embedding_dim=128,
    num_heads=4,
    mlp_dim=1024,
    pooler=False,
    classifier="dense",
    classifier_activation="gelu",
    choice="dense",
    choice_dropout=0.1,
    prediction_activation="gelu",
)
