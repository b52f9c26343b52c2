"""Which dtype a computation runs in."""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def wider(*dtypes: DTypeLike) -> np.dtype:
    """The narrowest dtype that holds what each of `dtypes` does: float32 for bfloat16 and float16.

    A choice, not an implicit promotion: under `jax.numpy_dtype_promotion("strict")` too.
    """
    with jax.numpy_dtype_promotion("standard"):
        return reduce(jnp.promote_types, dtypes[1:], jnp.dtype(dtypes[0]))
