"""The models of `language_model`, in three sizes each, and how their originals were trained."""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from ...models.functional import FUNCTIONAL_2022, FUNCTIONAL_HEAD
from ...models.gpt2 import GPT2Config
from ...models.llama import LLAMA
from ...models.transformer import HAIKU_EXAMPLE, HAIKU_TUTORIAL
from ._options import WrongUsage, expect_at_least, expect_dropout, option

OPTIMIZERS = ("adamw", "haiku-tutorial", "functional", "functional-sgd", "functional-sign")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A new model; None is the size's own number. Raises `WrongUsage` for what is out of range."""

    layers: int | None = option(None, "blocks")
    heads: int | None = option(None, "of attention")
    head_dim: int | None = option(None, "width of a head")
    embed_dim: int | None = option(None, "width")
    mlp_dim: int | None = option(None, "width inside the feed-forward networks")
    dropout: float | None = option(None, "of the parts that the model's family drops")
    max_positions: int | None = option(None, "rows of the table of positions (default: as many as a row has tokens)")

    def __post_init__(self):
        expect_at_least(self, dict.fromkeys([one.name for one in fields(self) if one.name != "dropout"], 1))
        expect_dropout(self.dropout)

    @property
    def is_given(self) -> bool:
        return any(getattr(self, one.name) is not None for one in fields(self))


class Preset(NamedTuple):
    """A size of a model and how it is trained: the fields of `Shape`, and defaults of options."""

    layers: int
    heads: int
    head_dim: int
    embed_dim: int
    mlp_dim: int
    dropout: float
    length: int
    batch_size: int
    learning_rate: float
    optimizer: str
    clip_norm: float | None = None
    beta2: float = 0.99
    rows: str = "shuffled"
    epochs: float | None = None
    steps: int | None = None


# Their own numbers. Each takes hours, and the Haiku ones never end by themselves: so many steps are their MAX_STEPS.
_FUNCTIONAL = Preset(3, 8, 64, 512, 512, 0.0, 32, 128, 1e-3, "functional", epochs=32)
_TUTORIAL = Preset(6, 4, 64, 256, 1024, 0.1, 128, 16, 2e-4, "haiku-tutorial", 0.25, rows="crops", steps=1_000_000)
_EXAMPLE = Preset(
    6, 8, 32, 128, 512, 0.1, 64, 2, 3e-4, "haiku-tutorial", 1.0, beta2=0.999, rows="crops", steps=1_000_000
)
ORIGINAL = {
    "functional-head": _FUNCTIONAL,
    "functional-2022": _FUNCTIONAL,
    "haiku-tutorial": _TUTORIAL,
    "haiku-example": _EXAMPLE,
}
# What ends in some minutes on two cores, however long the text is.
_GPT = Preset(3, 4, 32, 128, 512, 0.0, 64, 64, 1e-3, "adamw", 1.0, 0.999, "offsets", steps=1000)
SMALL = {
    "functional-head": _FUNCTIONAL._replace(heads=4, head_dim=32, embed_dim=128, mlp_dim=128, epochs=None, steps=1000),
    "functional-2022": _FUNCTIONAL._replace(heads=4, head_dim=32, embed_dim=128, mlp_dim=128, epochs=None, steps=1000),
    "haiku-tutorial": _TUTORIAL._replace(
        layers=3,
        heads=2,
        embed_dim=128,
        mlp_dim=512,
        length=64,
        batch_size=64,
        learning_rate=1e-3,
        steps=1000,
    ),
    "haiku-example": _EXAMPLE._replace(layers=3, heads=4, batch_size=64, learning_rate=1e-3, steps=1000),
    "gpt2": _GPT,
    "llama": _GPT._replace(mlp_dim=352),
}
# The functional transformer's quick mode: primes, so that a wrong shape is seen, and 5 epochs of 10 batches.
_QUICK = Preset(3, 7, 13, 91, 111, 0.0, 32, 128, 1e-3, "functional", steps=50)
QUICK = {
    "functional-head": _QUICK,
    "functional-2022": _QUICK._replace(embed_dim=93),
    "haiku-tutorial": _TUTORIAL._replace(
        layers=3, heads=7, head_dim=13, embed_dim=91, mlp_dim=182, length=32, steps=50, learning_rate=1e-3
    ),
    "haiku-example": _EXAMPLE._replace(
        layers=3, heads=7, head_dim=13, embed_dim=91, mlp_dim=182, length=32, batch_size=16, steps=50
    ),
    "gpt2": _GPT._replace(heads=7, head_dim=13, embed_dim=91, mlp_dim=111, length=32, steps=50),
    "llama": _GPT._replace(heads=7, head_dim=14, embed_dim=98, mlp_dim=111, length=32, steps=50),
}
SIZES = {"small": SMALL, "quick": QUICK, "original": ORIGINAL}
MODELS = tuple(SMALL)


def preset(model: str, size: str) -> Preset:
    """Raises `WrongUsage` where there is none."""
    if model not in SIZES[size]:
        raise WrongUsage(f"--original needs one of --model {', '.join(SIZES[size])}: {model} has no original here.")
    return SIZES[size][model]


def config_of(model: str, shape: Shape, sizes: Preset, *, vocab_size: int, length: int, padding_id: int | None) -> Any:
    """The config of a new model: `shape` where it says something, else the preset's `sizes`.

    Where the width is said and not what is made of it, heads share it, and the feed-forward networks grow with it. That
    of a GPT-2 is what its heads have together.
    """
    said = lambda name, otherwise: own if (own := getattr(shape, name)) is not None else otherwise
    heads, width = said("heads", sizes.heads), said("embed_dim", sizes.embed_dim)
    if model == "gpt2" and shape.embed_dim is None and shape.head_dim is not None:
        width = heads * shape.head_dim  # as it must be
    is_own = shape.heads is None and shape.embed_dim is None
    facts: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_layers": said("layers", sizes.layers),
        "num_heads": heads,
        "embed_dim": width,
        "head_dim": said("head_dim", sizes.head_dim if is_own else max(1, width // heads)),
        "mlp_dim": said("mlp_dim", sizes.mlp_dim * width // sizes.embed_dim),
        "max_positions": said("max_positions", length),
    }
    if facts["max_positions"] < length:
        raise WrongUsage(f"--max-positions {facts['max_positions']} is less than the {length} tokens of a row.")
    try:
        return _MAKERS[model](facts, said("dropout", sizes.dropout), padding_id)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise WrongUsage(f"--model {model}: {error}") from error


Facts = dict[str, Any]


def _functional(base: Any) -> Any:
    def make(facts: Facts, dropout: float, padding_id: int | None) -> Any:
        if dropout:
            raise WrongUsage(f"--dropout {dropout}: the functional transformer drops nothing. Leave it out.")
        return replace(base, **facts)

    return make


def _haiku(base: Any) -> Any:
    def make(facts: Facts, dropout: float, padding_id: int | None) -> Any:
        factor, rest = divmod(facts.pop("mlp_dim"), facts["embed_dim"])
        if rest or not factor:
            raise WrongUsage(f"--mlp-dim must be a multiple of --embed-dim {facts['embed_dim']} in Haiku's models.")
        return replace(base, widening_factor=factor, dropout=dropout, padding_id=padding_id, **facts)

    return make


def _gpt2(facts: Facts, dropout: float, padding_id: int | None) -> Any:
    if facts["num_heads"] * (width := facts.pop("head_dim")) != facts["embed_dim"]:
        said = (
            f"--embed-dim {facts['embed_dim']} must be --heads {facts['num_heads']} times --head-dim {width} in GPT-2."
        )
        raise WrongUsage(said)
    return GPT2Config(dropout=dropout, embedding_dropout=dropout, attention_dropout=dropout, **facts)


def _llama(facts: Facts, dropout: float, padding_id: int | None) -> Any:
    return replace(LLAMA, attention_dropout=dropout, **facts)


_MAKERS = {
    "functional-head": _functional(FUNCTIONAL_HEAD),
    "functional-2022": _functional(FUNCTIONAL_2022),
    "haiku-tutorial": _haiku(HAIKU_TUTORIAL),
    "haiku-example": _haiku(HAIKU_EXAMPLE),
    "gpt2": _gpt2,
    "llama": _llama,
}
