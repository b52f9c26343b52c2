"""Pairs of texts that belong together, or single texts -> sentence embeddings by contrast (InfoNCE, SimCSE).

    python -m eqx_transformers.training.recipes.embed PAIRS.tsv --model DIR --out RESULT
    python -m eqx_transformers.training.recipes.embed TEXTS.txt --model DIR --out RESULT

`RESULT` gets what every recipe writes, `metrics.json`, and `model/`, a directory that transformers and
sentence-transformers load. A share is held out: of each first text, is its partner the nearest of all held-out ones?
The checkpoint that is best at it is the final model.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from ..._files import written
from ...models.heads import SentenceEmbedder
from ...surgery import adapter_mask, add_adapter, merge, select
from ..batching import Buckets
from ..data import Batches
from ..history import History
from ..objectives import contrastive_loss
from ..text import TABLES
from ..vocabularies import load_tokenizer
from . import _encoders as encoders
from ._encoders import Path_
from ._labelled import logits as outputs
from ._lines import held_out
from ._options import (
    Settled,
    Training,
    WrongUsage,
    absolute,
    add_options,
    expect_at_least,
    expect_share,
    gathered,
    located,
    option,
    parser,
    settings_of,
    settle,
    training as training_of,
    usage,
)
from ._pairs import Pair, halves, ranks, rivals
from ._run import Best, begin, expect_finite, final, program, train
from ._tuned import RATE_SAID, peak

EPOCHS = 3
ROWS = 64  # of a batch: each is a wrong answer to the others
BEST: Best = ("mean_reciprocal_rank", "max")
TARGETS = "**.{query,value}_proj"
PAIR = ("first", "second")  # their columns
RATES = ("embedding_dropout", "attention_dropout", "attention_output_dropout", "dropout")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which texts there are, and the loss. Raises `WrongUsage` for what is out of range."""

    first: str = option(PAIR[0], "the column of the first texts", metavar="COLUMN")
    second: str = option(PAIR[1], "the column of their partners", metavar="COLUMN")
    text: str | None = option(None, "no pairs: this column's texts, twice under other dropout", metavar="COLUMN")
    hold_out: float = option(0.1, "the share that is not trained on, chosen by a hash of each first text")
    evaluate_pairs: int = option(2000, "held-out pairs among which partners are looked for, at most")
    temperature: float = option(0.05, "by which cosines are divided")
    max_length: int | None = option(
        None, f"tokens; longer texts are cut (default: the model's room, {encoders.LONGEST} at most)"
    )
    max_shapes: int = option(encoders.SHAPES, "lengths that batches are padded to")
    lora: int | None = option(None, "train adapters of this rank and nothing else; the result has them merged")

    def __post_init__(self):
        if self.text is not None and (self.first, self.second) != PAIR:
            raise WrongUsage(
                "--text is the column of single texts, --first and --second are those of pairs: one or the other."
            )
        expect_share("--hold-out", self.hold_out)
        least = {"evaluate_pairs": 2, "max_shapes": 1, "max_length": 3, "lora": 1}
        expect_at_least(self, least)
        if not self.temperature > 0:
            raise WrongUsage(f"--temperature {self.temperature} must be above 0.")


class Embedded(NamedTuple):
    """What came out: `before` and `after` have `accuracy` and `mean_reciprocal_rank`, `path` the model."""

    model: Any
    before: dict[str, float]
    after: dict[str, float]
    history: History
    stopped: str
    path: Path


class Task(NamedTuple):
    """What is trained on; both sides of the held-out pairs, in order; which of them are wrong answers to which."""

    batches: Batches
    sides: tuple[Batches, Batches]
    rivals: Bool[np.ndarray, "pairs pairs"]
    said: str

    def measured(self, model: Any) -> dict[str, float]:
        """`accuracy` and `mean_reciprocal_rank` of the held-out pairs; NaN where an embedding is not of numbers."""
        first, second = (outputs(model, side) for side in self.sides)
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            return {"accuracy": math.nan, "mean_reciprocal_rank": math.nan}
        found = ranks(first, second, self.rivals)
        return {"accuracy": float((found == 1).mean()), "mean_reciprocal_rank": float((1 / found).mean())}


def embed(
    pairs: Path_, *, model: Path_, out: Path_, training: Training | None = None, options: Options | None = None
) -> Embedded:
    """Trains a sentence embedder so that texts of a pair are near and others are not; measures it on held-out pairs.

    `pairs` is a table, or plain lines (or, with `options.text`, a table too): then a text is its own partner under
    another dropout (SimCSE), and held-out pairs are the first and the second half of a text's words. `model` is a
    Hugging Face directory or a hub id, with a tokenizer.json. Wrong answers are all other rows of the batch: of a
    micro-batch, with `training.accumulate`. A second call goes on where the first one stopped.

    Raises `WrongUsage`, a `DataError` with file and line, and the converters' errors.
    """
    options = Options() if options is None else options
    training = (training or Training()).settled(batch_size=ROWS, learning_rate=peak(options.lora))
    if training.batch_size < 2 * training.accumulate:
        raise WrongUsage(
            f"--batch-size {training.batch_size} with --accumulate {training.accumulate} is one pair at a time, with no"
            " wrong answer to tell it from: two at least are needed."
        )
    mesh, out = begin(training, out)
    kept, held = _shares(_read(pairs, options), options)
    made, origin, said = encoders.loaded(model, SentenceEmbedder, training.seed)
    with usage():
        task = _prepared(made, load_tokenizer(origin.directory), kept, held, training, options, mesh)
        made, trains = _adapted(made, options.lora, training.seed)
        settle(out, _settings(pairs, model, training, options, task))
    before = task.measured(made)
    if jax.process_index() == 0:
        print(f"{task.said}\n{said}\nbefore: {_told(before)}", flush=True)
    loss = partial(contrastive_loss, temperature=options.temperature)
    given: dict[str, Any] = {"mesh": mesh, "trains": trains, "evaluate": task.measured, "best": BEST}
    fitted = train(made, loss, task.batches, training, out, epochs=EPOCHS, **given)
    made, step = final(fitted, training, out, BEST, mesh)
    made = made if options.lora is None else merge(made)
    result = Embedded(made, before, task.measured(made), fitted.history, fitted.stopped, out / "model")
    _write(result, origin, out, {"steps": int(fitted.state.step), "step": step, "stopped": fitted.stopped})
    return result


def _read(path: Path_, options: Options) -> list[Any]:
    """Pairs of a table; or texts, of plain lines or where they are asked for."""
    is_plain = Path(path).is_file() and Path(path).suffix.lower() not in TABLES
    if is_plain and (options.first, options.second) != PAIR:
        raise WrongUsage(f"{path} has lines, not columns: --first and --second are of .tsv, .csv and .jsonl files.")
    if is_plain or options.text is not None:
        text = options.text or "text"
        return encoders.read([path], text, {text: "--text"}).texts
    columns = {options.first: "--first", options.second: "--second"}
    return list(dict.fromkeys(encoders.read([path], (options.first, options.second), columns).texts))


def _shares(found: list[Any], options: Options) -> tuple[list[Any], list[Pair]]:
    """(what is trained on, pairs that are held out: so many of them, drawn, that they can be compared)."""
    is_pair = not isinstance(found[0], str)
    held = held_out([x[0] if is_pair else x for x in found], options.hold_out, least=2)
    chosen = [x for x, out in zip(found, held, strict=True) if out]
    pairs = chosen if is_pair else [pair for x in dict.fromkeys(chosen) if (pair := halves(x)) is not None]
    if len(pairs) < 2:
        raise WrongUsage(f"Of {len(chosen)} held-out texts {len(pairs)} have two words: at least two must.")
    drawn = np.random.default_rng(0).permutation(len(pairs))[: options.evaluate_pairs]
    return [x for x, out in zip(found, held, strict=True) if not out], [pairs[i] for i in drawn]


def _prepared(
    model: Any, tokenizer: Any, kept: list[Any], held: list[Pair], training: Settled, options: Options, mesh: Any
) -> Task:
    limit, is_pair = encoders.limit(model, options.max_length), not isinstance(kept[0], str)
    if not is_pair and not any(model.config.rate(site) for site in RATES):
        raise WrongUsage("The model has no dropout, without which the two views of a text are the same: give pairs.")
    tokens = lambda texts: encoders.tokenized(texts, tokenizer, model.config.vocab_size, limit)
    first, *rest = [tokens(side) for side in zip(*kept, strict=True)] if is_pair else [tokens(kept)]
    layout = Buckets(training.batch_size, max_shapes=options.max_shapes)
    more = {"positive": rest[0]} if rest else None
    batches = encoders.shuffled(first, layout, model.config, training.seed, mesh, more=more)
    sides = [tokens(side) for side in zip(*held, strict=True)]
    columns = {"places": np.arange(len(held))}
    of = lambda side: encoders.same_lengths(side, training.batch_size, batches)
    scored = [encoders.in_order(side, of(side), model.config, columns=columns) for side in sides]
    cut = sum(x.truncated for x in (first, *rest, *sides))
    said = f"{len(kept)} {'pairs' if is_pair else 'texts'}, and {len(held)} held-out pairs"
    said += "" if is_pair else ", the halves of texts"
    said += f"; {cut} texts are cut to {limit} tokens" if cut else ""
    return Task(batches, (scored[0], scored[1]), rivals(held), said)


def _adapted(model: Any, rank: int | None, seed: int) -> tuple[Any, Any]:
    """(model, mask of what trains): all, or LoRA on the queries and values."""
    if rank is None:
        return model, None
    key = jax.random.fold_in(jax.random.key(seed), 1)
    model = add_adapter(model, select("Linear", under=TARGETS), rank=rank, alpha=2 * rank, key=key)
    return model, adapter_mask(model)


def _settings(pairs: Any, model: Any, training: Settled, options: Options, task: Task) -> dict[str, Any]:
    """All that a run that goes on must agree with."""
    given = {"pairs": absolute(pairs), "model": located(model), "texts": task.batches.fingerprint}
    return settings_of(training, options) | given


def _told(found: dict[str, float]) -> str:
    return f"held-out accuracy {found['accuracy']:.3f}, mean reciprocal rank {found['mean_reciprocal_rank']:.3f}"


def _write(result: Embedded, origin: Any, out: Path, run: dict[str, Any]) -> None:
    import converters

    metrics = {"before": result.before, "after": result.after} | run
    expect_finite(metrics, out)
    if jax.process_index() == 0:
        converters.export(result.model, result.path, origin)
        written(out / "metrics.json", json.dumps(metrics, indent=2).encode())


def main(argv: Sequence[str] | None = None) -> None:
    """The command: see `--help`."""
    args = _parser().parse_args(argv)
    options = gathered(args, Options)
    said = embed(args.pairs, model=args.model, out=args.out, training=training_of(args), options=options)
    if jax.process_index() == 0:
        print(f"written: {said.path}")
        print(encoders.improved("mean reciprocal rank", said.before, said.after, "mean_reciprocal_rank"))
        print(encoders.improved("accuracy", said.before, said.after, "accuracy"))


def _parser() -> argparse.ArgumentParser:
    said = "Trains sentence embeddings on pairs of texts."
    made = parser("embed", said, learning_rate=RATE_SAID, batch_size=ROWS, epochs=EPOCHS)
    made.add_argument("pairs", metavar="PAIRS", help=".tsv, .csv or .jsonl of pairs; or plain lines, which are texts")
    made.add_argument(
        "--model", required=True, metavar="DIR", help="a Hugging Face directory or hub id, with tokenizer.json"
    )
    add_options(made, "texts and loss", Options)
    return made


if __name__ == "__main__":
    program(main)
