"""Optimizers that optax does not have: AdamW that knows what decays, and that of the functional transformer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..surgery import decay_mask


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: int | float = 0.01,
    b1: int | float = 0.9,
    b2: int | float = 0.999,
    eps: int | float = 1e-8,
    decays: Callable[[Any], Any] = decay_mask,
) -> optax.GradientTransformation:
    r"""AdamW: $\theta \leftarrow \theta - \eta (\hat m / (\sqrt{\hat v} + \epsilon) + \lambda \theta)$, as torch's.

    Of `weight_decay` $\lambda$, biases and the parameters of norms have none, as in transformers' trainer. `decays`
    gives the tree of bools that says so: `functools.partial(decay_mask, exclude=...)` excludes others, `lambda params:
    True` nothing. Source: Loshchilov & Hutter 2017, arXiv:1711.05101.
    """
    return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decays)


class AdamState(NamedTuple):
    """How many steps were made, and the running means of the gradients and of their squares."""

    count: Int[Array, ""]
    mu: PyTree
    nu: PyTree


def adam_uncorrected(
    learning_rate: optax.ScalarOrSchedule, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-16
) -> optax.GradientTransformation:
    r"""Adam with $\epsilon$ beside the uncorrected root, as the purely functional transformer is trained.

    $m \leftarrow b_1 m + (1 - b_1) g$, $v \leftarrow b_2 v + (1 - b_2) g^2$, and step $t$ changes the parameters by
    $-\eta \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \cdot \frac{m}{\sqrt v + \epsilon}$. In `optax.adam`, $\epsilon$ stands
    beside $\sqrt{v / (1 - b_2^t)}$: as much as $\sqrt{1 - b_2^t}\, \epsilon$ here. A number whose gradients were all
    zero stays as it is. The original's ancestor has an `optax.clip(1.0)` before it, and $b_2 = 0.999$.

    Source: https://github.com/awf/functional-transformer.
    """
    return optax.chain(_scale_by_adam(b1, b2, eps), optax.scale_by_learning_rate(learning_rate))


def _rest(decay: float, count: Int[Array, ""]) -> Float[Array, ""]:
    """1 - decay ** count, of which float32 would lose up to four digits by subtracting."""
    return -jnp.expm1(count * (math.log(decay) if decay else -math.inf))


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    def init(params: PyTree) -> AdamState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return AdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, AdamState]:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
        scale = jnp.sqrt(_rest(b2, count)) / _rest(b1, count)
        steps = jax.tree.map(lambda m, v: scale.astype(m.dtype) * m / (jnp.sqrt(v) + eps), mu, nu)
        return steps, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
