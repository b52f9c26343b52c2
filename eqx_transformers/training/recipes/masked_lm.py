"""Texts -> an encoder that was pre-trained on them, as a masked language model: a given one goes on, or a new one.

    python -m eqx_transformers.training.recipes.masked_lm TEXTS.txt [MORE.txt] --model DIR --out RESULT
    python -m eqx_transformers.training.recipes.masked_lm TEXTS.txt --from-scratch --layers 4 --out RESULT

`RESULT` gets what every recipe writes, `metrics.json`, and `model/`, a directory that transformers loads, with its
tokenizer. A share of the texts is held out; the checkpoint that restores their masked tokens best is the final model.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax

from ..._files import written
from ...models.encoder_config import ROBERTA
from ...models.heads import MaskedLM
from ..batching import Buckets
from ..corruption import mask_tokens
from ..data import Batches
from ..history import History
from ..objectives import masked_lm_loss
from ..packing import Packed
from ..vocabularies import load_tokenizer, train_tokenizer, word_starts
from . import _encoders as encoders
from ._encoders import Path_
from ._lines import held_out
from ._masked_lm_options import Options, Shape
from ._options import (
    Settled,
    Training,
    WrongUsage,
    absolute,
    add_options,
    gathered,
    kept_tokenizer,
    located,
    parser,
    settings_of,
    settle,
    training as training_of,
    usage,
)
from ._run import Best, begin, expect_finite, final, program, train

EPOCHS = 3
BEST: Best = ("loss", "min")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # the ids that RoBERTa gives them
MASKS = ("<mask>", "[MASK]")


class MaskedLMResult(NamedTuple):
    """What came out: `before` and `after` are the loss and accuracy of held-out tokens, `path` has the model."""

    model: Any
    tokenizer: Any
    before: dict[str, float]
    after: dict[str, float]
    history: History
    stopped: str
    path: Path


class Ready(NamedTuple):
    """A model to be trained, where it came from (None: it is new), its tokenizer and what to say of it."""

    model: Any
    origin: Any
    tokenizer: Any
    said: str


def masked_lm(
    texts: Path_ | Sequence[Path_],
    *,
    out: Path_,
    model: Path_ | None = None,
    scratch: Shape | None = None,
    training: Training | None = None,
    options: Options | None = None,
) -> MaskedLMResult:
    """Trains an encoder to restore hidden tokens of the texts, and measures it on held-out ones before and after.

    `texts` are files or directories: plain ones have a text a line. `model` is a Hugging Face directory or a hub id,
    with a tokenizer.json, whose masked-LM head is drawn anew if it has none; in its place `scratch` says what a new one
    looks like. Of the held-out texts the same tokens are hidden every time. A second call goes on where the first one
    stopped. Raises `WrongUsage`, a `DataError` with file and line, and the converters' errors.
    """
    training, options = (training or Training()).settled(), options or Options()
    if (model is None) == (scratch is None):
        raise WrongUsage("Give either --model DIR, to go on with a model, or --from-scratch, for a new one.")
    mesh, out = begin(training, out)
    paths = encoders.several(texts)
    found = encoders.read(paths, options.text, {options.text: "--text"}).texts
    held = held_out(found, options.hold_out)
    shares = [[text for text, out_ in zip(found, held, strict=True) if out_ == which] for which in (False, True)]
    with usage():
        made = _new(shares[0], out, scratch, training, options) if scratch else _given(model, training)
        batches, scored, said = _prepared(made, shares, training, options, mesh)
        settle(out, _settings(paths, model, scratch, training, options, batches))
    before = measured(made.model, scored)
    if jax.process_index() == 0:
        if made.origin is None:
            written(out / "tokenizer.json", made.tokenizer.to_str().encode())
        print(f"{said}\n{made.said}\nbefore: {_told(before)}", flush=True)
    evaluate = partial(measured, batches=scored)
    fitted = train(
        made.model, masked_lm_loss, batches, training, out, epochs=EPOCHS, mesh=mesh, evaluate=evaluate, best=BEST
    )
    trained, step = final(fitted, training, out, BEST, mesh)
    result = MaskedLMResult(
        trained, made.tokenizer, before, measured(trained, scored), fitted.history, fitted.stopped, out / "model"
    )
    _write(result, made, out, {"steps": int(fitted.state.step), "step": step, "stopped": fitted.stopped})
    return result


def measured(model: Any, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """`loss` and `accuracy`, means over all tokens that are to be restored, without dropout."""
    return encoders.measured(_scored, model, batches)


@eqx.filter_jit
def _scored(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    value, aux = masked_lm_loss(model, batch, accuracy=True)
    return {"loss": value, "accuracy": aux["accuracy"], "weight": aux["weight"]}


def _given(source: Any, training: Settled) -> Ready:
    model, origin, said = encoders.loaded(source, MaskedLM, training.seed)
    return Ready(model, origin, load_tokenizer(origin.directory), said)


def _new(texts: list[str], out: Path, shape: Shape, training: Settled, options: Options) -> Ready:
    """A RoBERTa, and a tokenizer made of what is trained on (or that of the run, where it goes on)."""
    kept = kept_tokenizer(out)
    make = partial(train_tokenizer, texts, "bpe", special_tokens=SPECIAL, begin=SPECIAL[0], end=SPECIAL[2])
    tokenizer = make(vocab_size=shape.vocab_size) if kept is None else load_tokenizer(kept)
    config = replace(
        ROBERTA,
        vocab_size=tokenizer.get_vocab_size(),
        embed_dim=shape.embed_dim,
        num_layers=shape.layers,
        num_heads=shape.heads,
        mlp_dim=shape.mlp_dim,
        max_positions=(options.max_length or encoders.LONGEST) + SPECIAL.index("<pad>") + 1,  # rows not for tokens
        dropout=shape.dropout,
        attention_dropout=shape.dropout,
    )
    model = MaskedLM(config, key=jax.random.key(training.seed))
    count = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    said = f"a new RoBERTa of {count:,} parameters, and a tokenizer of {config.vocab_size} tokens"
    return Ready(model, None, tokenizer, said)


def _prepared(
    made: Ready, shares: list[list[str]], training: Settled, options: Options, mesh: Any
) -> tuple[Batches, Batches, str]:
    """Batches of what is trained on and of what is held out, and what to say of them."""
    limit, rows = encoders.limit(made.model, options.max_length), training.batch_size
    size = made.model.config.vocab_size
    kept, held = (encoders.tokenized(texts, made.tokenizer, size, limit) for texts in shares)
    corrupt = _corruption(made.tokenizer, options)
    packed = Packed(rows, limit) if options.pack else None
    layout = packed or Buckets(rows, max_shapes=options.max_shapes)
    batches = encoders.shuffled(kept, layout, made.model.config, training.seed, mesh, transform=corrupt)
    layout = packed or encoders.same_lengths(held, rows, batches)
    scored = encoders.in_order(held, layout, made.model.config, transform=corrupt, seed=training.seed)
    hidden = sum(int((batch["targets"] >= 0).sum()) for batch in scored)
    if not hidden:
        raise WrongUsage(
            f"No token of the {len(held)} held-out texts is hidden: give more texts, or a larger --mask-rate."
        )
    cut = kept.truncated + held.truncated
    said = f"{len(kept)} texts, and {len(held)} held out, of which {hidden} tokens are hidden"
    return batches, scored, said + (f"; {cut} are cut to {limit} tokens" if cut else "")


def _corruption(tokenizer: Any, options: Options) -> Any:
    masks = [i for name in MASKS if (i := tokenizer.token_to_id(name)) is not None]
    if not masks:
        raise WrongUsage(f"The tokenizer has no token for what is hidden: one of {', '.join(MASKS)} is needed.")
    return partial(
        mask_tokens,
        vocab_size=tokenizer.get_vocab_size(),
        mask_id=masks[0],
        special_ids=[i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special],
        rate=options.mask_rate,
        words=word_starts(tokenizer) if options.whole_words else None,
    )


def _settings(
    paths: list[Any], model: Any, shape: Shape | None, training: Settled, options: Options, batches: Batches
) -> dict[str, Any]:
    """All that a run that goes on must agree with."""
    given = {"from_scratch": None if shape is None else asdict(shape), "model": located(model)}
    given |= {"files": list(map(absolute, paths)), "texts": batches.fingerprint}
    return settings_of(training, options) | given


def _told(found: dict[str, float]) -> str:
    return f"held-out loss {found['loss']:.3f}, accuracy {found['accuracy']:.3f}"


def _write(result: MaskedLMResult, made: Ready, out: Path, run: dict[str, Any]) -> None:
    import converters

    metrics = {"before": result.before, "after": result.after} | run
    expect_finite(metrics, out)
    if jax.process_index() > 0:
        return
    converters.export(result.model, result.path, made.origin)
    if made.origin is None:
        told = TOKENIZER_CONFIG | {"model_max_length": result.model.backbone.room}
        written(result.path / "tokenizer.json", made.tokenizer.to_str().encode())
        written(result.path / "tokenizer_config.json", json.dumps(told, indent=2).encode())
    written(out / "metrics.json", json.dumps(metrics, indent=2).encode())


# What transformers must be told of a tokenizer.json that nobody made there.
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True)),
    "cls_token": SPECIAL[0],
    "sep_token": SPECIAL[2],
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command: see `--help`."""
    args = _parser().parse_args(argv)
    scratch = gathered(args, Shape)
    if not args.from_scratch and scratch != Shape():
        raise WrongUsage("--layers, --heads, --embed-dim, --mlp-dim, --vocab-size and --dropout need --from-scratch.")
    said = masked_lm(
        args.texts,
        model=args.model,
        scratch=scratch if args.from_scratch else None,
        out=args.out,
        training=training_of(args),
        options=gathered(args, Options),
    )
    if jax.process_index() == 0:
        print(f"written: {said.path}")
        print(encoders.improved("loss", said.before, said.after, "loss"))
        print(encoders.improved("accuracy", said.before, said.after, "accuracy"))


def _parser() -> argparse.ArgumentParser:
    said = f"Pre-trains an encoder as a masked language model ({EPOCHS} epochs, if not said)."
    made = parser("masked_lm", said, epochs=EPOCHS)
    made.add_argument("texts", nargs="+", metavar="TEXT", help="a file of a text a line, a table, or a directory")
    made.add_argument("--model", metavar="DIR", help="a Hugging Face directory or hub id, with tokenizer.json")
    made.add_argument("--from-scratch", action="store_true", help="a new model, and a tokenizer made of the texts")
    add_options(made, "texts", Options)
    add_options(made, "model, with --from-scratch", Shape)
    return made


if __name__ == "__main__":
    program(main)
