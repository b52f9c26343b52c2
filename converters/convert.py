"""Checkpoints in: `load`, `inspect`, and the steps that every way in shares."""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_map_with_path
from jaxtyping import PRNGKeyArray

from eqx_transformers import serialisation, stack
from eqx_transformers.skeletons import stacked_paths
from eqx_transformers.surgery.paths import is_array_like, leaves_by_path, spell

from . import hub
from .checkpoint import Checkpoint, open_directory
from .errors import ConversionError, MalformedCheckpoint, SourceNotFound
from .origin import Origin
from .plan import Plan, Request, make_plan, ties_in
from .report import Report, expect_ok

Source = str | os.PathLike[str]
Progress = Callable[[int, int], None]

# Handing an array to the device costs a third of a millisecond, however small: they go in heaps of these many bytes.
AT_ONCE = 64 * 2**20
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


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
    key: PRNGKeyArray | None = None,
    announce: Callable[[Report], None] | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Origin]:
    """(model, origin) of a hub id, a local Hugging Face directory, or a directory in the native format.

    - `head`: one of our classes in the place of the file's architecture (`Encoder`: the bare one). Its own arrays are
      drawn from `key` and reported as new, the file's unused head as dropped.
    - `labels`: how many, or their names; if the file's classifier has another number, its output layer is drawn anew.
    - `override` changes facts by our names (`{"dropout": 0.0}`); `stacked` stacks the blocks.
    - `dtype`: "auto" keeps each tensor's own; "float32", "bfloat16", "float16" cast once.
    - `strict`: anything missing, unexpected or of another shape raises a `Mismatch` with the whole report; unknown
      fields of config.json raise too. `allow_missing` are globs of tree paths (then drawn from `key`),
      `allow_unexpected` globs of the checkpoint's keys.
    - `revision`, `subfolder`, `token`, `local_files_only`: for a hub id, as in huggingface_hub.
    - `announce` is called with the report before a tensor is read, `progress(done, total)` with bytes while they are.

    Every loaded array has memory of its own: none aliases a file. Raises `ConversionError`s; see `converters.errors`.
    """
    _expect_dtype(dtype)
    directory = locate(source, revision=revision, subfolder=subfolder, token=token, local_files_only=local_files_only)
    if serialisation.is_native(directory):
        return _native(directory, head, labels, override, stacked, dtype)
    checkpoint = open_directory(directory)
    plan = settled(checkpoint, Request(head, labels, override, stacked, strict, allow_missing, allow_unexpected))
    model = filled(plan, checkpoint, dtype, key, announce, progress)
    return model, origin_of(source, revision, checkpoint, plan, labels)


def inspect(
    source: Source,
    *,
    head: type | None = None,
    labels: int | Sequence[str] | None = None,
    override: Mapping[str, Any] | None = None,
    strict: bool = True,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Report:
    """What `load` would do, from headers alone: nothing is raised for a report that is not clean."""
    directory = locate(source, revision=revision, subfolder=subfolder, token=token, local_files_only=local_files_only)
    if serialisation.is_native(directory):
        raise ConversionError(
            f"{directory} is in the native format: there is nothing to convert; converters.load loads it."
        )
    return make_plan(open_directory(directory), Request(head, labels, override, strict=strict)).report


def locate(source: Source, **options: Any) -> Path:
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
        return hub.fetch(source, **options)
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
    if any(alias.endswith(".weight") for alias, _ in unequal):
        plan = make_plan(checkpoint, request, untied=True, **options)
        unequal = [(a, b) for a, b in ties_in(plan) if not _equal(checkpoint, a, b)]
    if unequal:
        alias, owner = unequal[0]
        raise MalformedCheckpoint(
            f"{alias} and {owner} are two names of one tensor, but the file holds different numbers."
        )
    return plan


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    x, y = checkpoint.get(a), checkpoint.get(b)
    return x.dtype == y.dtype and x.tobytes() == y.tobytes()


def _expect_dtype(dtype: str) -> None:
    if dtype != "auto" and dtype not in DTYPES:
        raise ConversionError(f"dtype = {dtype!r} is not one of auto, {', '.join(DTYPES)}.")


def filled(
    plan: Plan,
    checkpoint: Checkpoint,
    dtype: str,
    key: PRNGKeyArray | None,
    announce: Callable[[Report], None] | None = None,
    progress: Progress | None = None,
) -> Any:
    """The model of a plan, if its report is clean; the last steps of every way in."""
    _expect_dtype(dtype)
    expect_ok(plan.report)
    _expect_kept(plan, checkpoint, dtype)
    if announce is not None:
        announce(plan.report)
    return _fill(plan, checkpoint, dtype, key, progress)


def _fill(
    plan: Plan, checkpoint: Checkpoint, dtype: str, key: PRNGKeyArray | None, progress: Progress | None = None
) -> Any:
    """The skeleton with every array read, one tensor at a time, or drawn from `key`."""
    arrays = _drawn(plan, key, dtype)
    total = sum(checkpoint.size(plan.names[k]) for link in plan.links for k in link.keys)
    done, waiting = 0, {}
    for i, link in enumerate(plan.links, start=1):
        leaves = link.read(lambda k: _cast(checkpoint.get(plan.names[k]), dtype))
        waiting |= {path: _owned(x) for path, x in leaves.items()}
        done += sum(checkpoint.size(plan.names[k]) for k in link.keys)
        if i == len(plan.links) or sum(x.nbytes for x in waiting.values()) >= AT_ONCE:
            arrays |= jax.device_put(waiting)
            waiting = {}
        if progress is not None:
            progress(done, total)
    return tree_map_with_path(lambda path, leaf: arrays[spell(path)] if is_array_like(leaf) else leaf, plan.skeleton)


def _owned(x: np.ndarray) -> np.ndarray:
    # An op may give a view (a part of a fused tensor): JAX would keep all of what it views alive, and strides cost.
    return x if x.base is None or (x.flags.c_contiguous and x.nbytes + 64 >= _root(x).nbytes) else np.array(x)


def _root(x: np.ndarray) -> np.ndarray:
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def _cast(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "auto":
        return x.astype(DTYPES[dtype], copy=False)
    return x


def _expect_kept(plan: Plan, checkpoint: Checkpoint, dtype: str) -> None:
    """Nothing would be narrowed that was not asked to be; known before a tensor is read."""
    for key in (plan.names[key] for link in plan.links for key in link.keys):
        own = checkpoint.specs[key].numpy_dtype
        if dtype == "auto" and jax.dtypes.canonicalize_dtype(own) != own:
            raise ConversionError(
                f"{key} is {own}, which JAX would narrow to {jax.dtypes.canonicalize_dtype(own)} without a word:"
                " ask for it with dtype='float32' (--dtype float32), or set jax_enable_x64."
            )


def _drawn(plan: Plan, key: PRNGKeyArray | None, dtype: str) -> dict[str, Any]:
    new = plan.report.new
    if not new:
        return {}
    if key is None:
        raise ConversionError(
            f"{', '.join(new)}: not in the file, so drawn at random, which needs key=jax.random.key(…)."
        )

    @eqx.filter_jit
    def draw(key: PRNGKeyArray) -> dict[str, Any]:  # jitted: what is not returned is never computed
        model = plan.model_class(plan.config, key=key)
        leaves = leaves_by_path(stack(model) if stacked_paths(plan.skeleton) else model)
        return {path: leaves[path] for path in new}

    drawn = draw(key)
    return drawn if dtype == "auto" else {path: x.astype(DTYPES[dtype]) for path, x in drawn.items()}


def _native(directory: Path, head: Any, labels: Any, override: Any, stacked: bool, dtype: str) -> tuple[Any, Origin]:
    if (head, labels, override, dtype) != (None, None, None, "auto") or stacked:
        raise ConversionError(
            f"{directory} is in the native format and is loaded as it was saved; head, labels, override, dtype and"
            " stacked are for checkpoints. Use Head.of(…), reconfigure(…) or stack(…) on the loaded model."
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
