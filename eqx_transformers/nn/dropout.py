"""Dropout, of a layer's output and of attention's weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from ._dtypes import wider


def keep(seeds: UInt32[Array, "*rows"], rate: Float[Array, ""], width: int) -> Float[Array, "*rows {width}"]:
    """What dropout multiplies `width` numbers of each row with: 0, or 1 / (1 - rate).

    Each number's random bits are a hash of its row's seed and its place (multiply and shift until every bit depends on
    all others): on a CPU, `jax.random` for every weight of attention takes 4 times as long as the attention itself,
    this a tenth of it.
    """
    places = jnp.arange(width, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)  # 2**32 / golden ratio: spreads neighbours
    bits = seeds[..., None] ^ places.reshape((1,) * seeds.ndim + (width,))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # Wellons 2018, "Prospecting for Hash Functions"
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    uniform = ((bits ^ (bits >> 16)) >> 8).astype(rate.dtype) * 2**-24
    return jnp.where(uniform >= rate, 1 / (1 - rate), 0)


class Dropout(eqx.Module):
    r"""$x \mapsto m \odot x / (1 - p)$, where each number of $m$ is 0 with probability $p$ and otherwise 1.

    Any shape; computed in float32 at least, the result has the input's dtype. Each row of the last axis draws a number,
    of which and of their places hashes make the $m$ of the row, as attention does: less work than to draw for every
    number, as `eqx.nn.Dropout` does, which may stand in its place. `p` and `inference` are leaves: `eqx.tree_at`
    changes a rate, `eqx.nn.inference_mode` switches all off. With `inference`, or a rate that is the number 0 (no
    array), it is the identity and needs no key.

    Raises a `RuntimeError` where something would be dropped and there is no key.

    Source: Srivastava et al. 2014, Journal of Machine Learning Research 15.
    """

    p: int | float | Float[Array, ""]
    inference: bool

    def __init__(self, p: int | float | Float[Array, ""] = 0.5, inference: bool = False):
        self.p = p
        self.inference = inference

    def __call__(
        self, x: Float[Array, "*axes"], *, key: PRNGKeyArray | None = None, inference: bool | None = None
    ) -> Float[Array, "*axes"]:
        """`inference`, where it is given, comes before the field."""
        if (self.inference if inference is None else inference) or (isinstance(self.p, int | float) and self.p == 0):
            return x
        if key is None:
            raise RuntimeError(f"Dropout at rate {self.p} needs a key; inference=True, or no rate, drops nothing.")
        wide = wider(x.dtype, jnp.float32)
        rate = lax.stop_gradient(jnp.asarray(self.p).astype(wide))
        rows = jax.random.bits(key, x.shape[:-1], jnp.uint32)
        factors = keep(rows, rate, x.shape[-1] if x.ndim else 1).reshape(x.shape)
        return (x.astype(wide) * factors).astype(x.dtype)
