"""Arrays over several devices: of every tensor, each device's process reads the part that lies there."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Sharding

from eqx_transformers.surgery.paths import leaves_by_path
from eqx_transformers.tensor_file import copied

from .checkpoint import Checkpoint
from .errors import ConversionError
from .plan import Plan
from .rules import Link

Place = Callable[[str, jax.ShapeDtypeStruct], Sharding]


@runtime_checkable
class Cast(Protocol):
    """Gives a tensor (of this key of the file) in the dtype that was asked for; `dtype` is that of one of `own`."""

    def __call__(self, key: str, x: np.ndarray) -> np.ndarray: ...

    def dtype(self, own: Any) -> Any: ...


def place(sharding: Sharding | Place, path: str, like: Any) -> Sharding:
    """Where the array at a path is to lie. Raises a `ConversionError` for what is no place."""
    found = sharding if isinstance(sharding, Sharding) else sharding(path, jax.ShapeDtypeStruct(like.shape, like.dtype))
    if not isinstance(found, Sharding):
        raise ConversionError(f"sharding gave {found!r} for {path}; expected a jax.sharding.Sharding.")
    try:
        found.shard_shape(tuple(like.shape))
    except ValueError as error:
        raise ConversionError(f"{path} {list(like.shape)} cannot lie as {found}: {error}") from error
    return found


def bytes_of(plan: Plan, checkpoint: Checkpoint, links: Iterable[Link]) -> int:
    """How many bytes of the file these links read: what progress is counted in."""
    return sum(checkpoint.size(plan.names[key]) for link in links for key in link.keys)


def read_parts(
    plan: Plan, checkpoint: Checkpoint, cast: Cast, progress: Callable[[int, int], None], sharding: Sharding | Place
) -> dict[str, jax.Array]:
    """The file is mapped, operations are views of the map, and only what a device needs is copied out of it.

    A tensor that Flax cut into chunks is read whole. Progress counts a tensor's bytes, however many of them are copied.
    """
    total, done = bytes_of(plan, checkpoint, plan.links), 0
    leaves, arrays = leaves_by_path(plan.skeleton), {}
    for link in plan.links:
        # Places first: whoever is asked for them must not find the file mapped.
        own = checkpoint.specs[plan.names[link.keys[0]]].numpy_dtype
        like = {path: jax.ShapeDtypeStruct(leaves[path].shape, cast.dtype(own)) for path in link.ours}
        places = {path: place(sharding, path, like[path]) for path in link.ours}
        for path, rows in _rows(link, lambda key: checkpoint.view(plan.names[key])).items():
            arrays[path] = _array(leaves[path].shape, places[path], rows, link, plan.names, cast)
        done += bytes_of(plan, checkpoint, [link])
        progress(done, total)
    return arrays


def _rows(link: Link, view: Callable[[str], np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The tensors that make each leaf of a link: one, or one a layer."""
    rows = [link.op.forward(*map(view, keys)) for keys in link.theirs]
    return {path: [row[i] for row in rows] for i, path in enumerate(link.ours)}


def _array(
    shape: tuple[int, ...],
    sharding: Sharding,
    rows: list[np.ndarray],
    link: Link,
    names: Mapping[str, str],
    cast: Cast,
) -> jax.Array:
    depth = len(link.sizes)
    numbers = np.arange(len(rows)).reshape(link.sizes)

    def part(index: Any) -> np.ndarray:  # a tuple of slices
        chosen = numbers[index[:depth]]
        parts = [cast(names[link.theirs[i][0]], copied(rows[i][index[depth:]])) for i in np.ravel(chosen)]
        return np.stack(parts).reshape(*chosen.shape, *parts[0].shape) if depth else parts[0]

    return jax.make_array_from_callback(shape, sharding, part)
