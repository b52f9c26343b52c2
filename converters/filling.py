"""From a plan to a model: every tensor read once, cast once, and handed over without a second copy."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.tree_util import tree_map_with_path
from jaxtyping import PRNGKeyArray

from eqx_transformers import stack
from eqx_transformers.skeletons import stacked_paths
from eqx_transformers.surgery.paths import is_array_like, leaves_by_path, spell
from eqx_transformers.tensor_file import copied

from .checkpoint import Checkpoint
from .errors import ConversionError, Mismatch
from .plan import Plan
from .report import Report, expect_ok
from .rules import Link
from .sharded import Place, bytes_of, place, read_parts

Progress = Callable[[int, int], None]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# Handing an array to the device costs a third of a millisecond, however small: they go in heaps of these many bytes.
AT_ONCE = 64 * 2**20
THREADS, AHEAD = min(4, os.cpu_count() or 1), 3


@dataclass(frozen=True)
class Form:
    """How the numbers of a file are to be held.

    - `dtype`: "auto" keeps each tensor's own; else the name of one for all
    - `allow_overflow`: whether a number that the dtype does not reach may become infinite
    - `sharding`: where arrays are to lie, one `Sharding` for all or a function of (path, shape and dtype)
    """

    dtype: str = "auto"
    allow_overflow: bool = False
    sharding: Sharding | Place | None = None

    def __post_init__(self):
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConversionError(f"dtype = {self.dtype!r} is not one of auto, {', '.join(DTYPES)}.")


def filled(
    plan: Plan,
    checkpoint: Checkpoint,
    form: Form,
    key: PRNGKeyArray | None,
    announce: Callable[[Report], None] | None = None,
    progress: Progress | None = None,
) -> Any:
    """The model of a plan, if its report is clean; the last steps of every way in.

    Raises a `Mismatch` for a report that is not, a `ConversionError` for numbers that would be lost.
    """
    report = replace(plan.report, memory=expected_memory(plan, checkpoint, form))
    expect_ok(report)
    if report.num_read == 0:
        raise Mismatch(f"Nothing of the file would be read, so that all of the model would be drawn:\n{report}", report)
    expect_kept(plan, checkpoint, form)
    drawn = _drawn(plan, key, form)
    if announce is not None:
        announce(report)
    cast = _Cast(form)
    given = plan, checkpoint, cast, progress or (lambda done, total: None)
    arrays = drawn | (_read_whole(*given) if form.sharding is None else read_parts(*given, form.sharding))
    cast.expect_nothing_lost()
    return tree_map_with_path(lambda path, leaf: arrays[spell(path)] if is_array_like(leaf) else leaf, plan.skeleton)


@dataclass
class _Cast:
    """Casts one tensor after the other, and remembers which of them held more than the dtype does."""

    form: Form
    lost: dict[str, tuple[int, float]] = field(default_factory=dict)

    def __call__(self, key: str, x: np.ndarray) -> np.ndarray:
        if self.form.dtype == "auto":
            return x
        with np.errstate(over="ignore"):
            y = x.astype(DTYPES[self.form.dtype], copy=False)
        if not self.form.allow_overflow and jnp.finfo(y.dtype).max < jnp.finfo(x.dtype).max:
            beyond = np.isinf(y) & ~np.isinf(x)
            if beyond.any():
                count, most = self.lost.get(key, (0, 0.0))  # a tensor may come in parts
                self.lost[key] = count + int(beyond.sum()), max(most, float(np.abs(x[beyond]).max()))
        return y

    def dtype(self, own: Any) -> Any:
        """The dtype of a tensor whose own is this."""
        return own if self.form.dtype == "auto" else DTYPES[self.form.dtype]

    def expect_nothing_lost(self) -> None:
        if self.lost:
            lines = [f"  {key}: {n} numbers, up to {most:.3g}" for key, (n, most) in sorted(self.lost.items())[:12]]
            more = [f"  … and {len(self.lost) - 12} more"] if len(self.lost) > 12 else []
            raise ConversionError(
                f"{self.form.dtype} reaches to {float(jnp.finfo(DTYPES[self.form.dtype]).max):.3g}; these tensors hold"
                " more, which would become infinite:\n" + "\n".join([*lines, *more]) + "\nbfloat16 has the range of"
                " float32; allow_overflow=True (--allow-overflow) takes the infinities."
            )


def _read_whole(plan: Plan, checkpoint: Checkpoint, cast: _Cast, progress: Progress) -> dict[str, Any]:
    """Every array on the default device: tensors are read by several threads, and handed over a heap at a time."""
    total, done, arrays = bytes_of(plan, checkpoint, plan.links), 0, {}
    get = lambda key: cast(plan.names[key], checkpoint.get(plan.names[key]))
    job = lambda link: {path: _handed(x) for path, x in link.read(get).items()}
    with ThreadPoolExecutor(THREADS) as threads:
        for heap, read in _ahead(threads, job, _heaps(plan, checkpoint)):
            arrays |= jax.device_put({path: x for leaves in read for path, x in leaves.result().items()})
            done += bytes_of(plan, checkpoint, heap)
            progress(done, total)
    return arrays


def _ahead(
    threads: ThreadPoolExecutor, job: Callable[[Link], Any], heaps: Iterator[list[Link]]
) -> Iterator[tuple[list[Link], list[Future]]]:
    """Each heap with what its jobs will give; those of the next ones are under way already."""
    waiting: deque[tuple[list[Link], list[Future]]] = deque()
    for heap in heaps:
        waiting.append((heap, [threads.submit(job, link) for link in heap]))
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


def expected_memory(plan: Plan, checkpoint: Checkpoint, form: Form) -> tuple[int, int]:
    """Bytes of the model's arrays, and of what is held beside them at most while they are read."""
    own = lambda spec: np.dtype(spec.numpy_dtype).itemsize * prod(spec.shape)
    read = [plan.names[key] for link in plan.links for key in link.keys if key in plan.names]
    sizes = [own(checkpoint.specs[key]) for key in read]
    leaves = leaves_by_path(plan.skeleton)
    held = sum(sizes) + sum(leaves[path].size * leaves[path].dtype.itemsize for path in plan.report.new)
    if form.dtype != "auto":
        held = sum(x.size for x in leaves.values() if is_array_like(x)) * jnp.dtype(DTYPES[form.dtype]).itemsize
    there = lambda link: [plan.names[key] for key in link.keys if key in plan.names]
    most = max((sum(map(checkpoint.size, there(link))) for link in plan.links), default=0)
    return held, min(2 * sum(sizes), (AHEAD + 1) * AT_ONCE + 2 * most)


def _heaps(plan: Plan, checkpoint: Checkpoint) -> Iterator[list[Link]]:
    heap, size = [], 0
    for link in plan.links:
        heap.append(link)
        size += bytes_of(plan, checkpoint, [link])
        if size >= AT_ONCE:
            yield heap
            heap, size = [], 0
    if heap:
        yield heap


def _handed(x: np.ndarray) -> Any:
    """The array in memory of its own, ready for the device; one that is not in C order is there already."""
    # JAX puts strides in order three times as fast as NumPy, and what was read is free again before the next.
    if not x.flags.c_contiguous:
        return jax.block_until_ready(jax.device_put(x))
    # An op may give a view (a part of a fused tensor): JAX would keep all of what it views alive. It adopts the copy.
    return x if x.base is None or x.nbytes + 64 >= _root(x).nbytes else copied(x)


def _root(x: np.ndarray) -> np.ndarray:
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def expect_kept(plan: Plan, checkpoint: Checkpoint, form: Form) -> None:
    """Nothing would be narrowed that was not asked to be; known before a tensor is read."""
    for key in (plan.names[key] for link in plan.links for key in link.keys):
        own = checkpoint.specs[key].numpy_dtype
        if form.dtype == "auto" and jax.dtypes.canonicalize_dtype(own) != own:
            raise ConversionError(
                f"{key} is {own}, which JAX would narrow to {jax.dtypes.canonicalize_dtype(own)} without a word:"
                " ask for it with dtype='float32' (--dtype float32), or set jax_enable_x64."
            )


def _drawn(plan: Plan, key: PRNGKeyArray | None, form: Form) -> dict[str, Any]:
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
    if form.dtype != "auto":
        drawn = {path: x.astype(DTYPES[form.dtype]) for path, x in drawn.items()}
    if form.sharding is not None:
        drawn = {path: jax.device_put(x, place(form.sharding, path, x)) for path, x in drawn.items()}
    return drawn
