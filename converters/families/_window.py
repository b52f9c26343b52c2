"""Which layers of Qwen's models see a window alone, which config.json says in four fields."""

from typing import Any

from ..config import Fact, flag, optional, some, whole

FULL, SLIDING = "full_attention", "sliding_attention"


def read(layers: Any, used: Any, window: Any, first: Any, kinds: Any) -> tuple[int, int | None, Any]:
    """Number of layers, window, and which layers have it (None: all, or there is no window).

    `first` is the first layer with a window where `kinds` does not name every layer's.
    """
    layers, first = whole(layers), whole(first)
    window = optional(some)(window) if flag(used) else None
    if kinds is None:
        kinds = [SLIDING if window is not None and i >= first else FULL for i in range(min(layers, 2**16))]
    if not isinstance(kinds, list | tuple) or len(kinds) != layers or not all(k in (FULL, SLIDING) for k in kinds):
        raise ValueError(f"expected {FULL} or {SLIDING} for each of {layers} layers")
    windowed = tuple(kind == SLIDING for kind in kinds)
    if window is None and any(windowed):
        raise ValueError("some layers are to see a window, but there is none (use_sliding_window, sliding_window)")
    if not any(windowed):
        return layers, None, None
    return layers, window, None if all(windowed) else windowed


def write(layers: int, window: int | None, windowed: tuple[bool, ...] | None) -> tuple[Any, ...]:
    """The inverse of `read`; every layer is named, and `max_window_layers` counts those before the first window."""
    has = (window is not None,) * layers if windowed is None or window is None else windowed
    first = next((i for i, one in enumerate(has) if one), layers)
    return layers, window is not None, window, first, [SLIDING if one else FULL for one in has]


FACT = Fact(
    ("num_hidden_layers", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    ("num_layers", "window", "windowed"),
    read,
    write,
    (32, False, 4096, 28, None),
)
