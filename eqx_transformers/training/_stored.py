"""What a checkpoint says of the arrays of a tree, and how they become the tree again."""

import base64
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..surgery.paths import is_array_like, leaves_by_path


class Damaged(Exception):
    """One checkpoint does not hold what was written."""


def arrays_of(state: Any) -> dict[str, Any]:
    """The arrays of a tree by their paths, in its order, and keys as their numbers."""
    is_spec = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    plain = lambda x: jax.eval_shape(jax.random.key_data, x) if is_spec(x) else jax.random.key_data(x)
    leaves = leaves_by_path(state)
    if len(leaves) != len(jax.tree.leaves(state)):
        raise ValueError("Two arrays of the state have the same path: a key of a dict in it has a dot. Rename it.")
    return {path: plain(x) if _is_key(x) else x for path, x in leaves.items() if is_array_like(x)}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _impl(key: Any) -> Any:
    """The generator of a key, or of a spec of one."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


def filled(like: Any, arrays: Iterator[Any]) -> Any:
    """`like` with these arrays for its own, in its order, and what else it holds."""

    def one(x: Any) -> Any:
        if not is_array_like(x):
            return x
        array = next(arrays)
        if isinstance(x, jax.Array) and not x.committed:
            array = jax.device_put(array)
        return jax.random.wrap_key_data(array, impl=_impl(x)) if _is_key(x) else array

    return jax.tree.map(one, like)


def spec(x: Any) -> Any:
    """What is asked of orbax: the like of an array, where it lies.

    A NumPy array stays one (JAX would narrow some), and what lies nowhere in particular comes as one, so that it can
    lie nowhere in particular again: orbax itself would tie it to a device.
    """
    if isinstance(x, np.ndarray) or (isinstance(x, jax.Array) and not x.committed):
        return np.broadcast_to(np.zeros((), x.dtype), x.shape)
    place = x.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def described(arrays: dict[str, Any]) -> dict[str, Any]:
    """Shape, dtype and CRC-32 by path. The CRC is None of an array that no process sees whole."""
    with ThreadPoolExecutor() as pool:  # zlib and copies from a device let other threads run
        crcs = pool.map(_digest, arrays.values())
        return {path: [list(x.shape), str(x.dtype), crc] for (path, x), crc in zip(arrays.items(), crcs, strict=True)}


def _digest(x: Any) -> int | None:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return None
    return zlib.crc32(np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8).data)


def expect_written(arrays: dict[str, Any], held: dict[str, Any]) -> None:
    """Raises `Damaged` where the bytes of an array are not those that were described."""
    for path, (_, _, crc) in described(arrays).items():
        if None not in (crc, held[path][2]) and crc != held[path][2]:
            raise Damaged(f"the numbers of {path} are not those that were written")


def problems_of(held: dict[str, Any], wanted: dict[str, Any], most: int = 8) -> list[str]:
    """In what the arrays that are described differ from those of a state: paths, shapes and dtypes."""
    said = lambda shape, dtype: f"{dtype} {tuple(shape)}"
    found = [f"{path}: not in the checkpoint" for path in wanted if path not in held]
    found += [f"{path}: only in the checkpoint" for path in held if path not in wanted]
    for path, x in wanted.items():
        if path in held and held[path][:2] != [list(x.shape), str(x.dtype)]:
            found.append(f"{path}: {said(*held[path][:2])} in the checkpoint, {said(x.shape, x.dtype)} in the state")
    return found[:most] + ([f"… and {len(found) - most} more"] if len(found) > most else [])


def packed(data: Any) -> Any:
    """A position in data, bytes or JSON, as JSON."""
    return {"bytes": base64.b64encode(data).decode()} if isinstance(data, bytes) else {"json": data}


def unpacked(packed: dict[str, Any]) -> Any:
    """The position that was `packed`."""
    return base64.b64decode(packed["bytes"]) if "bytes" in packed else packed["json"]
