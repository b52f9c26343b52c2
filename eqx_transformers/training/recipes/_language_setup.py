"""The options of `language_model`, and what they make of a text: tokens, batches, a model and its optimizer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Int

from ...models.heads import CausalLM
from ...serialisation import is_native, load
from ...sharding import row_share
from ..data import Batch, Batches
from ..optimizers import adamw
from ..originals import functional_transformer, haiku_tutorial
from ..packing import Windows
from ..schedules import warmup_linear
from ..text import DataError, read_text
from ..vocabularies import load_tokenizer, train_tokenizer
from . import _encoders as encoders
from ._language_models import MODELS, OPTIMIZERS, Preset, Shape, config_of, preset
from ._options import Settled, Training, WrongUsage, expect_at_least, expect_share, kept_tokenizer, option

MODEL = "functional-head"
SPECIAL = ("<pad>", "<unk>")
BPE_SIZE = 1000
PATIENCE = 5
PIECE = 1 << 16  # characters that are tokenized at once
PROMPT = 16  # tokens of one that is not given
FINE_TUNING = Preset(0, 0, 0, 0, 0, 0.0, 128, 8, 5e-5, "adamw", 1.0, 0.999, "offsets", epochs=3)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which text, which model, which steps. Raises `WrongUsage` for what is out of range."""

    model: str | None = option(None, f"the family of a new model (default {MODEL})", choices=MODELS)
    quick: bool = option(False, "a tiny model and 50 steps: the functional transformer's quick mode")
    original: bool = option(False, "the original's own sizes, batches and number of steps: hours")
    tokenizer: str | None = option(
        None, "char, bpe, bpe:SIZE or a tokenizer.json (default char; with --from the model's own)", metavar="KIND"
    )
    length: int | None = option(None, "tokens of a row (default: the size's own)")
    rows: str | None = option(
        None,
        "shuffled: without overlap; crops: likewise, a token longer, so that each predicts --length tokens; offsets:"
        " their borders move in every epoch (default: the model's own)",
        choices=("shuffled", "crops", "offsets"),
    )
    hold_out: float = option(0.1, "the share at the end of the text that is not trained on")
    optimizer: str | None = option(None, "adamw, or one of an original (default: the model's own)", choices=OPTIMIZERS)
    beta1: float = option(0.9, "of Adam: the mean of gradients")
    beta2: float | None = option(None, "of Adam: the mean of their squares (default: the optimizer's own)")
    evaluate_batches: int | None = option(
        None, "held-out batches of an evaluation while it trains (default: all, as in the end)"
    )
    sample_every: int = option(1, "evaluations between two samples; 0: none while it trains")
    sample_tokens: int = option(100, "tokens of a sample; 0: none")
    prompt: str | None = option(None, "what a sample goes on from (default: how the held-out part begins)")
    temperature: float | None = option(None, "of samples that are drawn (default: the best token each time)")
    dump: str | None = option(None, "write the step's jaxpr and HLO there", metavar="DIR")

    def __post_init__(self):
        expect_share("--hold-out", self.hold_out)
        least = {"length": 2, "evaluate_batches": 1, "sample_every": 0, "sample_tokens": 0}
        expect_at_least(self, least)
        if self.quick and self.original:
            raise WrongUsage("--quick and --original are two sizes: give one of them.")
        if self.temperature is not None and not self.temperature > 0:
            raise WrongUsage(f"--temperature {self.temperature} must be above 0; without it the best token is taken.")
        if not all(0 <= x < 1 for x in (self.beta1, self.beta2 or 0)):
            raise WrongUsage(f"--beta1 {self.beta1} and --beta2 {self.beta2} must be at least 0 and below 1.")


def sizes_of(options: Options, source: Any) -> Preset:
    """The numbers that are not given: of the model, or of one that goes on."""
    if source is not None:
        return FINE_TUNING
    return preset(options.model or MODEL, "quick" if options.quick else "original" if options.original else "small")


@dataclass(frozen=True)
class Work:
    """A text as tokens and batches, and the model that reads it."""

    model: Any
    origin: Any
    tokenizer: Any
    tokenizer_json: str
    train_ids: Int[np.ndarray, " train"]
    held_ids: Int[np.ndarray, " held"]
    held_characters: int
    prompt_ids: Int[np.ndarray, " prompt"]
    vocab_size: int
    row_length: int
    epochs: float | int
    batches: Batches
    scored: Batches
    said: list[str]

    def evaluated(self, count: int | None) -> list[Batch]:
        """The held-out batches: each token but the first is predicted once. Or so many of them, from the beginning."""
        return [self.scored[i] for i in range(len(self.scored) if count is None else min(count, len(self.scored)))]

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """What transformers must be told of a tokenizer.json that nobody made there."""
        known = dict(zip(("pad_token", "unk_token"), SPECIAL, strict=True))
        there = {name: token for name, token in known.items() if self.tokenizer.token_to_id(token) is not None}
        longest = {} if (room := self.model.backbone.room) is None else {"model_max_length": room}
        return {"tokenizer_class": "PreTrainedTokenizerFast", **there, **longest}


def training_for(options: Options, source: Any = None, given: Training | None = None) -> Settled:
    """`given`, with the model's batch, rate and length of training where nothing is said; on a short text, the end of
    it is when it is learned by heart: `PATIENCE` evaluations without a better one, but for sizes that stand for another
    program.
    """
    own = sizes_of(options, source)
    numbers = {
        **({"steps": own.steps} if own.steps else {"epochs": own.epochs}),
        "batch_size": own.batch_size,
        "learning_rate": own.learning_rate,
        "clip_norm": own.clip_norm or 0,
        "patience": 0 if options.quick or options.original else PATIENCE,
    }
    return (given or Training()).settled(**numbers)


class Tuned(NamedTuple):
    """An optimizer, its rate by the step, and whether it clips gradients by itself."""

    optimizer: Any
    schedule: Any
    clips: bool = False


def optimizer_of(options: Options, training: Settled, steps: int, source: Any = None) -> Tuned:
    """The one that is asked for, or the model's own."""
    own = sizes_of(options, source)
    name, rate, b1 = options.optimizer or own.optimizer, training.learning_rate, options.beta1
    b2 = options.beta2 if options.beta2 is not None else own.beta2 if name == own.optimizer else _BETA2[name]
    constant = lambda step: rate
    if name == "adamw":
        rates = warmup_linear(rate, steps, training.warmup)
        return Tuned(adamw(rates, weight_decay=training.weight_decay, b1=b1, b2=b2), rates)
    if (training.warmup, training.weight_decay) != (Settled.warmup, Settled.weight_decay):
        raise WrongUsage(f"--warmup and --weight-decay are AdamW's: the optimizer {name} has a constant rate and none.")
    if name == "haiku-tutorial":
        return Tuned(haiku_tutorial(rate, clip_norm=training.clip_norm or math.inf, b1=b1, b2=b2), constant, clips=True)
    if name != "functional" and (b1, options.beta2) != (Options.beta1, None):
        raise WrongUsage(f"--beta1 and --beta2 are Adam's: the optimizer {name} has none.")
    method: Any = {"functional": "adam", "functional-sgd": "sgd", "functional-sign": "sign"}[name]
    return Tuned(functional_transformer(rate, b1=b1, b2=b2, method=method), constant)


_BETA2 = {"adamw": 0.999} | dict.fromkeys(OPTIMIZERS[1:], 0.99)


def prepared(
    paths: Sequence[Any], source: Any, shape: Shape, options: Options, training: Settled, out: Path, mesh: Any = None
) -> Work:
    """All that is needed to train. Raises a `ValueError` for what the library refuses, and a `DataError`."""
    text = "\n".join(map(read_text, paths))
    at = _border(text, options.hold_out)
    given, origin, directory = (None, None, None) if source is None else _loaded(source)
    tokenizer = _tokenizer(options, text, at, out, directory)
    tokenizer_json = tokenizer.to_str()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    train, held = (encoded(part, tokenizer) for part in (text[:at], text[at:]))
    _expect_tokens(train, held, given, options)
    sizes = sizes_of(options, source)
    rows = options.rows or sizes.rows
    row = _length(options, sizes, given) + (rows == "crops" and source is None)
    padding, unknown = (tokenizer.token_to_id(name) for name in SPECIAL)
    vocab_size = tokenizer.get_vocab_size() if given is None else given.config.vocab_size
    if given is None:
        config = config_of(options.model or MODEL, shape, sizes, vocab_size=vocab_size, length=row, padding_id=padding)
        given = CausalLM(config, key=jax.random.key(training.seed))
    layout = Windows(training.batch_size, row, starts="offset" if rows == "offsets" else "fixed")
    fill, seed = padding or 0, training.seed
    batches = Batches([train], layout, padding_id=fill, seed=seed, process=row_share(mesh), transform=_full_rows)
    scored = Windows(training.batch_size, row, stride=row - 1, pad=True)
    prompt = held[:PROMPT] if options.prompt is None else encoded(options.prompt, tokenizer)
    if not len(prompt):
        raise WrongUsage("--prompt has no token: a sample needs something to go on from.")
    count = sum(x.size for x in jax.tree.leaves(eqx.filter(given, eqx.is_array)))
    said = [
        f"{len(text):,} characters: {len(train):,} tokens, and {len(held):,} at the end held out; {vocab_size:,}"
        " different ones are known",
        f"{given.config.family} of {count:,} parameters, rows of {row} tokens, {batches.per_epoch} batches an epoch",
    ]
    if strange := 0 if unknown is None else int((train == unknown).sum() + (held == unknown).sum()):
        said.append(f"{strange:,} tokens are unknown to the tokenizer: what stands there is not learned")
    return Work(
        model=given,
        origin=origin,
        tokenizer=tokenizer,
        tokenizer_json=tokenizer_json,
        train_ids=train,
        held_ids=held,
        held_characters=len(text) - at,
        prompt_ids=prompt,
        vocab_size=vocab_size,
        row_length=row,
        epochs=sizes.epochs or 1,
        batches=batches,
        scored=Batches([held], scored, padding_id=fill, shuffle=False, epochs=1),
        said=said,
    )


def encoded(text: str, tokenizer: Any) -> Int[np.ndarray, " tokens"]:
    """The tokens of a long text, without special ones; made of pieces that end with a line where there are lines."""
    pieces, start = [], 0
    while start < len(text):
        end = text.rfind("\n", start, start + PIECE) + 1
        end = end if start < end and start + PIECE < len(text) else start + PIECE
        pieces.append(text[start:end])
        start = end
    found = tokenizer.encode_batch(pieces, add_special_tokens=False) if pieces else []
    return np.array([i for one in found for i in one.ids], np.int32)


def _full_rows(batch: Batch, rng: np.random.Generator) -> Batch:
    """Without the mask that says that nothing is padding: attention need not look at it."""
    return {name: x for name, x in batch.items() if name != "attention_mask"}


def _border(text: str, share: float) -> int:
    """Where the held-out part begins: at a line's beginning, if there is one near."""
    at = round(len(text) * (1 - share))
    end = text.find("\n", at, at + max(1, int(len(text) * share / 4)))
    return at if end < 0 else end + 1


def _loaded(source: Any) -> tuple[Any, Any, Any]:
    """(model, origin, where its tokenizer lies) of a directory of either kind."""
    if Path(source).is_dir() and is_native(source):
        model, _ = load(source)
        if not isinstance(model, CausalLM):
            raise WrongUsage(f"{source} holds a {type(model).__name__}: --from goes on with a CausalLM.")
        return model, None, source
    model, origin, _ = encoders.loaded(source, CausalLM, 0)
    return model, origin, origin.directory


def _tokenizer(options: Options, text: str, at: int, out: Path, own: Any) -> Any:
    """The one that is asked for; that of a model, in the directory `own`; that of the run, where it goes on; or one
    that is made of the text.

    Of characters, all of the text are known: a held-out one that is not would be one and the same token with others,
    and easier to predict. BPE is made of what is trained on.
    """
    if options.tokenizer is None and own is not None:
        return load_tokenizer(own)
    kind = options.tokenizer or "char"
    name, _, size = kind.partition(":")
    if name not in ("char", "bpe") or (size and not size.isdecimal()):
        if not Path(kind).exists():
            raise WrongUsage(f"--tokenizer {kind} is none of char, bpe and bpe:SIZE, and there is no such file.")
        return load_tokenizer(kind)
    if own is not None:
        raise WrongUsage(f"--tokenizer {kind}: a model that goes on needs the tokenizer that it was made with.")
    if (kept := kept_tokenizer(out)) is not None:
        return load_tokenizer(kept)
    if name == "char":
        return train_tokenizer([text], "char", special_tokens=SPECIAL)
    return train_tokenizer([text[:at]], "bpe", special_tokens=SPECIAL, vocab_size=int(size or BPE_SIZE))


def _length(options: Options, sizes: Preset, given: Any) -> int:
    if given is None:
        return options.length or sizes.length
    return encoders.limit(given, options.length, sizes.length, "--length")


def _expect_tokens(train: Any, held: Any, given: Any, options: Options) -> None:
    if min(len(train), len(held)) < 2:
        raise DataError(
            f"There are {len(train)} tokens to train on and {len(held)} held out, too few: give more text, or another"
            f" --hold-out than {options.hold_out}."
        )
    if given is not None:
        encoders.expect_known(np.concatenate([train, held]), given.config.vocab_size)
