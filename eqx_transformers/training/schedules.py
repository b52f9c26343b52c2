"""Learning rates that rise and fall: functions of the step, as optax takes them."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Step = int | float | np.integer | Int[Array, "*steps"] | Float[Array, "*steps"]
Schedule = Callable[[Any], Any]  # as optax has it: of a Step


def warmup_linear(rate: int | float, steps: int, warmup: int | float = 0.1) -> Schedule:
    r"""$\eta \cdot t / w$ for the steps $t < w$, then $\eta (T - t) / (T - w)$, and 0 from $T$ on.

    $\eta$ is `rate`, $T$ the number of `steps`, and $w$ the `warmup`: a share of all steps if it is below 1 (rounded
    up), else a number of them. The first step, $t = 0$, has rate 0 if there is a warm-up. This is
    `get_linear_schedule_with_warmup` of transformers. Raises a `ValueError` for a warm-up that is not within the steps.
    """
    first = warmup_steps(steps, warmup)
    return lambda step: rate * _rise(step, first) * (1 - _progress(step, first, steps))


def warmup_cosine(rate: int | float, steps: int, warmup: int | float = 0.1) -> Schedule:
    r"""The same rise, then $\eta (1 + \cos(\pi (t - w) / (T - w))) / 2$: half a wave down to 0, which it stays.

    This is `get_cosine_schedule_with_warmup` of transformers up to step $T$, behind which that one rises again.
    """
    first = warmup_steps(steps, warmup)
    return lambda step: rate * _rise(step, first) * (1 + jnp.cos(jnp.pi * _progress(step, first, steps))) / 2


def warmup_steps(steps: int, warmup: int | float) -> int:
    """How many steps a warm-up takes: a share below 1, rounded up, or a whole number."""
    if steps < 1:
        raise ValueError(f"steps = {steps} must be at least 1: how many steps there are in all.")
    if warmup < 0 or warmup > steps or (warmup >= 1 and warmup != int(warmup)):
        raise ValueError(f"warmup = {warmup} must be a share of the {steps} steps below 1, or how many of them.")
    return math.ceil(steps * warmup) if warmup < 1 else int(warmup)


def _rise(step: Step, first: int) -> Float[Array, "*steps"]:
    return jnp.minimum(jnp.asarray(step, jnp.float32) / max(1, first), 1) if first else jnp.ones(jnp.shape(step))


def _progress(step: Step, first: int, steps: int) -> Float[Array, "*steps"]:
    """Of what comes behind the warm-up, 0 to 1."""
    at = jnp.asarray(step, jnp.float32)
    return jnp.where(at >= steps, 1.0, jnp.maximum(at - first, 0) / max(1, steps - first))
