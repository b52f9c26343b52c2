"""Functions that are written inline, found by their equations.

`jax.nn.gelu` and `softmax` leave no boundary in a jaxpr. But the function itself, traced on a candidate's own shape and
dtype, gives the very equations to look for: every value that is exactly `f(v)`, and nothing that is merely near. What
has a name in the jaxpr, as `jax.nn.silu` and `relu` do, is called by that.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..nn import activations
from .matching import Group as Group, Recogniser as Recogniser, groups_of as groups_of, of_function


def _gelu_erf(x: Float[Array, "*axes"], *, approximate: bool) -> Float[Array, "*axes"]:
    """This package's spelling of the exact one."""
    return activations.gelu(x)


JAX_NN = (
    Recogniser("gelu", jax.nn.gelu, (("approximate", True),)),
    Recogniser("gelu", jax.nn.gelu, (("approximate", False),)),
    Recogniser("gelu", _gelu_erf, (("approximate", False),)),
    Recogniser("softmax", jax.nn.softmax, (("axis", -1),)),
    Recogniser("sigmoid", jax.nn.sigmoid),
    Recogniser("tanh", jnp.tanh),
)


# ---- formulas of several arrays, which no library has a function for. Each is a name to put into a rule, and what it
# computes; `SPELLINGS` has the ways in which it is written.


def layer_norm(
    x: Float[Array, "*axes dim"], weight: Float[Array, " dim"], bias: Float[Array, " dim"], *, eps: float = 1e-5
) -> Float[Array, "*axes dim"]:
    r"""$\gamma (x - \mathrm{mean}(x)) / \sqrt{\mathrm{var}(x) + \epsilon} + \beta$ over the last axis.

    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """
    return _standardised(x, eps) * weight + bias


def rms_norm(x: Float[Array, "*axes dim"], weight: Float[Array, " dim"], *, eps: float = 1e-6) -> Array:
    r"""$\gamma x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$ over the last axis.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * weight


def attention(
    q: Float[Array, "*axes seq head_dim"],
    k: Float[Array, "*axes keys head_dim"],
    v: Float[Array, "*axes keys value_dim"],
    *,
    scale: float,
) -> Float[Array, "*axes seq value_dim"]:
    r"""$\mathrm{softmax}(q k^\top s)\, v$ for every index of the leading axes.

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) * scale, axis=-1) @ v


def _standardised(x: Array, eps: float) -> Array:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + eps)


def _divided(x: Array, eps: float) -> Array:
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps)


def _centred(x: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


def _layer_norm_as(standardised: Callable[[Array, float], Array], weight_first: bool) -> Callable[..., Array]:
    if weight_first:
        return lambda x, weight, bias, *, eps: weight * standardised(x, eps) + bias
    return lambda x, weight, bias, *, eps: standardised(x, eps) * weight + bias


def _rms_divided(x: Array, weight: Array, *, eps: float) -> Array:
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * weight


def _rms_weight_first(x: Array, weight: Array, *, eps: float) -> Array:
    return weight * (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps))


def _rms_power(x: Array, weight: Array, *, eps: float) -> Array:
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _attention_as(scores: Callable[..., Array], masked: bool) -> Callable[..., Array]:
    """`fill` is what the score of a key becomes that `mask` forbids."""
    if masked:
        return lambda q, k, v, mask, *, scale, fill: (
            jax.nn.softmax(jnp.where(mask, scores(q, k, scale), fill), axis=-1) @ v
        )
    return lambda q, k, v, *, scale: jax.nn.softmax(scores(q, k, scale), axis=-1) @ v


# `scale` is the number as it is written: what is multiplied or divided by, or what the root is taken of.
SCORES = (
    lambda q, k, scale: q @ k.swapaxes(-1, -2) * scale,
    lambda q, k, scale: q @ k.swapaxes(-1, -2) / scale,
    lambda q, k, scale: q @ k.swapaxes(-1, -2) / jnp.sqrt(scale),
    lambda q, k, scale: (q * scale) @ k.swapaxes(-1, -2),
    lambda q, k, scale: jnp.einsum("...qd,...kd->...qk", q, k) * scale,
    lambda q, k, scale: jnp.einsum("...qd,...kd->...qk", q, k) / scale,
)


def _mapped(function: Callable[..., Array], depth: int, arrays: int, shared: int) -> Callable[..., Array]:
    """Under `depth` many `vmap`s, which leave the last `shared` of its arrays alone: the equations are others then."""
    axes = (0,) * (arrays - shared) + (None,) * shared
    for _ in range(depth):
        function = _over(function, axes)
    return function


def _over(function: Callable[..., Array], axes: tuple[int | None, ...]) -> Callable[..., Array]:
    return lambda *arrays, **keywords: jax.vmap(lambda *x: function(*x, **keywords), axes)(*arrays)


def _norms(name: str, ways: list[Callable[..., Array]], vectors: int) -> tuple[Recogniser, ...]:
    """For `x` with up to four axes, and vectors; alone or under `vmap`."""
    found = []
    for way, depth in itertools.product(ways, range(3)):
        ranks = tuple((rank, *(1,) * vectors) for rank in range(1 + depth, 5))
        found.append(Recogniser(name, _mapped(way, depth, 1 + vectors, vectors), (), ranks, 0, ("eps",)))
    return tuple(found)


def _attentions() -> tuple[Recogniser, ...]:
    found = []
    for scores, masked, depth in itertools.product(SCORES, (True, False), range(3)):
        way = _attention_as(scores, masked)
        read = ("scale", "fill") if masked else ("scale",)
        for shared in range(1 + (masked and depth > 0)):  # each example has its own mask, or all have one
            ranks = [(n, n, n, *mask) for n in range(2 + depth, 5) for mask in _masks(masked, n, depth, shared)]
            mapped = _mapped(way, depth, 3 + masked, shared)
            found.append(Recogniser("attention", mapped, (), tuple(ranks), int(masked), read))
    return tuple(found)


def _masks(masked: bool, axes: int, depth: int, shared: int) -> list[tuple[int, ...]]:
    """How many axes a mask may have; where nothing is mapped, it may have less than the scores."""
    if not masked:
        return [()]
    return [(axes - shared * depth,)] if depth else [(n,) for n in range(2, axes + 1)]


_LAYER_NORMS = [_layer_norm_as(way, first) for way in (_standardised, _divided, _centred) for first in (False, True)]
_DOT_PRODUCT = tuple(
    Recogniser("dot_product_attention", jax.nn.dot_product_attention, keywords, ((4, 4, 4), (3, 3, 3)))
    for keywords in ((), (("is_causal", True),))
)
# Functions that are written in more ways than their own, or that have more arguments than can be guessed.
SPELLINGS: dict[Callable[..., Any], tuple[Recogniser, ...]] = {
    layer_norm: _norms("layer_norm", _LAYER_NORMS, 2),
    rms_norm: _norms("rms_norm", [rms_norm, _rms_divided, _rms_weight_first, _rms_power], 1),
    attention: _attentions(),
    jax.nn.dot_product_attention: _DOT_PRODUCT,
}


def recognisers_of(function: Callable[..., Any]) -> tuple[Recogniser, ...]:
    """How this function is recognised where it is written inline."""
    known = tuple(r for r in JAX_NN if r.function is function)
    return known or SPELLINGS.get(function) or of_function(function)
