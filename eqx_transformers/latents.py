"""Tools on latents as plain arrays: ways from one to another, their plane, and a picture or a table of both."""

import math
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from .nn._dtypes import wider
from .pictures import picture as picture

# Within this angle of opposite, in radians, the great circle gives way to the line: see `interpolate`.
OPPOSITE = 0.01


def interpolate(
    a: Float[Array, "*shape"], b: Float[Array, "*shape"], steps: int, *, kind: Literal["linear", "spherical"] = "linear"
) -> Float[Array, "{steps} *shape"]:
    r"""From `a` to `b` in `steps` latents, both ends included, bit for bit: at $r = 0, \frac{1}{steps - 1}, \dots, 1$.

    - "linear": $a + r (b - a)$.
    - "spherical": $\frac{\sin((1 - r) \theta)}{\sin \theta} a + \frac{\sin(r \theta)}{\sin \theta} b$, where $\theta$
      is the angle between the latents as flat vectors. Between two of one length, all are that long; the line passes
      closer to zero, where a standard normal has hardly any draws.

    As the angle goes to 0, the circle becomes the line. Opposite vectors ($\theta = \pi$) are joined by many circles:
    from 0.02 radians before that the circle goes over into the line, smoothly, and from 0.01 radians on it is the
    line, through zero. A vector of zeros has no angle, and the line is taken.

    Computed in float32 at least; the result has the wider of the two dtypes. Raises a `ValueError` where the shapes
    differ, for fewer than two `steps`, and for another `kind`. Source of the second: Shoemake 1985, "Animating
    rotation with quaternion curves"; of its use on latents: White 2016, arXiv:1609.04468.
    """
    _expect_same(a=a, b=b)
    ways = {"linear": lambda r, a, b: (jnp.ones_like(r), r), "spherical": _spherical}
    if steps < 2 or kind not in ways:
        raise ValueError(f"steps = {steps} must be 2 or more, and kind = {kind!r} one of {', '.join(ways)}.")
    dtype = wider(a.dtype, b.dtype)
    start, end = (x.astype(wider(dtype, jnp.float32)) for x in (a, b))
    ratios = jnp.arange(1, steps - 1, dtype=start.dtype) / (steps - 1)
    scale, share = (w.reshape(-1, *(1,) * a.ndim) for w in ways[kind](ratios, start, end))
    between = scale * start[None] + share * (end - start)[None]
    return jnp.concatenate([a[None].astype(dtype), between.astype(dtype), b[None].astype(dtype)])


def analogy(a: Float[Array, "*shape"], b: Float[Array, "*shape"], c: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """$c + (b - a)$: `a` is to `b` as `c` is to the result. Computed in float32 at least, in the dtype of `c`.

    Raises a `ValueError` where the shapes differ. Source: Mikolov et al. 2013, "Linguistic Regularities in Continuous
    Space Word Representations".
    """
    _expect_same(a=a, b=b, c=c)
    dtype = wider(a.dtype, b.dtype, c.dtype, jnp.float32)
    return (c.astype(dtype) + (b.astype(dtype) - a.astype(dtype))).astype(c.dtype)


def sample_prior(shape: tuple[int, ...], *, key: PRNGKeyArray) -> Float[Array, "..."]:
    """Latents of this shape drawn from the standard normal, in float32."""
    return jax.random.normal(key, shape, jnp.float32)


class PrincipalPlane(eqx.Module):
    """The plane through the mean of latents along which they vary most: see `principal_plane`.

    `directions` are orthonormal, and `explained` is each one's share of the variance of all numbers.
    """

    mean: Float[Array, "*shape"]
    directions: Float[Array, "2 *shape"]
    explained: Float[Array, "2"]

    def __call__(self, latents: Float[Array, "..."]) -> Float[Array, "... 2"]:
        """Where latents (`*batch *shape`) lie in the plane, `*batch 2`: a `ValueError` where they end otherwise."""
        shape = self.mean.shape
        batch = latents.shape[: max(0, latents.ndim - len(shape))]
        if latents.shape != (*batch, *shape):
            raise ValueError(f"The plane is one of latents {shape}, but these are {latents.shape}.")
        centred = latents.astype(self.mean.dtype) - jnp.broadcast_to(self.mean, latents.shape)
        flat, directions = centred.reshape(*batch, -1), self.directions.reshape(2, -1)
        return jnp.einsum("...d,kd->...k", flat, directions, precision="highest")


def principal_plane(latents: Float[Array, "samples *shape"]) -> PrincipalPlane:
    """The first two principal components of latents, by a singular value decomposition, in float32 at least.

    Of the two signs that a direction may have, it has the one that makes its largest number positive, so that the
    same latents give the same picture. Where they vary as much in another direction (or all lie on a line), which one
    is taken is left to rounding. Raises a `ValueError` for fewer than three latents, or latents of one number: they
    have no plane. Source: Pearson 1901, "On lines and planes of closest fit".
    """
    shape, size = latents.shape[1:], math.prod(latents.shape[1:])
    if latents.shape[:1] < (3,) or size < 2:
        raise ValueError(f"A plane needs 3 latents of 2 numbers at least, but the latents are {latents.shape}.")
    flat = latents.reshape(-1, size).astype(wider(latents.dtype, jnp.float32))
    mean = flat.mean(0)
    _, lengths, directions = jnp.linalg.svd(flat - mean[None], full_matrices=False)
    first = directions[:2]
    largest = jnp.take_along_axis(first, jnp.abs(first).argmax(1, keepdims=True), 1)
    first = jnp.where(largest < 0, -first, first)
    variances = jnp.square(lengths)
    total = variances.sum()
    return PrincipalPlane(mean.reshape(shape), first.reshape(2, *shape), variances[:2] / jnp.where(total > 0, total, 1))


def table(rows: Sequence[str], ratios: Sequence[float | int] | Shaped[Array | np.ndarray, " steps"]) -> str:
    r"""The texts of an interpolation, one a line under "ratio" and "text", each after its ratio.

    The ratios have two decimals, or as many up to six as tell them apart. What is not printable, such as the end of a
    line, is written as Python does, `\n`. Raises a `ValueError` where there are not as many of both.
    """
    numbers = [float(ratio) for ratio in ratios]
    if len(rows) != len(numbers):
        raise ValueError(f"Each row has its ratio, but there are {len(rows)} rows and {len(numbers)} ratios.")
    spelt = lambda decimals: [f"{x:.{decimals}f}" for x in numbers]
    written = next((s for s in map(spelt, range(2, 6)) if len(set(s)) == len(set(numbers))), spelt(6))
    width = max(map(len, ("ratio", *written)))
    shown = lambda text: "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    lines = [("ratio", "text"), *zip(written, map(shown, rows), strict=True)]
    return "\n".join(f"{ratio:>{width}}  {text}".rstrip() for ratio, text in lines)


def _spherical(
    ratios: Float[Array, " steps"], a: Float[Array, "*shape"], b: Float[Array, "*shape"]
) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
    """(s, t) of the point s a + t (b - a) for each ratio."""
    angle = _angle(a.reshape(-1), b.reshape(-1))
    line = jnp.clip((angle - (math.pi - 2 * OPPOSITE)) / OPPOSITE, 0, 1)
    line = line * line * (3 - 2 * line)
    turn = jnp.minimum(angle, math.pi - OPPOSITE) / math.pi
    # sin(rθ) / sin θ as r sinc(rθ) / sinc θ, which knows its limit at 0.
    weight = lambda r: r * ((1 - line) * jnp.sinc(r * turn) / jnp.sinc(turn) + line)
    return weight(1 - ratios) + weight(ratios), weight(ratios)


def _angle(a: Float[Array, " dim"], b: Float[Array, " dim"]) -> Float[Array, ""]:
    """Between two vectors, 0 where one is zero. Not by the cosine, which near 1 has lost the digits of the angle."""
    a, b = _direction(a), _direction(b)
    is_known = a.any() & b.any()
    return jnp.where(is_known, 2 * jnp.arctan2(_length(a - b), jnp.where(is_known, _length(a + b), 1)), 0)


def _direction(x: Float[Array, " dim"]) -> Float[Array, " dim"]:
    # By the largest number first: the squares of very small or large ones leave the dtype.
    peak = jnp.abs(x).max(initial=0)
    x = x / jnp.where(peak > 0, peak, 1)
    return x / jnp.where(peak > 0, _length(x), 1)


def _length(x: Float[Array, " dim"]) -> Float[Array, ""]:
    """With a gradient of zero at zero, where the root's own is infinite."""
    square = jnp.square(x).sum()
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _expect_same(**given: Array) -> None:
    if len({x.shape for x in given.values()}) > 1:
        found = ", ".join(f"{name} is {x.shape}" for name, x in given.items())
        raise ValueError(f"The latents must have one shape, but {found}.")
