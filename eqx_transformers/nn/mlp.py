"""The position-wise feed-forward network."""

from collections.abc import Callable

import equinox as eqx
import jax
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, PRNGKeyArray

from ._errors import within
from ._keys import keyed
from .dropout import Dropout
from .linear import Linear, fan_in


class MLP(eqx.Module):
    """`down_proj(dropout(activation(up_proj(x))))` over the last axis, for any leading axes."""

    up_proj: eqx.Module
    activation: Callable
    dropout: Dropout
    down_proj: eqx.Module

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        activation: Callable,
        *,
        dropout: float = 0.0,
        use_bias: bool = True,
        init: Initializer = fan_in,
        output_init: Initializer | None = None,
        key: PRNGKeyArray,
    ):
        """`output_init` draws the matrix of `down_proj`: `init` unless given."""
        up, down = jax.random.split(key)
        self.up_proj = Linear(embed_dim, mlp_dim, use_bias=use_bias, init=init, key=up)
        self.activation = activation
        self.dropout = Dropout(dropout)
        init = init if output_init is None else output_init
        self.down_proj = Linear(mlp_dim, embed_dim, use_bias=use_bias, init=init, key=down)

    def __call__(
        self, x: Float[Array, "*axes embed_dim"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes embed_dim"]:
        with within("up_proj"):
            x = keyed(self.up_proj, x, key)
        x = self.dropout(self.activation(x), key=key, inference=True if key is None else None)
        with within("down_proj"):
            return keyed(self.down_proj, x, key)


class GatedMLP(eqx.Module):
    """`down_proj(dropout(activation(gate_proj(x)) * up_proj(x)))` over the last axis, for any leading axes.

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    gate_proj: eqx.Module
    up_proj: eqx.Module
    activation: Callable
    dropout: Dropout
    down_proj: eqx.Module

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        activation: Callable,
        *,
        dropout: float = 0.0,
        use_bias: bool = True,
        init: Initializer = fan_in,
        output_init: Initializer | None = None,
        key: PRNGKeyArray,
    ):
        """`output_init` draws the matrix of `down_proj`: `init` unless given."""
        gate, up, down = jax.random.split(key, 3)
        self.gate_proj = Linear(embed_dim, mlp_dim, use_bias=use_bias, init=init, key=gate)
        self.up_proj = Linear(embed_dim, mlp_dim, use_bias=use_bias, init=init, key=up)
        self.activation = activation
        self.dropout = Dropout(dropout)
        init = init if output_init is None else output_init
        self.down_proj = Linear(mlp_dim, embed_dim, use_bias=use_bias, init=init, key=down)

    def __call__(
        self, x: Float[Array, "*axes embed_dim"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*axes embed_dim"]:
        with within("gate_proj"):
            gate = self.activation(keyed(self.gate_proj, x, key))
        with within("up_proj"):
            x = gate * keyed(self.up_proj, x, key)
        x = self.dropout(x, key=key, inference=True if key is None else None)
        with within("down_proj"):
            return keyed(self.down_proj, x, key)
