"""Which query may look at which key, as one value that every attention path understands."""

from functools import reduce
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Places(NamedTuple):
    """Where queries and keys stand in a text, where that is not in order."""

    queries: Int[Array, " seq"]
    keys: Int[Array, " keys"]


def places_of(offset: Places | Int[Array, ""] | int, seq: int, keys: int) -> Places:
    """Keys from position 0 on, and queries from `offset` on; or `offset` itself, where it says it of each."""
    return offset if isinstance(offset, Places) else Places(jnp.arange(seq) + offset, jnp.arange(keys))


class Mask(eqx.Module):
    """The pairs (query, key) that attention may use: `True` means attend. Given conditions are joined by "and".

    - `causal`: key position <= query position. Key `j` stands at position `j` and query `i` at `i + offset`, unless
        `offset` says of each where it stands (`Places`).
    - `window`: query position - key position < `window` (looks back at most `window - 1` keys).
    - `keys`: keys that exist at all (a tokenizer's `attention_mask`).
    - `segments`: several texts packed in one row; query and key must carry the same segment id.
    - `dense`: anything else, spelled out; its leading axis may be missing (the same for all heads) or `num_heads`.

    `causal` and `window` are static, so that a kernel can skip whole blocks; the arrays are traced.
    `Mask()` lets every query see every key.
    """

    causal: bool = eqx.field(static=True, default=False)
    window: int | None = eqx.field(static=True, default=None)
    offset: Places | Int[Array, ""] | int = 0
    keys: Bool[Array, " keys"] | None = None
    segments: Int[Array, " keys"] | None = None
    dense: Bool[Array, "*heads seq keys"] | None = None

    @property
    def is_empty(self) -> bool:
        """True when nothing is masked, which is known while tracing."""
        given = (self.window, self.keys, self.segments, self.dense)
        return not self.causal and all(x is None for x in given)

    def allowed(self, seq: int, keys: int) -> Bool[Array, "*heads seq keys"] | None:
        """The whole table for `seq` queries and `keys` keys, or None where nothing is masked."""
        places = places_of(self.offset, seq, keys)
        here, there = places.queries[:, None], places.keys[None, :]
        parts = []
        if self.causal:
            parts.append(there <= here)
        if self.window is not None:
            parts.append(here - there < self.window)
        if self.keys is not None:
            parts.append(jnp.broadcast_to(self.keys[None, :], (seq, keys)))
        if self.segments is not None:
            parts.append(jnp.take(self.segments, here[:, 0], mode="clip")[:, None] == self.segments[None, :])
        if self.dense is not None:
            parts.append(self.dense)
        ndim = max((part.ndim for part in parts), default=0)
        parts = [part[None] if part.ndim < ndim else part for part in parts]
        return reduce(jnp.logical_and, parts) if parts else None
