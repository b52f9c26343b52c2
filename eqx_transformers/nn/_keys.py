"""Random keys on their way to what draws."""

from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray


def keyed(
    module: Any, x: Float[Array, "*axes in_features"], key: PRNGKeyArray | None
) -> Float[Array, "*axes features"]:
    """`module(x)`, with `key=key` where there is a key.

    For what stands in a linear layer's place and draws, as an adapter with dropout does. All layers of a block get the
    block's own key: who draws folds something of its own into it. Inference asks no module to take one.
    """
    return module(x) if key is None else module(x, key=key)
