"""What lies in parts on many devices, whole."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped


def whole(model: Any, mesh: Any) -> Any:
    """With every array whole on every device, for files."""
    arrays, rest = eqx.partition(model, eqx.is_array)
    gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return eqx.combine(gather(arrays), rest)


def fetched(x: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """For the host, of whichever process: all of them must ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(x, tiled=True)
