"""Whether arrays are drawn, or only their shapes are wanted."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

# Tracing the random numbers of a skeleton, which nobody will see, took most of the time that a checkpoint's plan takes.
SHAPES_ONLY = ContextVar("shapes_only", default=False)


def traced_once(draw: Callable[..., Any]) -> Callable[..., Any]:
    """An initializer that is traced once a shape, not once a matrix; not at all where only shapes are wanted."""
    jitted = jax.jit(draw, static_argnums=(1, 2))

    def initializer(key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
        # Outside of the jit: what it caches must never be the zeros.
        return jnp.zeros(shape, dtype) if SHAPES_ONLY.get() else jitted(key, tuple(shape), dtype)

    return initializer
