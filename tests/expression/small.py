"""A small language model of Equinox's own layers; `gelu` and `softmax` are written inline, and in no field."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

# An expression runs the equations of a call in stretches. Until JAX 0.10, the CPU's compiler rounded what is compiled
# in one piece otherwise than what runs step by step: then the last bit is not compared.
EXACT = jax.__version_info__ >= (0, 10)
VOCAB, DIM, HIDDEN, HEADS, LAYERS, LENGTH = 11, 8, 16, 2, 2, 5
KEY = jax.random.key(0)


def expect_numbers(found, wanted, of_largest=2e-6):
    """Near by the largest number of each array, as sums of it are."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    if not np.issubdtype(wanted.dtype, np.floating) or not wanted.size:
        np.testing.assert_array_equal(found, wanted)
        return
    np.testing.assert_allclose(found, wanted, rtol=0, atol=of_largest * max(1.0, float(np.abs(wanted).max())))


def expect_bits(found, wanted):
    """Equal in dtype and to the last bit, where the compiler is `EXACT`; else as two float32 runs of a model are."""
    assert getattr(found, "dtype", None) == getattr(wanted, "dtype", None)
    if EXACT or not isinstance(wanted, jax.Array | np.ndarray):
        assert np.array_equal(found, wanted)
    else:
        expect_numbers(found, wanted, of_largest=2e-5)


class Feed(eqx.Module):
    """Two layers around an activation that `jax.nn` is asked for by name."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, hidden: int = HIDDEN, *, key: PRNGKeyArray):
        up, down = jax.random.split(key)
        self.up = eqx.nn.Linear(DIM, hidden, key=up)
        self.down = eqx.nn.Linear(hidden, DIM, key=down)

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        return self.down(jax.nn.gelu(self.up(x)))


class Block(eqx.Module):
    """Attention and a feed-forward network, each behind a norm and beside the stream."""

    attention_norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    feed_norm: eqx.nn.LayerNorm
    feed: Feed

    def __init__(self, hidden: int = HIDDEN, *, key: PRNGKeyArray):
        attention, feed = jax.random.split(key)
        self.attention_norm = eqx.nn.LayerNorm(DIM)
        self.attention = eqx.nn.MultiheadAttention(HEADS, DIM, key=attention)
        self.feed_norm = eqx.nn.LayerNorm(DIM)
        self.feed = Feed(hidden, key=feed)

    def __call__(self, x: Float[Array, "seq dim"]) -> Float[Array, "seq dim"]:
        y = jax.vmap(self.attention_norm)(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        return x + jax.vmap(self.feed)(jax.vmap(self.feed_norm)(x))


class Small(eqx.Module):
    """A list of blocks between an embedding and a head."""

    embed: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, *, key: PRNGKeyArray):
        embed, head, *blocks = jax.random.split(key, 2 + LAYERS)
        self.embed = eqx.nn.Embedding(VOCAB, DIM, key=embed)
        self.blocks = [Block(key=k) for k in blocks]
        self.norm = eqx.nn.LayerNorm(DIM)
        self.head = eqx.nn.Linear(DIM, VOCAB, use_bias=False, key=head)

    def __call__(self, ids: Int[Array, " seq"]) -> Float[Array, "seq vocab"]:
        x = jax.vmap(self.embed)(ids)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


class Stacked(eqx.Module):
    """The same with one block, whose arrays have an axis of layers, in a scan; with `remat` it is computed twice."""

    embed: eqx.nn.Embedding
    blocks: Block
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    remat: bool = eqx.field(static=True)

    def __init__(self, model: Small, *, remat: bool = False):
        arrays, rest = zip(*(eqx.partition(block, eqx.is_array) for block in model.blocks), strict=True)
        self.embed, self.norm, self.head, self.remat = model.embed, model.norm, model.head, remat
        self.blocks = eqx.combine(jax.tree.map(lambda *x: jnp.stack(x), *arrays), rest[0])

    def __call__(self, ids: Int[Array, " seq"]) -> Float[Array, "seq vocab"]:
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        def step(x, layer):
            run = lambda block, x: block(x)
            run = eqx.filter_checkpoint(run) if self.remat else run
            return run(eqx.combine(layer, rest), x), None

        x, _ = jax.lax.scan(step, jax.vmap(self.embed)(ids), arrays)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


MODEL = Small(key=KEY)
MODELS = {"list": MODEL, "stacked": Stacked(MODEL), "remat": Stacked(MODEL, remat=True)}


def ids(length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def states(length: int = LENGTH, seed: int = 0) -> Array:
    """What a block is given."""
    return jax.random.normal(jax.random.key(seed), (length, DIM))


def loss(model: Callable[..., Array], *args: Array) -> Array:
    return jnp.square(model(*args)).mean()


def gradients(model: eqx.Module, *args: Array) -> list[Array]:
    """Of the loss, for every array of the model, in the tree's order."""
    return jax.tree.leaves(eqx.filter_grad(loss)(model, *args))
