"""`python -m converters.hf SOURCE`: a Hugging Face checkpoint becomes an Equinox model, proven equal.

Exit codes: 0 done; 2 usage, source not found, hub unreachable; 3 malformed, unsafe or unsupported; 4 the report is not
clean; 5 verification failed.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eqx_transformers import save
from eqx_transformers._files import expect_replaceable

from . import arguments, arrays, convert, demo, peft
from .arguments import HEADS, WrongUsage
from .errors import ConversionError, Mismatch, SourceNotFound
from .export import export
from .filling import Progress
from .listing import listing
from .origin import Origin
from .peft.reading import expect, files
from .report import Report
from .scan import scan
from .verify import prepared, verify

__all__ = ["main"]

DONE, USAGE, MALFORMED, UNCLEAN, DIFFERENT = 0, 2, 3, 4, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    said: dict[str, Any] = {"source": None}
    as_json = "--json" in argv
    try:
        args = arguments.parse(argv)
        said["source"] = args.source
        code = _run(args, said)
    except Mismatch as error:
        code = _failed(said | {"report": error.report.as_json()}, UNCLEAN, error, as_json)
    except BrokenPipeError:
        raise
    except (WrongUsage, SourceNotFound, ImportError, OSError) as error:
        code = _failed(said, USAGE, error, as_json)
    except ConversionError as error:
        code = _failed(said, MALFORMED, error, as_json)
    else:
        if as_json:
            _dump(said | {"code": code})
    return code


def _run(args: argparse.Namespace, said: dict[str, Any]) -> int:
    """Fills `said`, what is printed with --json, and prints the rest; returns the exit code."""
    import jax

    options: dict[str, Any] = {"head": HEADS.get(args.head), "labels": args.labels, "strict": not args.no_strict}
    options["dtype"] = args.dtype
    if args.scan and not _scanned(args, said):
        return MALFORMED
    if args.dry_run:
        report = _inspect(args, options)
        said["report"] = report.as_json()
        _print(args, f"{listing(report)}\n\n{report}")
        return DONE if report.ok else UNCLEAN
    _expect_free(args)  # before the work, not after it; so is what follows
    if args.adapter is not None:
        expect(args.adapter)
    if args.verify:
        prepared(args.record, args.against, adapter=args.adapter is not None)

    def announce(report: Report) -> None:
        said["report"] = report.as_json()
        _print(args, str(report))

    begin = time.perf_counter()
    with _progress(args) as progress:
        options |= {"key": jax.random.key(args.seed), "announce": announce, "allow_overflow": args.allow_overflow}
        model, origin = _load(args, options, progress)
    _print(args, f"read in {time.perf_counter() - begin:.1f} s")
    if args.verify:
        asked = {"gradients": args.gradients, "record": args.record, "against": args.against, "adapter": args.adapter}
        verification = verify(args.source, model=model, origin=origin, **asked)
        said["verification"] = verification.as_json()
        _print(args, str(verification))
        if not verification.passed:
            print("error: verification failed, so nothing was written", file=sys.stderr)
            return DIFFERENT
    if args.adapter is not None:
        model = _with_adapter(args, model, origin)
    _write(args, model, origin, said)
    if args.demo:
        said["demo"] = demo.table(model, origin)
        _print(args, said["demo"])
    return DONE


def _with_adapter(args: argparse.Namespace, model: Any, origin: Origin) -> Any:
    """What is written: the adapter merged into the base, or the base, to which it has been found to belong."""
    if args.merge or not args.verify:  # the verification has loaded it
        adapted = peft.adapted(model, origin, args.adapter, merge=args.merge)
        model = adapted if args.merge else model
    _print(args, f"{args.adapter} {'is merged into it' if args.merge else 'belongs to it'}")
    return model


def _scanned(args: argparse.Namespace, said: dict[str, Any]) -> bool:
    with _progress(args) as progress:
        found = scan(args.source, revision=args.revision, progress=progress)
    said["scan"] = found.as_json()
    _print(args, str(found))
    if not found.ok:
        print("error: some tensors hold NaN or infinities, so nothing was written", file=sys.stderr)
    return found.ok


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
        if (place / "config.json").is_file() and arguments.is_native(place) != native:
            kind = "a Hugging Face model" if native else "an Equinox model"
            raise FileExistsError(f"{place} holds {kind}, which would be replaced; choose another directory.")
    if args.out is not None and args.export is not None and args.out.absolute() == args.export.absolute():
        raise FileExistsError(f"--out and --export are one directory, {args.out}; choose two.")


def _write(args: argparse.Namespace, model: Any, origin: Origin, said: dict[str, Any]) -> None:
    if args.out is not None:
        companions = {name: Path(origin.directory or "") / name for name in origin.files}
        beside = [] if args.adapter is None or args.merge else files(args.adapter)
        companions |= {f"adapter/{path.name}": path for path in beside}
        save(model, args.out, extras={"origin": origin.as_json(), **companions})
        said["out"] = str(args.out)
        adapts = f"; converters.peft.load(model, {str(args.out / 'adapter')!r}) adapts it" if beside else ""
        _print(args, f"wrote {args.out} (eqx_transformers.load reads it{adapts})")
    if args.export is not None:
        export(model, args.export, origin)
        said["export"] = str(args.export)
        _print(args, f"wrote {args.export} (transformers.AutoModel….from_pretrained reads it)")


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


def _exit() -> None:
    """As a program: whoever closes the pipe, or interrupts, is not told off with a traceback."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to say goes nowhere
        code = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted; nothing is left half-written", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)


if __name__ == "__main__":
    _exit()
