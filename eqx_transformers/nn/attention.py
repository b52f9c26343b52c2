"""Multi-head attention: four projections around `attend`, which decides how the middle runs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import equinox as eqx
import jax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from . import kernels
from ._errors import within
from ._keys import keyed
from .cache import LayerCache, MemoryCache, keys_first
from .dropout import Dropout
from .linear import Linear, fan_in
from .mask import Mask
from .positions import Rotation, rotate


class Attention(eqx.Module):
    r"""$\mathrm{concat}_h(\mathrm{softmax}(q_h k_h^\top \cdot s + \mathrm{bias}) v_h) W_o^\top$ within a sequence,
    or of a sequence that looks at another one, its `memory`.

    `attend` is a field: `tree_at` replaces the way it is computed (`kernels.attend`) by another, such as
    `kernels.plain`. `num_heads` query heads share `num_kv_heads` key and value heads. The scale $s$ is
    `head_dim ** -0.5` unless given. `dropout` acts on the attention weights.
    `query_norm` and `key_norm`, where there are any, act on every head before it is turned by its `rotation`.
    With a `window`, a token sees that many tokens, itself included.
    A query that may see nothing gives zeros, or the mean of all values with `empty="uniform"`.
    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    query_proj: eqx.Module
    key_proj: eqx.Module
    value_proj: eqx.Module
    query_norm: eqx.Module | None
    key_norm: eqx.Module | None
    attend: Callable
    output_proj: eqx.Module
    dropout: Dropout
    num_heads: int = eqx.field(static=True)
    num_kv_heads: int = eqx.field(static=True)
    scale: float | None = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    empty: Literal["zeros", "uniform"] = eqx.field(static=True)

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        scale: float | None = None,
        window: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        norm: Callable[[int], eqx.Module] | None = None,
        query_init: Initializer | None = None,
        output_bias: bool | None = None,
        output_init: Initializer | None = None,
        output_proj: eqx.Module | None = None,
        empty: Literal["zeros", "uniform"] = "zeros",
        init: Initializer = fan_in,
        key: PRNGKeyArray,
    ):
        """`norm` makes `query_norm` and `key_norm` of a head's width; `value_dim` is `head_dim` unless given.

        `query_init`, `output_bias` and `output_init` are `init`, `use_bias` and `init` unless given. `output_proj` is
        taken as it is, if given: a module that maps all heads' results, side by side, to the stream.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"Attention: embed_dim = {embed_dim} is not a multiple of num_heads = {num_heads}.")
        if num_heads % num_kv_heads:
            raise ValueError(f"Attention: num_heads = {num_heads} is not a multiple of num_kv_heads = {num_kv_heads}.")
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        query, key_, value, output = jax.random.split(key, 4)
        dense = lambda outer, init, k: Linear(embed_dim, outer, use_bias=use_bias, init=init, key=k)
        self.query_proj = dense(num_heads * head_dim, init if query_init is None else query_init, query)
        self.key_proj = dense(num_kv_heads * head_dim, init, key_)
        self.value_proj = dense(num_kv_heads * value_dim, init, value)
        self.query_norm = None if norm is None else norm(head_dim)
        self.key_norm = None if norm is None else norm(head_dim)
        self.attend = kernels.attend
        if output_proj is None:
            use_bias = use_bias if output_bias is None else output_bias
            init = init if output_init is None else output_init
            output_proj = Linear(num_heads * value_dim, embed_dim, use_bias=use_bias, init=init, key=output)
        self.output_proj = output_proj
        self.dropout = Dropout(dropout)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.scale = scale
        self.window = window
        self.empty = empty

    def __check_init__(self):
        """Also where the numbers of heads were changed. A projection that does not say its width is let pass."""
        counts = {"query": self.num_heads, "key": self.num_kv_heads, "value": self.num_kv_heads}
        wide = {name: getattr(getattr(self, f"{name}_proj"), "out_features", 0) for name in counts}
        for name, count in counts.items():
            if count < 1 or wide[name] % count:
                of = f"num_heads = {count}" if name == "query" else f"num_kv_heads = {count}"
                raise ValueError(f"Attention: the {wide[name]} features of {name}_proj are not a multiple of {of}.")
        query, key = (wide[name] // counts[name] for name in ("query", "key"))
        if 0 < query != key > 0:
            raise ValueError(f"Attention: a head's queries are {query} wide and its keys {key}; both must be equal.")

    def __call__(
        self,
        x: Float[Array, "*axes seq embed_dim"],
        mask: Mask | None = None,
        *,
        memory: Float[Array, "*axes keys embed_dim"] | None = None,
        rotation: Rotation | None = None,
        bias: Float[Array, "num_heads seq keys"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*axes seq embed_dim"]:
        """Keys and values are those of `memory`, where one is given."""
        q = self._query(x, rotation, key)
        k, v = self._key_value(x if memory is None else memory, rotation, key)
        return self._mixed(q, k, v, Mask() if mask is None else mask, bias, key)

    def init_cache(self, length: int, dtype: DTypeLike) -> LayerCache:
        """An empty cache with room for `length` tokens."""
        heads = self.num_kv_heads
        return LayerCache(
            length, heads, self.key_proj.out_features // heads, self.value_proj.out_features // heads, dtype
        )

    def step(
        self,
        x: Float[Array, "seq embed_dim"],
        mask: Mask,
        cache: LayerCache,
        index: Int[Array, ""] | int,
        *,
        rotation: Rotation | None = None,
        bias: Float[Array, "num_heads seq keys"] | None = None,
    ) -> tuple[Float[Array, "seq embed_dim"], LayerCache]:
        """The same for tokens that come after those in `cache`, and the cache with theirs, from slot `index` on.

        `mask` is over all of the cache's slots.
        """
        flat = (self._flat(name, x, None) for name in ("query", "key", "value"))
        return self.step_of(*flat, mask, cache, index, rotation=rotation, bias=bias)

    def step_of(
        self,
        q: Float[Array, "seq queries"],
        k: Float[Array, "seq keys_"],
        v: Float[Array, "seq values"],
        mask: Mask,
        cache: LayerCache,
        index: Int[Array, ""] | int,
        *,
        rotation: Rotation | None = None,
        bias: Float[Array, "num_heads seq keys"] | None = None,
    ) -> tuple[Float[Array, "seq embed_dim"], LayerCache]:
        """`step` behind the projections, for those who compute these otherwise."""
        q, k = (self._turned(self._heads(name, y), rotation) for name, y in (("query", q), ("key", k)))
        cache = cache.extended(k, self._heads("value", v), index)
        return self._looked(q, cache, mask, bias), cache

    def remember(self, memory: Float[Array, "keys embed_dim"], real: Bool[Array, " keys"]) -> MemoryCache:
        """What `recall` needs of a memory whose `real` tokens exist: computed once for all that will look at it."""
        k, v = self._key_value(memory, None, None)
        return MemoryCache(keys_first(k), v.swapaxes(0, 1), real)

    def recall(self, x: Float[Array, "seq embed_dim"], cache: MemoryCache) -> Float[Array, "seq embed_dim"]:
        """The same as a call with the `memory` that is in `cache`."""
        return self._looked(self._query(x, None, None), cache, Mask(keys=cache.real), None)

    def _looked(self, q: Array, cache: LayerCache | MemoryCache, mask: Mask, bias: Array | None) -> Array:
        return self._mixed(q, cache.keys.transpose(2, 0, 1), cache.values.swapaxes(0, 1), mask, bias, None)

    def _query(
        self, x: Float[Array, "*axes seq embed_dim"], rotation: Rotation | None, key: PRNGKeyArray | None
    ) -> Array:
        return self._turned(self._heads("query", self._flat("query", x, key)), rotation)

    def _key_value(
        self, x: Float[Array, "*axes keys embed_dim"], rotation: Rotation | None, key: PRNGKeyArray | None
    ) -> tuple[Array, Array]:
        k = self._turned(self._heads("key", self._flat("key", x, key)), rotation)
        return k, self._heads("value", self._flat("value", x, key))

    def _turned(self, x: Array, rotation: Rotation | None) -> Array:
        return x if rotation is None else rotate(x, rotation)

    def _flat(
        self, name: str, x: Float[Array, "*axes seq embed_dim"], key: PRNGKeyArray | None
    ) -> Float[Array, "*axes seq features"]:
        with within(f"{name}_proj"):
            return keyed(getattr(self, f"{name}_proj"), x, key)

    def _heads(self, name: str, y: Float[Array, "*axes seq features"]) -> Float[Array, "*axes seq heads head_dim"]:
        heads = self.num_heads if name == "query" else self.num_kv_heads
        y = y.reshape(*y.shape[:-1], heads, -1)
        norm = getattr(self, f"{name}_norm", None)
        if norm is None:
            return y
        with within(f"{name}_norm"):
            return norm(y)

    def _windowed(self, mask: Mask) -> Mask:
        windows = [window for window in (self.window, mask.window) if window is not None]
        return replace(mask, window=min(windows)) if windows else mask

    def _mixed(
        self, q: Array, k: Array, v: Array, mask: Mask, bias: Array | None, key: PRNGKeyArray | None
    ) -> Float[Array, "*axes seq embed_dim"]:
        on = key is not None and not self.dropout.inference
        with within("attend"):
            attended = self.attend(
                q,
                k,
                v,
                self._windowed(mask),
                bias=bias,
                scale=q.shape[-1] ** -0.5 if self.scale is None else self.scale,
                rate=self.dropout.p if on else 0.0,
                key=key if on else None,
                empty=self.empty,
            )
        with within("output_proj"):
            return keyed(self.output_proj, attended.reshape(*attended.shape[:-2], -1), key)
