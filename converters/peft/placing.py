"""Adapters in the places of layers: new ones, further ones, and those of stacked blocks in one."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformers.surgery.ia3 import IA3
from eqx_transformers.surgery.lora import LoRA, LowRank
from eqx_transformers.surgery.paths import is_array_like

from ..errors import ConversionError, UnsupportedConfig
from .expected import Layer
from .factors import Factors, split
from .modules import Site
from .settings import Settings
from .targets import is_target
from .tree import Tree

Get = Callable[[str], np.ndarray]


def with_loras(tree: Tree, sites: Mapping[str, tuple[Site, Factors]], dropout: float, name: str) -> Tree:
    """With a LoRA, or one more adapter in it, at every path."""
    rows: dict[str, dict[int | None, LowRank]] = {}
    for site, factors in sites.values():
        salt = int.from_bytes(hashlib.blake2b(f"{name}:{site.name}".encode(), digest_size=4).digest(), "little")
        for path, part in zip(site.paths, split(site, factors), strict=True):
            rows.setdefault(path, {})[site.layer] = _low_rank(part, dropout, salt)
    return tree.replaced({path: _wrapped(tree, path, layers, name) for path, layers in rows.items()})


def _low_rank(factors: Factors, dropout: float, salt: int) -> LowRank:
    array = lambda x: None if x is None else jnp.asarray(x)
    bias, magnitude = array(factors.b_bias), array(factors.magnitude)
    a, b = jnp.asarray(factors.a), jnp.asarray(factors.b)
    return LowRank(a, b, factors.scale, b_bias=bias, magnitude=magnitude, dropout=dropout, salt=salt)


def _wrapped(tree: Tree, path: str, layers: dict[int | None, LowRank], name: str) -> Any:
    make = lambda node, adapter: _extended(node, adapter, name)
    return make(tree[path], layers[None]) if None in layers else _stacked(tree, path, layers, make)


def _extended(node: Any, adapter: LowRank, name: str) -> LoRA:
    if not isinstance(node, LoRA):
        return LoRA(node, (adapter,), (name,))
    weights = jnp.append(node.weights, jnp.ones((), node.weights.dtype))
    return LoRA(node.base, (*node.adapters, adapter), (*node.names, name), weights)


def _stacked(tree: Tree, path: str, layers: Mapping[Any, Any], make: Callable[[Any, Any], Any]) -> Any:
    """`make` of every layer of stacked blocks, with what it gets there."""
    node = tree[path]
    depth = next(x.shape[0] for x in jax.tree.leaves(node) if is_array_like(x))
    arrays = [jax.tree.map(lambda x: x.shape, eqx.filter(one, is_array_like)) for one in layers.values()]
    if set(layers) != set(range(depth)) or any(shapes != arrays[0] for shapes in arrays):
        raise ConversionError(
            f"The blocks at {path} are stacked, {depth} layers in one, and the adapter has another rank in some of them"
            f" or leaves some out (it has {', '.join(map(str, sorted(layers)))}): load it on unstack(model)."
        )
    axis = lambda x: 0 if is_array_like(x) else None
    both = [eqx.partition(layers[i], is_array_like) for i in range(depth)]
    given = eqx.combine(jax.tree.map(lambda *x: jnp.stack(x), *(arrays for arrays, _ in both)), both[0][1])
    return eqx.filter_vmap(make, in_axes=(axis, axis), out_axes=axis)(node, given)


def with_ia3(tree: Tree, asked: Settings, adapted: list[Layer], get: Get) -> Tree:
    """With an IA3 at every path."""
    rows: dict[str, dict[int | None, Any]] = {}
    for layer in adapted:
        site = layer.site
        if site.is_table:
            raise UnsupportedConfig(f"IA3 on {layer.name}: of tables, and of what is tied to one, it is not had here.")
        vector, is_input = get(f"{layer.name}.ia3_l").reshape(-1), is_target(layer.name, asked.feedforward)
        parts = [vector] * len(site.paths) if is_input else site.split(vector)
        for path, part in zip(site.paths, parts, strict=True):
            rows.setdefault(path, {})[site.layer] = ("input" if is_input else "output", jnp.asarray(part))
    return tree.replaced({path: _of_ia3(tree, path, layers) for path, layers in rows.items()})


def _of_ia3(tree: Tree, path: str, layers: dict[int | None, Any]) -> Any:
    side = next(iter(layers.values()))[0]
    vectors = {layer: vector for layer, (_, vector) in layers.items()}
    make = lambda node, vector: IA3(node, vector, side)
    return make(tree[path], vectors[None]) if None in vectors else _stacked(tree, path, vectors, make)
