"""Texts and labels -> a classifier, fine-tuned whole or with LoRA, and how good it is.

`python -m eqx_transformers.training.recipes.classify --model DIR --train TRAIN.tsv --test TEST.tsv --out RESULT`

`RESULT` gets what every recipe writes, `metrics.json`, `confusion.png`, `predictions.tsv`, and `model/`, a directory
that transformers loads, or with `--lora` `adapter/`, which PEFT loads on the model. The test texts are looked at once,
by the final model. Texts that are held out (`--validation FILE`, `--hold-out 0.1`) are looked at after every epoch, and
the checkpoint that is best on them is the final model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..._files import written
from ...pictures import confusion_picture
from .. import metrics
from ..batching import Buckets
from ..data import Batches
from ..history import History
from ..loop import Fitted
from ..objectives import classification_loss
from ..vocabularies import load_tokenizer
from . import _encoders as encoders, _labelled as data
from ._classify_options import EPOCHS, LONGEST, Options as Options, command_line, options_of
from ._labelled import Labelled
from ._options import (
    Settled,
    Training,
    WrongUsage,
    absolute,
    located,
    settings_of,
    settle,
    training as training_of,
    usage,
)
from ._run import Best, begin, expect_finite, final, program, train as trained
from ._tuned import Adapter as Adapter, Ready, export, optimizer, peak, ready

BEST: Best = ("accuracy", "max")


class Classified(NamedTuple):
    """What came out. `test` and `validation` are as in metrics.json, or None; `path` has the model or the adapter."""

    model: Any
    labels: tuple[str, ...]
    test: dict[str, Any] | None
    validation: dict[str, Any] | None
    history: History
    stopped: str
    path: Path


class Task(NamedTuple):
    """What is trained on, and what is scored: batches of `validation` and `test`, where there are such."""

    sets: dict[str, Labelled]
    batches: Batches
    scored: dict[str, Batches]
    max_length: int
    cut: int  # texts that were longer


def classify(
    train: str | PathLike[str],
    test: str | PathLike[str] | None = None,
    *,
    model: str | PathLike[str],
    out: str | PathLike[str],
    training: Training | None = None,
    options: Options | None = None,
) -> Classified:
    """Fine-tunes a model on the texts of `train`, evaluates it on those of `test`, and writes all to `out`.

    `model` is a Hugging Face directory or a hub id, with a tokenizer.json; its head is kept if it has as many labels.
    Raises `WrongUsage`, a `DataError` with file and line, and the converters' errors.
    """
    options = Options() if options is None else options
    training = (training or Training()).settled(learning_rate=peak(options.lora))
    if training.patience and not options.holds_out:
        raise WrongUsage("--patience needs texts that are held out: give --validation FILE or --hold-out 0.1.")
    mesh, out = begin(training, out)
    records = _records({"train": train, "validation": options.validation, "test": test}, options)
    names = records["train"].names
    with usage():
        made = ready(model, names, training.seed, options.lora, options.freeze, options.override)
        task = prepared(records, made, training, options, mesh)
        settle(out, _settings(train, model, training, options, task))
    if training.progress and jax.process_index() == 0:
        print("\n".join(_said(task, made, names)), flush=True)
    fitted = _fitted(made, task, training, options, out, mesh)
    tuned, step = final(fitted, training, out, BEST if options.holds_out else None, mesh)
    run = {"labels": list(names), "steps": int(fitted.state.step), "step": step, "stopped": fitted.stopped}
    return _finished(tuned, task, made, fitted.history, run, out)


def _records(paths: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Of all files: what can be wrong with the data is said before a model is read."""
    columns = {"text": options.text, "label": options.label}
    found = {"train": data.read(paths["train"], **columns)}
    names = found["train"].names
    others = {name: path for name, path in paths.items() if path is not None and name not in found}
    return found | {name: data.read(path, names=names, **columns) for name, path in others.items()}


def prepared(records: Mapping[str, Any], made: Ready, training: Settled, options: Options, mesh: Any = None) -> Task:
    """Texts tokenized, held out and put into batches."""
    config, limit = made.model.config, encoders.limit(made.model, options.max_length, LONGEST)
    tokenizer = load_tokenizer(made.origin.directory)
    sets = {name: data.tokenized(found, tokenizer, config, limit) for name, found in records.items()}
    cut = sum(texts.tokens.truncated for texts in sets.values())
    if options.hold_out is not None:
        kept, held = data.split(sets["train"].labels, options.hold_out, training.seed)
        sets |= {"train": sets["train"].taken(kept), "validation": sets["train"].taken(held)}
    layout = Buckets(training.batch_size, max_shapes=options.max_shapes)
    texts, labels = sets["train"].tokens, {"labels": sets["train"].labels}
    batches = encoders.shuffled(texts, layout, config, training.seed, mesh, columns=labels)

    def scored(texts: Labelled) -> Batches:
        columns = {"labels": texts.labels, "places": np.arange(len(texts.labels))}
        layout = encoders.same_lengths(texts.tokens, training.batch_size, batches)
        return encoders.in_order(texts.tokens, layout, config, columns=columns)

    return Task(sets, batches, {name: scored(texts) for name, texts in sets.items() if name != "train"}, limit, cut)


def _settings(train: Any, model: Any, training: Settled, options: Options, task: Task) -> dict[str, Any]:
    """All that a run that goes on must agree with: the test texts are not trained on."""
    paths = {"train": absolute(train), "validation": absolute(options.validation)}
    given = {"max_length": task.max_length, "texts": task.batches.fingerprint, "model": located(model)}
    return settings_of(training, options) | given | paths


def _said(task: Task, made: Ready, names: Sequence[str]) -> Iterator[str]:
    for name, texts in task.sets.items():
        yield data.counted(name, texts, names)
    if task.cut:
        yield f"{task.cut} texts are cut to {task.max_length} tokens"
    yield made.said
    yield data.shares(task.batches)


def _fitted(made: Ready, task: Task, training: Settled, options: Options, out: Path, mesh: Any) -> Fitted:
    evaluate = None
    if options.holds_out:
        labels, batches = task.sets["validation"].labels, task.scored["validation"]
        evaluate = lambda model: data.told(data.logits(model, batches), labels)
    steps = training.total(task.batches.per_epoch, EPOCHS)
    with usage():
        chosen = optimizer(made.model, training, steps, options.layer_decay, options.original)
    return trained(
        made.model,
        classification_loss,
        task.batches,
        replace(training, clip_norm=0) if options.original else training,  # its optimizer clips by itself
        out,
        epochs=EPOCHS,
        mesh=mesh,
        trains=made.trains,
        evaluate=evaluate,
        best=BEST,
        **chosen,
    )


def _finished(model: Any, task: Task, made: Ready, history: History, run: dict[str, Any], out: Path) -> Classified:
    """Scores what is to be scored and writes all."""
    names = run["labels"]
    logits = {name: data.logits(model, batches) for name, batches in task.scored.items()}
    results = {name: _measured(x, task.sets[name], names) for name, x in logits.items()}
    expect_finite(results, out)
    path = out / ("adapter" if made.saved else "model")
    if jax.process_index() == 0:
        export(model, path, made)
        written(out / "metrics.json", json.dumps(results | run, indent=2).encode())
        if shown := next((name for name in ("test", "validation") if name in logits), None):
            _show(out, shown, task.sets[shown], logits[shown], results[shown], names)
    test, validation = results.get("test"), results.get("validation")
    return Classified(model, tuple(names), test, validation, history, run["stopped"], path)


def _measured(logits: Any, texts: Labelled, names: Sequence[str]) -> dict[str, Any]:
    confusion = metrics.confusion_matrix(texts.labels, logits.argmax(-1), len(names))
    return {"loss": data.told(logits, texts.labels)["loss"]} | metrics.summary(confusion, names)


def _show(out: Path, name: str, texts: Labelled, logits: Any, result: dict[str, Any], names: Sequence[str]) -> None:
    title = f"{name}: accuracy {result['accuracy']:.3f}, macro F1 {result['macro_f1']:.3f}"
    confusion_picture(np.asarray(result["confusion"]), names, path=out / "confusion.png", title=title)
    written(out / "predictions.tsv", data.predictions(texts, logits, names).encode())


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = command_line().parse_args(argv)
    said = classify(
        args.train, args.test, model=args.model, out=args.out, training=training_of(args), options=options_of(args)
    )
    if jax.process_index() > 0:
        return
    name = "validation" if said.test is None else "test"
    result = said.validation if said.test is None else said.test
    print(f"{name} macro F1: {result['macro_f1']:.3f}" if result else "Nothing was evaluated: there is no --test.")
    print(f"written: {said.path}")
    if result:
        print(f"{name} accuracy: {result['accuracy']:.3f}")


if __name__ == "__main__":
    program(main)
