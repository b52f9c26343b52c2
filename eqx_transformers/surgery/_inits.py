"""Which numbers a change of low rank begins with."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Init = Literal["kaiming", "gaussian", "pissa", "olora", "random"]
INITS: tuple[str, ...] = get_args(Init)
FROM_WEIGHT = ("pissa", "olora")  # what they take out of the matrix, the base loses


class Shape(NamedTuple):
    """Of the matrix that is changed, and of the change."""

    inputs: int
    outputs: int
    rank: int
    parts: int

    @property
    def a(self) -> tuple[int, int]:
        return self.parts * self.rank, self.inputs

    @property
    def b(self) -> tuple[int, int]:
        return self.outputs, self.rank


def drawn(init: str, shape: Shape, is_table: bool, key: PRNGKeyArray) -> tuple[Array, Array]:
    """A and B by chance, float32. One of them is zero, so that nothing changes, unless `init` is "random".

    | init | of a linear layer | of an embedding |
    |---|---|---|
    | kaiming | A uniform within 1 / sqrt(inputs), which is Kaiming's with a = sqrt(5); B zero | A zero, B normal |
    | gaussian | A normal of deviation 1 / rank; B zero | A zero, B normal |
    | random | A as in kaiming; B uniform within 1 / sqrt(rank) | both normal |

    The same distributions as PEFT's `init_lora_weights` = True, "gaussian" and False.
    """
    for_a, for_b = jax.random.split(key)
    if is_table:
        a = jax.random.normal(for_a, shape.a, jnp.float32) if init == "random" else jnp.zeros(shape.a, jnp.float32)
        return a, jax.random.normal(for_b, shape.b, jnp.float32)
    a = (
        jax.random.normal(for_a, shape.a, jnp.float32) / shape.rank
        if init == "gaussian"
        else uniform(for_a, shape.a, shape.inputs)
    )
    return a, uniform(for_b, shape.b, shape.rank) if init == "random" else jnp.zeros(shape.b, jnp.float32)


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Array:
    """Within 1 / sqrt(fan_in): what torch draws for a linear layer's weight and bias."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound)


def taken(
    init: str, matrix: Float[Array, "outputs inputs"], shape: Shape, scale: float
) -> tuple[Float[Array, "rows inputs"], Float[Array, "outputs rank"]]:
    r"""A and B out of the matrix itself, of each part by itself.

    - pissa: $A = \sqrt{S_r / s}\,V_r^\top$, $B = U_r \sqrt{S_r / s}$ of the largest singular values, so that
      $s\,BA$ is the best approximation of rank r (arXiv:2404.02948; the exact decomposition).
    - olora: $B = Q_r$, $A = R_r$ of a QR decomposition (arXiv:2406.01775; as in PEFT, $s$ is not divided out).
    """
    by_part = matrix.reshape(shape.parts, -1, shape.inputs)
    a, b = jax.vmap(lambda part: _principal(part, shape.rank, scale) if init == "pissa" else _qr(part, shape.rank))(
        by_part
    )
    return a.reshape(shape.a), b.reshape(shape.b)


def _principal(part: Float[Array, "outputs inputs"], rank: int, scale: float) -> tuple[Array, Array]:
    u, s, vh = jnp.linalg.svd(part, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    a, b = vh[:rank], u[:, :rank]
    return jnp.broadcast_to(root[:, None], a.shape) * a, b * jnp.broadcast_to(root, b.shape)


def _qr(part: Float[Array, "outputs inputs"], rank: int) -> tuple[Array, Array]:
    q, r = jnp.linalg.qr(part)
    return r[:rank], q[:, :rank]
