"""The options of `classify`, beside those of `Training`, and its command line."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from ._encoders import SHAPES
from ._options import WrongUsage, expect_at_least, expect_share, parser
from ._tuned import RATE_SAID, Adapter

EPOCHS = 3.0
LONGEST = 512  # tokens, where the model has room for more and nothing is said


@dataclass(frozen=True, kw_only=True)
class Options:
    """How texts are read and a model is tuned, beside `Training`.

    - `validation`, a file, or `hold_out`, a share of every class of the training texts: what decides which checkpoint
      is the final model. Without it, that is the last one.
    - `text`, `label`: columns; two of texts, for pairs. Classes are the labels that occur in training, sorted.
    - `max_length`: longer texts are cut, and counted; None: what the model has room for, 512 at most.
    - `max_shapes`: the number of lengths that batches are padded to; each is a program to compile.
    - `lora`: adapters are trained (of this rank; `Adapter` says more of them), the head whole, and nothing else.
    - `freeze`: patterns of paths that are not trained, `backbone.embedding` say.
    - `layer_decay`: the rate of a layer is so much that of the next one.
    - `original`: the RoBERTa article's optimizer and schedule (`originals.roberta_article`) in the place of AdamW.
    - `override`: facts of the model by our names, such as `{"dropout": 0.0}`.

    Raises `WrongUsage` for what contradicts itself.
    """

    validation: str | PathLike[str] | None = None
    hold_out: float | None = None
    text: str | tuple[str, str] = "text"
    label: str = "label"
    max_length: int | None = None
    max_shapes: int = SHAPES
    lora: Adapter | int | None = None
    freeze: tuple[str, ...] = ()
    layer_decay: float | None = None
    original: bool = False
    override: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.validation is not None and self.hold_out is not None:
            raise WrongUsage("--validation and --hold-out both say what is held out: give one of them.")
        if self.hold_out is not None:
            expect_share("--hold-out", self.hold_out)
        expect_at_least(self, {"max_shapes": 1, "max_length": 1})
        if (rank := self.lora.rank if isinstance(self.lora, Adapter) else self.lora) is not None and rank < 1:
            raise WrongUsage(f"--lora {rank} must be at least 1.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise WrongUsage(f"--layer-decay {self.layer_decay} must be above 0 and at most 1.")
        if self.lora is not None and self.freeze:
            raise WrongUsage("--lora trains adapters and the head alone, so there is nothing to --freeze.")
        if self.original and self.layer_decay is not None:
            raise WrongUsage("--original has one rate for all layers: leave out --layer-decay.")

    @property
    def holds_out(self) -> bool:
        return self.validation is not None or self.hold_out is not None


def options_of(args: argparse.Namespace) -> Options:
    """The options of a command line. Raises `WrongUsage` as `Options` does."""
    if len(args.text) > 2:
        raise WrongUsage(f"--text takes one column or two, not {len(args.text)}.")
    lora = None
    if args.lora is not None:
        lora = Adapter(args.lora, args.lora_alpha, tuple(args.lora_targets or Adapter(1).targets), args.lora_dropout)
    elif args.lora_alpha is not None or args.lora_targets or args.lora_dropout:
        raise WrongUsage("--lora-alpha, --lora-targets and --lora-dropout need --lora RANK.")
    if args.no_buckets and args.max_shapes is not None:
        raise WrongUsage("--no-buckets is --max-shapes 1: give one of them.")
    shapes = 1 if args.no_buckets else args.max_shapes
    return Options(
        validation=args.validation,
        hold_out=args.hold_out,
        text=args.text[0] if len(args.text) == 1 else (args.text[0], args.text[1]),
        label=args.label,
        max_length=args.max_length,
        max_shapes=SHAPES if shapes is None else shapes,
        lora=lora,
        freeze=tuple(args.freeze),
        layer_decay=args.layer_decay,
        original=args.original,
        override=dict(_override(one) for one in args.override),
    )


def _override(given: str) -> tuple[str, Any]:
    name, equals, value = given.partition("=")
    try:
        return name, json.loads(value if equals else "")
    except json.JSONDecodeError as error:
        raise WrongUsage(f"--override {given}: expected NAME=NUMBER, such as dropout=0.2, or NAME=null.") from error


def command_line() -> argparse.ArgumentParser:
    """All that can be said."""
    made = parser("classify", "Fine-tunes a text classifier.", learning_rate=RATE_SAID, epochs=EPOCHS)
    add = made.add_argument_group("classifier").add_argument
    add("--model", required=True, metavar="DIR", help="a Hugging Face directory or hub id, with tokenizer.json")
    add(
        "--train", required=True, metavar="FILE", help=".tsv, .csv (with a header) or .jsonl; other columns are ignored"
    )
    add("--test", metavar="FILE", help="looked at once, by the final model")
    add("--validation", metavar="FILE", help="looked at after every epoch; the best checkpoint is the final model")
    add("--hold-out", type=float, metavar="SHARE", help="of the training texts, in the place of --validation")
    add("--text", nargs="+", default=["text"], metavar="COLUMN", help="of the texts; two, for pairs (default text)")
    add("--label", default="label", metavar="COLUMN", help="of the labels (default label)")
    add("--max-length", type=int, help=f"tokens; longer texts are cut (default: the model's room, {LONGEST} at most)")
    add("--max-shapes", type=int, help=f"lengths that batches are padded to (default {SHAPES})")
    add("--no-buckets", action="store_true", help="one length for all")
    add("--lora", type=int, metavar="RANK", help="train adapters of this rank, and the head whole")
    add("--lora-alpha", type=float, help="their scale times the rank (default: twice the rank)")
    add(
        "--lora-targets",
        nargs="+",
        metavar="PATTERN",
        help=f"where linear layers get one (default {' '.join(Adapter(1).targets)})",
    )
    add("--lora-dropout", type=float, default=0.0, help="in front of the adapters (default 0)")
    add("--freeze", nargs="+", default=[], metavar="PATTERN", help="paths that are not trained: backbone.embedding")
    add("--layer-decay", type=float, metavar="RATE", help="the learning rate of a layer, of that of the next one")
    add("--original", action="store_true", help="the RoBERTa article's Adam, clipping and schedule, not AdamW")
    add("--override", nargs="+", default=[], metavar="NAME=VALUE", help="facts of the model: dropout=0.0")
    return made
