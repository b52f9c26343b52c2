"""Lines of text as a few codes and back: a T5 with a bottleneck, trained as the T5-VAE was.

    python -m eqx_transformers.training.recipes.t5_vae LINES.txt --out vae

Without lines, those of Python's standard library. Source: https://github.com/Fraser-Greenlee/T5-VAE.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..._files import written
from ...models.t5_vae import T5VAE
from ...serialisation import save
from . import _run
from ._options import (
    Training,
    absolute,
    add_options,
    gathered,
    located,
    parser,
    settings_of,
    settle,
    training as training_of,
    usage,
)
from ._python_lines import checker, kind_of
from ._reconstruction import Reconstruction, interpolations, latent_picture, unigram_accuracy
from ._vae_options import Objective, Samples, Shape
from ._vae_setup import Work, batches_of, drawn_model, loaded_t5, prepared

EPOCHS = 2.0
ROWS = 256  # of one program that measures
FINAL = 8  # times as many held-out lines are measured at the end as while it trains
SAMPLES, SHAPE, OBJECTIVE = Samples(), Shape(), Objective()
OWN: dict[str, Any] = {"batch_size": 64, "learning_rate": 3e-3, "evaluate_every": 500}
BEST: _run.Best = ("accuracy", "max")


@dataclass(frozen=True)
class Result:
    """A trained `T5VAE`, its tokenizer, the measures of held-out lines, and the table of interpolations."""

    model: Any
    tokenizer: Any
    metrics: dict[str, Any]
    interpolations: str


def t5_vae(
    lines: str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str],
    t5: str | os.PathLike[str] | None = None,
    samples: Samples = SAMPLES,
    shape: Shape = SHAPE,
    objective: Objective = OBJECTIVE,
    training: Training | None = None,
) -> Result:
    """Trains a `T5VAE` on the lines of a file, or of Python's standard library, and measures it on others of them.

    `t5` is a directory of a T5 to begin with; without it a small one is drawn. In `out` are afterwards: `model` (the
    native format, with the tokenizer), for codes of the first tokens `exported` too (the published T5-VAE's format),
    `tokenizer.json`, `metrics.json`, `interpolations.txt`, the pictures `latents.png` and, of Python, `kinds.png`,
    `log.jsonl`, `curves.png` and `checkpoints`, of which the one with the best accuracy is the final model. A second
    call goes on where the first one stopped.

    Raises a `DataError` or `WrongUsage` for lines and options that cannot be meant. `Reconstruction` says what is
    measured.
    """
    training = (training or Training()).settled(**OWN)
    check = None if samples.check is None else checker(samples.check)
    mesh, out = _run.begin(training, out)
    with usage():
        base, directory = (None, None) if t5 is None else loaded_t5(t5)
        work = prepared(lines, out, directory, base, samples)
        batches = batches_of(work, samples, training, mesh)
        model = drawn_model(base, work, samples, shape, objective, training.seed)
        given = {"lines": absolute(lines), "t5": located(t5), "texts": batches.fingerprint}
        settle(out, settings_of(samples, shape, objective, training) | given)
    if jax.process_index() == 0:
        written(out / "tokenizer.json", work.tokenizer.to_str().encode())
        print(_said(work), flush=True)
    loss = objective.loss()
    rows = min(ROWS, samples.evaluate_lines, len(work.held))
    measure = lambda count: Reconstruction(work.held[:count], rows, work.padding_id, loss, work.say, check)
    evaluate = measure(samples.evaluate_lines)
    fitted = _run.train(model, loss, batches, training, out, epochs=EPOCHS, mesh=mesh, evaluate=evaluate, best=BEST)
    best, step = _run.final(fitted, training, out, BEST, mesh)
    run = {"steps": int(fitted.state.step), "step": step, "stopped": fitted.stopped}
    return _finished(best, work, out, samples, measure(FINAL * samples.evaluate_lines), run)


def main(argv: Sequence[str] | None = None) -> None:
    """The command: see `--help`."""
    said = "Trains a T5-VAE on lines of text (default: those of Python's standard library)."
    options = parser("t5_vae", said, epochs=EPOCHS, **OWN)
    options.add_argument("lines", nargs="?", metavar="LINES", help="a file of one sample a line, or a directory")
    options.add_argument("--t5", metavar="DIR", help="a T5 to begin with, with its tokenizer")
    for title, record in (("lines", Samples), ("model", Shape), ("loss", Objective)):
        add_options(options, title, record)
    args = options.parse_args(argv)
    parts = {"samples": Samples, "shape": Shape, "objective": Objective}
    given = {name: gathered(args, record) for name, record in parts.items()}
    t5_vae(args.lines, out=args.out, t5=args.t5, training=training_of(args), **given)


def _said(work: Work) -> str:
    lines, held = work.lines, int(work.lines.held.sum())
    return (
        f"{len(lines.texts)} lines, {held} of them held out. Left out: {lines.repeated} repetitions and {lines.skipped}"
        f" lines with more than {lines.ids.shape[1]} tokens."
    )


def _finished(
    model: T5VAE, work: Work, out: Path, samples: Samples, measure: Reconstruction, run: dict[str, Any]
) -> Result:
    """Measures, and writes and prints all."""
    texts = work.held_texts[: len(measure.ids)]
    metrics: dict[str, Any] = measure(model)
    metrics["unigram_accuracy"] = unigram_accuracy(work.lines.ids[~work.lines.held], measure.ids, work.padding_id)
    if measure.check is not None:
        metrics["valid_texts"] = float(np.mean([measure.check(text) for text in texts]))
    metrics |= {"lines": len(texts), "skipped": work.lines.skipped, "repeated": work.lines.repeated}
    metrics |= run
    _run.expect_finite(metrics, out)
    codes = measure.codes(model)
    table, ways = interpolations(measure, model, codes, texts, pairs=samples.pairs, steps=samples.points)
    if jax.process_index() == 0:
        _pictures(out, work, texts, codes, ways)
        written(out / "interpolations.txt", table.encode())
        written(out / "metrics.json", json.dumps(metrics, indent=2).encode())
        _export(model, out)
        print(f"{table}\nwritten: {out / 'model'}\n{_summary(metrics)}", flush=True)
    return Result(model, work.tokenizer, metrics, table)


def _pictures(out: Path, work: Work, texts: Sequence[str], codes: Any, ways: Any) -> None:
    """The plane of all codes, where how long a line is shows, and of Python that of the first one: what it begins with.

    Without three lines, or of one number each, there is no plane and no picture.
    """
    if len(codes) < 3 or codes[0, 0].size < 2:
        return
    tokens = (work.held[: len(codes)] != work.padding_id).sum(1).astype(np.float32)
    latent_picture(out / "latents.png", codes, tokens, what="Codes", meaning="tokens of the line", ways=ways[:2])
    if work.is_python:
        kinds = [kind_of(text) for text in texts]
        latent_picture(out / "kinds.png", codes[:, :1], kinds, what="The first codes", meaning="kind of line")


def _export(model: T5VAE, out: Path) -> None:
    """`model`, and where its family is a published one `exported`: the tokenizer lies in both."""
    import converters

    tokenizer = out / "tokenizer.json"
    save(model, out / "model", extras={tokenizer.name: tokenizer})
    if model.config.as_published:
        converters.export(model, out / "exported")
        written(out / "exported" / tokenizer.name, tokenizer.read_bytes())


def _summary(metrics: dict[str, Any]) -> str:
    said = lambda name: f"{metrics[name]:.3f}"
    lines = [f"teacher-forced accuracy: {said('teacher_forced_accuracy')}", f"exact matches: {said('exact_match')}"]
    if "regulariser" in metrics:
        lines.append(f"regulariser: {metrics['regulariser']:.5f}")
    if "valid" in metrics:
        lines.append(f"valid: {said('valid')} of what is said, {said('valid_texts')} of the lines themselves")
    lines.append(f"accuracy of a unigram: {said('unigram_accuracy')}, with codes shuffled: {said('shuffled_accuracy')}")
    return "\n".join([*lines, f"free-running reconstruction accuracy: {said('accuracy')}"])


if __name__ == "__main__":
    _run.program(main)
