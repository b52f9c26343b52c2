"""Checkpoints in: `load`, `inspect`, and the steps that every way in shares."""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Sharding
from jaxtyping import PRNGKeyArray

from eqx_transformers import serialisation

from . import hub, hub_headers
from .checkpoint import Checkpoint, open_directory
from .errors import ConversionError, MalformedCheckpoint, SourceNotFound
from .filling import Form, Progress, expect_kept, expected_memory, filled
from .origin import Origin
from .plan import Plan, make_plan, ties_in
from .report import Report
from .request import Request
from .sharded import Place

Source = str | os.PathLike[str]


def load(
    source: Source,
    *,
    head: type | None = None,
    labels: int | Sequence[str] | None = None,
    override: Mapping[str, Any] | None = None,
    stacked: bool = False,
    dtype: str = "auto",
    strict: bool = True,
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    sharding: Sharding | Place | None = None,
    allow_overflow: bool = False,
    key: PRNGKeyArray | None = None,
    announce: Callable[[Report], None] | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Origin]:
    """(model, origin) of a hub id, a local Hugging Face directory, or a directory in the native format.

    - `head`: one of our classes in the place of the file's architecture (`Encoder`, `GPT2`, `Llama`: the bare one). Its
      own arrays are drawn from `key` and reported as new, the file's unused head as dropped.
    - `labels`: how many, or their names; if the file's classifier has another number, its output layer is drawn anew.
    - `override` changes facts by our names (`{"dropout": 0.0}`); `stacked` stacks the blocks.
    - `dtype`: "auto" keeps each tensor's own; "float32", "bfloat16", "float16" cast once. Numbers beyond the dtype's
      range raise, with the tensors' names, unless `allow_overflow` lets them become infinite.
    - `strict`: anything missing, unexpected or of another shape raises a `Mismatch` with the whole report; unknown
      fields of config.json raise too. `allow_missing` are globs of tree paths (then drawn from `key`),
      `allow_unexpected` globs of the checkpoint's keys.
    - `sharding`: where the arrays are to lie, a `jax.sharding.Sharding` for all or a function of (path, shape and
      dtype) that gives one. Of each tensor only the parts that this process's devices hold are read.
    - `revision`, `subfolder`, `token`, `local_files_only`: for a hub id, as in huggingface_hub.
    - `announce` is called with the report before a tensor is read, `progress(done, total)` with bytes while they are.

    Every loaded array has memory of its own: none aliases a file. Raises `ConversionError`s; see `converters.errors`.
    """
    form = Form(dtype, allow_overflow, sharding)
    directory = locate(source, revision=revision, subfolder=subfolder, token=token, local_files_only=local_files_only)
    if serialisation.is_native(directory):
        return _native(directory, head, labels, override, stacked, form)
    checkpoint = open_directory(directory)
    plan = settled(checkpoint, Request(head, labels, override, stacked, strict, allow_missing, allow_unexpected))
    model = filled(plan, checkpoint, form, key, announce, progress)
    return model, origin_of(source, revision, checkpoint, plan, labels)


def inspect(
    source: Source,
    *,
    head: type | None = None,
    labels: int | Sequence[str] | None = None,
    override: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    strict: bool = True,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Report:
    """What `load` would do, from headers alone: nothing is raised for a report that is not clean.

    `str(report)` is its summary, `converters.listing(report)` a line for every tensor.
    """
    form = Form(dtype)
    options = {"revision": revision, "subfolder": subfolder, "token": token, "local_files_only": local_files_only}
    directory = locate(source, fetch=hub_headers.fetch_headers, **options)
    if serialisation.is_native(directory):
        raise ConversionError(
            f"{directory} is in the native format: there is nothing to convert; converters.load loads it."
        )
    checkpoint = open_directory(directory)
    plan = make_plan(checkpoint, Request(head, labels, override, strict=strict))
    if plan.report.ok:
        expect_kept(plan, checkpoint, form)
    return replace(plan.report, memory=expected_memory(plan, checkpoint, form))


def locate(source: Source, *, fetch: Callable[..., Path] = hub.fetch, **options: Any) -> Path:
    """The local directory of a source: itself, or what is fetched from the hub.

    Raises a `SourceNotFound` for what is neither a directory nor looks like a hub id, or is not on the hub.
    """
    path = Path(source)
    subfolder = options.get("subfolder")
    if path.is_dir():
        inner = path / subfolder if subfolder else path
        if not inner.is_dir():
            raise SourceNotFound(f"{path} has no directory {subfolder!r}.")
        return inner
    if path.exists():
        raise SourceNotFound(f"{path} is a file; give the directory that holds config.json and the weights.")
    if not isinstance(source, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        raise SourceNotFound(
            f"There is no directory {os.fspath(source)!r}, and that is not a hub id (NAME or OWNER/NAME)."
        )
    try:
        return fetch(source, **options)
    except SourceNotFound as error:
        raise SourceNotFound(f"There is no directory {source!r} here, so it was taken for a hub id. {error}") from error


def settled(checkpoint: Checkpoint, request: Request, **options: Any) -> Plan:
    """The plan, with ties checked: where a tied config meets two different tensors, the tensors are believed.

    `options` are those of `make_plan`.
    """
    plan = make_plan(checkpoint, request, **options)
    unequal = [] if not plan.report.ok else [(a, b) for a, b in ties_in(plan) if not _equal(checkpoint, a, b)]
    if not unequal:
        return plan
    if any(alias.endswith((".weight", "/kernel")) for alias, _ in unequal):
        plan = make_plan(checkpoint, request, untied=True, **options)
        unequal = [(a, b) for a, b in ties_in(plan) if not _equal(checkpoint, a, b)]
    if unequal:
        alias, owner = unequal[0]
        raise MalformedCheckpoint(
            f"{alias} and {owner} are two names of one tensor, but the file holds different numbers."
        )
    return plan


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    ours, theirs = checkpoint.specs[a], checkpoint.specs[b]
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return False
    x, y = checkpoint.get(a), checkpoint.get(b)
    as_bytes = lambda z: np.ascontiguousarray(z).reshape(-1).view(np.uint8)
    return bool(np.array_equal(as_bytes(x), as_bytes(y)))


def _native(directory: Path, head: Any, labels: Any, override: Any, stacked: bool, form: Form) -> tuple[Any, Origin]:
    if (head, labels, override, form.dtype, form.sharding) != (None, None, None, "auto", None) or stacked:
        raise ConversionError(
            f"{directory} is in the native format and is loaded as it was saved; head, labels, override, dtype, stacked"
            " and sharding are for checkpoints. Use Head.of(…), reconfigure(…), stack(…) or jax.device_put on the"
            " loaded model."
        )
    try:
        model, extras = serialisation.load(directory)
    except serialisation.FormatError as error:
        raise MalformedCheckpoint(str(error)) from error
    if "origin" not in extras:
        raise ConversionError(f"{directory} was not made by a converter; eqx_transformers.load reads it.")
    try:
        return model, Origin.from_json(extras["origin"])
    except TypeError as error:
        raise MalformedCheckpoint(
            f"{directory}/origin.json does not say where the model came from ({error})."
        ) from error


def origin_of(source: Source, revision: str | None, checkpoint: Checkpoint, plan: Plan, labels: Any) -> Origin:
    """Where a model of this plan came from."""
    config = dict(checkpoint.config)
    if labels is not None:
        names = list(labels) if not isinstance(labels, int) else [f"LABEL_{i}" for i in range(labels)]
        config |= {
            "id2label": {str(i): n for i, n in enumerate(names)},
            "label2id": {n: i for i, n in enumerate(names)},
        }
    return Origin(
        source=os.fspath(source),
        revision=revision,
        directory=None if checkpoint.directory is None else str(checkpoint.directory.absolute()),
        family=plan.family.model_type,
        architecture=plan.architecture,
        config=config,
        layout=checkpoint.layout,
        dtypes={k: s.dtype for k, s in checkpoint.specs.items()},
        metadata=checkpoint.metadata,
        tied=plan.report.tied,
        renamed=plan.report.renamed,
        ignored=plan.report.ignored,
        dropped=plan.report.dropped,
        files=companions(checkpoint.directory),
    )


def companions(directory: Path | None) -> list[str]:
    """The files beside the weights that travel with a model."""
    return [] if directory is None else [name for name in hub.COMPANIONS if (directory / name).is_file()]
