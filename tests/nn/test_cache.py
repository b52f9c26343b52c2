"""Caches: what is put in, how a batch shares the index, and what happens when there is no room."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import nn

from .test_layers import random

LENGTH, KV_HEADS, DIM, VALUE = 7, 2, 4, 3
empty = lambda dtype="float32": nn.LayerCache(LENGTH, KV_HEADS, DIM, VALUE, dtype)
cache = lambda layers=2: nn.Cache(tuple(empty() for _ in range(layers)), LENGTH)


@pytest.mark.parametrize("traced", [False, True], ids=["known", "traced"])
def test_keys_and_values_go_into_their_slots_and_nothing_else_changes(traced):
    k, v = random(3, KV_HEADS, DIM), random(3, KV_HEADS, VALUE, seed=2)
    old = random(KV_HEADS, DIM, LENGTH), random(KV_HEADS, LENGTH, VALUE)
    held = eqx.tree_at(lambda c: (c.keys, c.values), empty(), old)
    put = lambda held, index: held.extended(k, v, index)
    full = (eqx.filter_jit(put) if traced else put)(held, jnp.asarray(2) if traced else 2)
    keys, values = np.array(held.keys), np.array(held.values)
    for head in range(KV_HEADS):
        for token in range(3):
            keys[head, :, 2 + token], values[head, 2 + token] = k[token, head], v[token, head]
    np.testing.assert_array_equal(full.keys, keys)
    np.testing.assert_array_equal(full.values, values)


def test_a_layers_cache_is_of_the_dtype_that_was_asked():
    held = empty("bfloat16").extended(random(1, KV_HEADS, DIM), random(1, KV_HEADS, VALUE), 0)
    assert held.keys.dtype == held.values.dtype == jnp.bfloat16
    assert (held.keys.shape, held.values.shape) == ((KV_HEADS, DIM, LENGTH), (KV_HEADS, LENGTH, VALUE))
    assert held.length == LENGTH


def test_a_cache_counts_its_slots_and_marks_the_real_ones():
    first = cache().extended(jnp.array([False, True, True]))
    second = first.extended(jnp.array([True, False]))
    assert (int(cache().index), int(first.index), int(second.index), second.length) == (0, 3, 5, LENGTH)
    assert second.real.tolist() == [False, True, True, True, False, False, False]
    assert not second.overfull


def test_the_mask_is_causal_over_all_slots_and_hides_what_is_not_real():
    held = cache().extended(jnp.array([False, True, True])).extended(jnp.array([True, False]))
    allowed = np.asarray(held.mask(2).allowed(2, LENGTH))
    assert allowed.tolist() == [[False, True, True, True, False, False, False]] * 2
    first = cache().extended(jnp.ones(3, bool)).mask(3).allowed(3, LENGTH)
    np.testing.assert_array_equal(first, np.tri(3, LENGTH, dtype=bool))


def test_a_batch_has_arrays_of_its_own_and_one_index():
    rows = np.array([[True, True], [False, True], [True, False]])
    batch = jax.tree.map(lambda x: jnp.stack([x] * 3), cache())
    batch = eqx.tree_at(lambda c: c.index, batch, jnp.asarray(1))
    axes = cache().axes
    assert axes.index is None and axes.real == 0 and axes.layers[1].keys == 0
    k = random(3, 2, KV_HEADS, DIM)
    v = random(3, 2, KV_HEADS, VALUE)

    def step(held, real, k, v):
        index, held = held.index, held.extended(real)
        return eqx.tree_at(lambda c: c.layers[0], held, held.layers[0].extended(k, v, index))

    out = jax.vmap(step, in_axes=(axes, 0, 0, 0), out_axes=axes)(batch, rows, k, v)
    assert out.index.shape == () and int(out.index) == 3
    np.testing.assert_array_equal(out.real[:, 1:3], rows)
    np.testing.assert_array_equal(out.layers[0].keys[:, :, :, 1:3], k.transpose(0, 2, 3, 1))
    assert not out.layers[1].keys.any()


# ---- branches


def test_branches_see_the_trunk_and_what_is_behind_them_and_stand_in_one_place():
    """By hand: two padded tokens of three are the trunk, then two branches, of which the first goes on twice."""
    trunk = cache().extended(jnp.array([False, True, True]))
    assert isinstance(trunk.branched(2), nn.Branches) and issubclass(nn.Branches, nn.AbstractCache)
    first = trunk.branched(2).extended(jnp.array([True, True]))
    assert first.mask(2).allowed(2, LENGTH).tolist() == [
        [False, True, True, True, False, False, False],
        [False, True, True, False, True, False, False],
    ]
    second = first.follow(jnp.array([0, 0])).extended(jnp.array([True, False]))
    assert second.mask(2).allowed(2, LENGTH).tolist() == [
        [False, True, True, True, False, True, False],
        [False, True, True, True, False, False, False],
    ]
    places = second.mask(2).offset
    assert (places.queries.tolist(), places.keys.tolist()) == ([4, 4], [0, 1, 2, 3, 3, 4, 4])
    assert trunk.branched(2).counted(jnp.array([True, True])).tolist() == [3, 3]
    assert second.counted(jnp.array([True, False])).tolist() == [5, 3]
    assert (int(second.index), second.overfull) == (7, False)
    with pytest.raises(ValueError, match="of which 7 are filled: there is no room for 2 more"):
        second.extended(jnp.array([True, True]))


def test_a_window_counts_places_and_not_slots():
    held = cache().extended(jnp.ones(3, bool)).branched(2).extended(jnp.ones(2, bool)).extended(jnp.ones(2, bool))
    narrow = nn.Mask(window=3, offset=held.mask(2).offset, dense=held.mask(2).dense)
    assert narrow.allowed(2, LENGTH).tolist() == [
        [False, False, True, True, False, True, False],
        [False, False, True, False, True, False, True],
    ]


# ---- no room


def test_more_tokens_than_slots_are_refused_where_that_is_known():
    with pytest.raises(ValueError, match=r"The cache has 7 slots, of which 0 are filled: .* no room for 8 more tokens"):
        cache().extended(jnp.ones(8, bool))
    held = cache().extended(jnp.ones(5, bool))
    assert int(held.extended(jnp.ones(2, bool)).index) == 7
    with pytest.raises(ValueError, match="of which 5 are filled: there is no room for 3 more tokens"):
        held.extended(jnp.ones(3, bool))
    with pytest.raises(ValueError, match="no room for 8 more"):
        eqx.filter_jit(lambda c: c.extended(jnp.ones(8, bool)))(cache())


def test_where_it_is_not_known_the_cache_tells_or_checking_raises(monkeypatch):
    held = cache().extended(jnp.ones(5, bool))
    run = lambda: eqx.filter_jit(lambda c, n: c.extended(jnp.ones(n, bool)))
    assert run()(held, 3).overfull and not run()(held, 2).overfull
    monkeypatch.setenv("EQX_TRANSFORMERS_CHECK", "1")
    assert int(run()(held, 2).index) == 7
    with pytest.raises(Exception, match="The cache of 7 slots is full"):
        jax.block_until_ready(run()(held, 3))


def test_a_memory_cache_is_what_is_remembered():
    """Put together by hand, it is recalled as a memory is looked at; what is not real is not seen."""
    attention = nn.Attention(6, 2, head_dim=3, key=jax.random.key(0))
    memory, x = random(5, 6), random(1, 6, seed=2)
    real = jnp.asarray([True, False, True, True, False])
    heads = lambda project: project(memory).reshape(5, 2, 3).swapaxes(0, 1)
    kept = nn.MemoryCache(heads(attention.key_proj).swapaxes(1, 2), heads(attention.value_proj), real)
    made = attention.remember(memory, real)
    for ours, wanted in zip(jax.tree.leaves(made), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_allclose(
        attention.recall(x, kept), attention(x, nn.Mask(), memory=memory[real]), rtol=0, atol=1e-6
    )
