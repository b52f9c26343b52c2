"""Whether arrays are drawn, or only their shapes are wanted."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

# Tracing the random numbers of a skeleton, which nobody will see, took most of the time that a checkpoint's plan takes.
SHAPES_ONLY = ContextVar("shapes_only", default=False)


def traced_once(draw: Callable[..., Any]) -> Callable[..., Any]:
    """An initializer that is traced once a shape, not once a matrix; not at all where only shapes are wanted."""
    jitted = jax.jit(draw, static_argnums=(1, 2))

    def initializer(key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
        # Outside of the jit: what it caches must never be the zeros.
        return jnp.zeros(shape, dtype) if SHAPES_ONLY.get() else jitted(key, tuple(shape), dtype)

    return initializer


@functools.cache
def normal(std: float, *, truncated: bool = False) -> Initializer:
    """A normal of this deviation. Cut at twice it, the numbers deviate by 0.88 of that: as JAX draws, and Haiku."""
    draw = jax.nn.initializers.truncated_normal if truncated else jax.nn.initializers.normal
    return traced_once(draw(std))
