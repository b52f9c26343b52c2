"""Any text -> a language model: characters, BPE or a given tokenizer; a new model or one that goes on.

    python -m eqx_transformers.training.recipes.language_model TEXT.txt --out RESULT
    python -m eqx_transformers.training.recipes.language_model TEXT.txt --from DIR --out RESULT

Without more options it is the functional transformer's own program, in a size that trains within minutes on two cores
(`--quick`: seconds, `--original`: its own numbers). `RESULT` gets what every recipe writes, `tokenizer.json`,
`metrics.json` and `model/` (the native format, with the tokenizer); of GPT-2 and Llama also `exported/`, which
transformers loads. The end of the text is held out; the checkpoint that is best on it is the final model.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from ..._files import written
from ...serialisation import save
from ...sharding import shard_batch
from ..entropy import bigram_entropy, bits_per_character, unigram_entropy
from ..history import History
from ..objectives import language_model_loss
from ..updater import TrainState, Updater
from . import _encoders as encoders
from ._dump import dump
from ._encoders import Path_
from ._gathered import whole
from ._language_models import Shape as Shape, preset
from ._language_setup import MODEL, PATIENCE, Options as Options, Work, optimizer_of, prepared, training_for
from ._options import (
    Settled,
    Training as Training,
    WrongUsage,
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
from ._run import Best, begin, expect_finite, final, program, train
from ._samples import Watch, continued

BEST: Best = ("loss", "min")
EVALUATIONS = 20  # while it trains, where nothing is said
# What may differ when a run goes on, for it is only looked at.
UNSETTLED = ("dump", "sample_every", "sample_tokens", "prompt", "temperature")


class LanguageModelled(NamedTuple):
    """What came out. `metrics` are those of metrics.json, `sample` what the final model says after the prompt."""

    model: Any
    tokenizer: Any
    metrics: dict[str, Any]
    sample: str
    history: History
    stopped: str
    path: Path


def language_model(
    texts: Path_ | Sequence[Path_],
    *,
    out: Path_,
    source: Path_ | None = None,
    shape: Shape | None = None,
    options: Options | None = None,
    training: Training | None = None,
) -> LanguageModelled:
    """Trains a causal language model on the text of files or directories, and measures it on the end of it.

    `source` is a model to go on with, `--from` of the command: a Hugging Face directory or hub id, or a directory of
    this library, with a tokenizer.json; without it a new one is made, of `options.model` and `shape`. Without
    `training`, batch, rate and length of training are those of the model (`training_for`). A second call goes on where
    the first one stopped. Raises `WrongUsage`, a `DataError`, and the converters' errors.
    """
    options, shape = options or Options(), shape or Shape()
    training = training_for(options, source, training)
    if source is not None and (shape.is_given or options.quick or options.original or options.model is not None):
        raise WrongUsage(
            "--from goes on with a model that has its sizes: leave out --model, --quick, --original and all sizes."
        )
    mesh, out = begin(training, out)
    paths = encoders.several(texts)
    with usage():
        work = prepared(paths, source, shape, options, training, out, mesh)
        settle(out, _settings(paths, source, shape, options, training, work))
    baselines = _baselines(work)
    measure = partial(measured, batches=work.evaluated(options.evaluate_batches))
    if leads := jax.process_index() == 0:
        written(out / "tokenizer.json", work.tokenizer_json.encode())
        print("\n".join([*work.said, *_said(baselines), f"before: {_loss(measure(work.model), work)}"]), flush=True)
    steps = training.total(work.batches.per_epoch, work.epochs)
    each = training.evaluate_every or max(1, steps // EVALUATIONS)
    say = lambda model, step: _show(step, work, _sample(model, work, options, training, mesh), leads)
    watch = Watch(measure, say, each, options.sample_every)
    tuned = optimizer_of(options, training, steps, source)
    fitted = train(
        work.model,
        language_model_loss,
        work.batches,
        replace(training, evaluate_every=each, clip_norm=0 if tuned.clips else training.clip_norm),
        out,
        epochs=work.epochs,
        mesh=mesh,
        evaluate=watch,
        best=BEST,
        optimizer=tuned.optimizer,
        schedule=tuned.schedule,
        callbacks=[watch],
        look=None if options.dump is None else partial(_dumped, Path(options.dump), work, mesh),
    )
    model, step = final(fitted, training, out, BEST, mesh)
    run = {"steps": int(fitted.state.step), "step": step, "stopped": fitted.stopped}
    sample = _sample(model, work, options, training, None)
    return _finished(model, work, fitted.history, baselines, run | {"sample": sample}, out)


def measured(model: Any, batches: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`loss`: nats a token, a mean over all tokens that are predicted, without dropout."""
    return encoders.measured(_scored, model, batches)


@eqx.filter_jit
def _scored(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    value, aux = language_model_loss(model, batch)
    return {"loss": value, "weight": aux["weight"]}


def _baselines(work: Work) -> dict[str, float]:
    """Nats a token that need no model, over the same tokens as the held-out loss."""
    train, held, size = work.train_ids, work.held_ids, work.vocab_size
    all_ids = np.concatenate([train, held])
    return {
        "unigram_entropy": unigram_entropy(train, held, size),
        "bigram_entropy": bigram_entropy(train, held, size),
        "own_bigram_entropy": bigram_entropy(all_ids, all_ids, size, smoothing=0),
    }


def _said(baselines: dict[str, float]) -> list[str]:
    unigram, bigram, own = baselines.values()
    return [
        f"held-out entropy, nats a token: unigram {unigram:.4f}, bigram {bigram:.4f}"
        " (by counts of the training part, 1 added to each)",
        f"bigram entropy of the whole text by its own counts: {own:.4f}",
    ]


def _loss(found: dict[str, float], work: Work) -> str:
    bits = bits_per_character(found["loss"], len(work.held_ids), work.held_characters)
    return f"held-out loss {found['loss']:.4f} nats a token, {bits:.4f} bits a character"


def _sample(model: Any, work: Work, options: Options, training: Settled, mesh: Any) -> str:
    if not options.sample_tokens:
        return ""
    model = model if mesh is None else whole(model, mesh)
    key = jax.random.key(training.seed)
    ids = continued(
        model,
        work.prompt_ids,
        new=options.sample_tokens,
        length=work.row_length,
        temperature=options.temperature,
        key=None if options.temperature is None else key,
    )
    return work.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def _show(step: int, work: Work, sample: str, leads: bool) -> None:
    if leads and sample:
        print(f"--- step {step}, after {_prompt(work)!r}:\n{sample}\n---", flush=True)


def _prompt(work: Work) -> str:
    return work.tokenizer.decode(work.prompt_ids.tolist(), skip_special_tokens=False)


def _dumped(directory: Path, work: Work, mesh: Any, updater: Updater, state: TrainState) -> None:
    batch = work.batches[0]
    if jax.process_count() > 1:
        raise WrongUsage("--dump needs one process: leave out --coordinator.")
    dump(directory, updater, state, batch if mesh is None else shard_batch(batch, mesh))
    print(f"written: the step's jaxpr and HLO in {directory}", flush=True)


def _settings(
    paths: list[Any], source: Any, shape: Shape, options: Options, training: Settled, work: Work
) -> dict[str, Any]:
    """All that a run that goes on must agree with."""
    given = {"files": list(map(absolute, paths)), "from": located(source)}
    return settings_of(training, options, shape, without=UNSETTLED) | given | {"texts": work.batches.fingerprint}


def _finished(
    model: Any, work: Work, history: History, baselines: dict[str, float], run: dict[str, Any], out: Path
) -> LanguageModelled:
    found = measured(model, work.evaluated(None))
    metrics: dict[str, Any] = found | baselines
    metrics["bits_per_character"] = bits_per_character(found["loss"], len(work.held_ids), work.held_characters)
    metrics |= {"train_tokens": len(work.train_ids), "held_out_tokens": len(work.held_ids)}
    metrics |= run
    expect_finite(metrics, out)
    if jax.process_index() == 0:
        _export(model, work, out)
        written(out / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False).encode())
    return LanguageModelled(model, work.tokenizer, metrics, run["sample"], history, run["stopped"], out / "model")


def _export(model: Any, work: Work, out: Path) -> None:
    """`model`, and of a family that transformers has `exported`: the tokenizer lies in both."""
    import converters
    from converters.families import FAMILIES

    tokenizer = out / "tokenizer.json"
    save(model, out / "model", extras={tokenizer.name: tokenizer})
    if model.config.family not in FAMILIES:
        return
    path = out / "exported"
    converters.export(model, path, work.origin)
    if work.origin is None:
        # None of the tokens begins or ends a text, as those of the reference's defaults would.
        facts = json.loads((path / "config.json").read_bytes()) | {"bos_token_id": None, "eos_token_id": None}
        written(path / "config.json", json.dumps(facts, indent=2).encode())
        written(path / tokenizer.name, tokenizer.read_bytes())
        written(path / "tokenizer_config.json", json.dumps(work.tokenizer_config, indent=2).encode())


def main(argv: Sequence[str] | None = None) -> None:
    """The command: see `--help`."""
    args = command_line().parse_args(argv)
    said = language_model(
        args.texts,
        out=args.out,
        source=args.source,
        shape=gathered(args, Shape),
        options=gathered(args, Options),
        training=training_of(args),
    )
    if jax.process_index() == 0:
        print(_last(said.metrics, said.path, said.sample))


def _last(metrics: dict[str, Any], path: Path, sample: str) -> str:
    loss, bigram = metrics["loss"], metrics["bigram_entropy"]
    where = "below" if loss < bigram else "not below"
    says = [f"the model says:\n{sample}"] if sample else []
    return "\n".join(
        [
            *says,
            f"written: {path}",
            f"bits a character: {metrics['bits_per_character']:.4f}",
            f"held-out entropy: unigram {metrics['unigram_entropy']:.4f}, bigram {bigram:.4f} nats a token",
            f"held-out loss: {loss:.4f} nats a token, {where} the bigram entropy",
        ]
    )


def command_line() -> argparse.ArgumentParser:
    """All that can be said."""
    own = preset(MODEL, "small")
    said = (
        "Trains a causal language model on any text. Sizes, batch, rate and length of training are the model's own"
        f" where they are not given: of {MODEL}, {own.steps} batches of {own.batch_size} rows of {own.length} tokens"
        f" at a rate of {own.learning_rate:g}. It is evaluated {EVALUATIONS} times, and stops after"
        f" {PATIENCE} without a better one, where no option says otherwise (--quick and --original never)."
    )
    numbers = ("learning_rate", "batch_size", "clip_norm")
    made = parser("language_model", said, **dict.fromkeys(numbers, "the model's own"), evaluate_every="a 20th of all")
    made.add_argument("texts", nargs="+", metavar="TEXT", help="a file in UTF-8, or a directory of them")
    made.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        help="a model to go on with (Hugging Face's or ours), with tokenizer.json",
    )
    add_options(made, "text and training", Options)
    add_options(made, "a new model (where not given: the size's own)", Shape)
    return made


if __name__ == "__main__":
    program(main)
