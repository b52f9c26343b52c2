"""Biases by distance: the buckets of transformers, and a number for every head, query and key in a literal loop."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from eqx_transformers import nn
from eqx_transformers.nn.positions import distance_buckets

from .test_layers import f64, filled

KEY = jax.random.key(0)
HEADS = 3
both_ways = pytest.mark.parametrize("bidirectional", [True, False], ids=["both sides", "one side"])
# T5's own first; then ends nearer and further than the buckets reach, and odd numbers, which halve unevenly.
SIZES = [(32, 128), (8, 20), (8, 7), (16, 64), (64, 256), (32, 1000), (7, 11), (5, 3), (13, 50), (4, 3), (128, 512)]


def theirs(distance, num_buckets, max_distance, bidirectional):
    given = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    return T5Attention._relative_position_bucket(torch.as_tensor(distance), **given).numpy()


def ours(distance, num_buckets, max_distance, bidirectional):
    near = np.clip(distance, -max_distance, max_distance)
    return distance_buckets(num_buckets, max_distance, bidirectional)[near + max_distance]


def bias_of(bidirectional=False, num_buckets=8, max_distance=7, dtype="float32"):
    made = nn.RelativeBias(
        HEADS, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional, key=KEY
    )
    return filled(made, dtype=dtype)


# ---- buckets


@both_ways
@pytest.mark.parametrize(("num_buckets", "max_distance"), SIZES)
def test_buckets_are_transformers_far_beyond_the_last_one(num_buckets, max_distance, bidirectional):
    distance = np.arange(-3 * max_distance, 3 * max_distance + 1)
    expected = theirs(distance, num_buckets, max_distance, bidirectional)
    np.testing.assert_array_equal(ours(distance, num_buckets, max_distance, bidirectional), expected)
    held = set(expected.tolist())
    assert held <= set(range(num_buckets)) and len(held) > 2


def test_t5s_own_buckets_are_those_of_the_paper():
    """32 and 128: a distance has a bucket of its own up to 7 on either side, and up to 15 where one side is seen."""
    both, one = (distance_buckets(32, 128, bidirectional) for bidirectional in (True, False))
    np.testing.assert_array_equal(both[128 - 7 : 129], np.arange(7, -1, -1))
    np.testing.assert_array_equal(both[129 : 128 + 8], 16 + np.arange(1, 8))
    np.testing.assert_array_equal(one[128 - 15 : 129], np.arange(15, -1, -1))
    assert not one[129:].any() and both[0] == 15 and both[-1] == 31 and one[0] == 31
    # 8 sqrt(2)^k: every second one is a whole number, where a bucket begins.
    starts = [128 - d for d in (16, 32, 64)]
    np.testing.assert_array_equal(both[starts], [10, 12, 14])
    np.testing.assert_array_equal(both[np.add(starts, 1)], [9, 11, 13])


# 27 / 8 = 1.5^3 and 81 / 24 too: buckets would begin at exactly 12 and 18, 36 and 54 if logarithms had no end.
CLOSE = [(17, 27, {3: 12, 6: 18}, 8), (48, 81, {8: 36, 16: 54}, 24)]


@pytest.mark.parametrize(("num_buckets", "max_distance", "begins", "exact"), CLOSE)
def test_a_bucket_that_begins_at_a_whole_number_is_decided_by_the_nearest_float32(
    num_buckets, max_distance, begins, exact
):
    """No two libraries need agree there: their float32 logarithms differ in the last digit, which decides.

    Ours is the nearest float32 to the true one, on every machine. Everywhere else transformers' bucket is ours.
    """
    distance = np.arange(-3 * max_distance, max_distance + 1)
    got = ours(distance, num_buckets, max_distance, False)
    differs = distance[got != theirs(distance, num_buckets, max_distance, False)]
    assert set((-differs).tolist()) <= set(begins.values())
    for more, away in begins.items():
        nearest = np.float32(np.log(np.float64(away) / exact)) / np.float32(np.log(max_distance / exact))
        true = np.log(away / exact) / np.log(max_distance / exact) * (num_buckets - exact)
        assert abs(true - more) < 1e-12
        assert got[3 * max_distance - away] == exact + int(nearest * np.float32(num_buckets - exact))


# ---- the bias


def literal(weight, seq, keys, offset, num_buckets, max_distance, bidirectional):
    expected = np.zeros((HEADS, seq, keys))
    for i in range(seq):
        for j in range(keys):
            bucket = theirs(np.array([j - (offset + i)]), num_buckets, max_distance, bidirectional)[0]
            expected[:, i, j] = weight[bucket]
    return expected


PLACES = [(5, 5, 0), (1, 1, 0), (1, 9, 8), (1, 9, 3), (4, 11, 5), (3, 11, 40), (7, 2, 0), (7, 1, 0), (2, 30, 28)]


@both_ways
@pytest.mark.parametrize("sizes", [(8, 7), (7, 11)], ids=str)
def test_a_bias_is_its_literal_loop_for_any_queries_keys_and_offset(sizes, bidirectional):
    bias = bias_of(bidirectional, *sizes)
    found = eqx.filter_jit(lambda bias: [bias(*place) for place in PLACES])(bias)
    traced = eqx.filter_jit(lambda bias, offsets: [bias(*p[:2], o) for p, o in zip(PLACES, offsets, strict=True)])(
        bias, [jnp.asarray(offset) for *_, offset in PLACES]
    )
    for place, got, same in zip(PLACES, found, traced, strict=True):
        assert got.shape == (HEADS, *place[:2]) and got.dtype == jnp.float32
        np.testing.assert_array_equal(got, literal(f64(bias.weight), *place, *sizes, bidirectional), err_msg=str(place))
        np.testing.assert_array_equal(same, got)


@both_ways
def test_an_offset_is_that_of_every_row_under_vmap(bidirectional):
    bias, offsets = bias_of(bidirectional), jnp.asarray([0, 3, 9])
    got = jax.jit(jax.vmap(lambda offset: bias(2, 10, offset)))(offsets)
    expected = [literal(f64(bias.weight), 2, 10, int(offset), 8, 7, bidirectional) for offset in offsets]
    np.testing.assert_array_equal(got, expected)


@both_ways
@pytest.mark.parametrize("place", [(6, 11, 4), (7, 2, 0), (1, 9, 8)], ids=str)
def test_the_gradient_is_a_literal_scatter(place, bidirectional):
    seq, keys, offset = place
    bias = bias_of(bidirectional)
    weights = np.random.default_rng(4).normal(size=(HEADS, seq, keys)).astype(np.float32)
    loss = lambda bias, offset: (bias(seq, keys, offset) * weights).sum()
    got = jax.jit(jax.grad(loss))(bias, jnp.asarray(offset)).weight
    expected = np.zeros((8, HEADS))
    for i in range(seq):
        for j in range(keys):
            bucket = theirs(np.array([j - (offset + i)]), 8, 7, bidirectional)[0]
            expected[bucket] += weights[:, i, j]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    unseen = np.setdiff1d(np.arange(8), ours(np.arange(-offset - seq + 1, keys - offset), 8, 7, bidirectional))
    assert not np.asarray(got)[unseen].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_bias_is_in_the_weights_dtype_bit_for_bit(dtype):
    bias = bias_of(dtype=dtype)
    got = bias(3, 6, 3)
    assert got.dtype == dtype
    np.testing.assert_array_equal(f64(got), literal(f64(bias.weight), 3, 6, 3, 8, 7, False))


def test_sizes_are_properties_of_the_weight():
    bias = bias_of(num_buckets=9)
    assert (bias.num_buckets, bias.num_heads) == (9, HEADS)
    resized = eqx.tree_at(lambda b: b.weight, bias, jnp.ones((8, 5)))
    assert (resized.num_buckets, resized.num_heads) == (8, 5) and resized(2, 3).shape == (5, 2, 3)
    drawn = nn.RelativeBias(HEADS, bidirectional=True, init=jax.nn.initializers.constant(0.5), key=KEY)
    assert drawn.weight.shape == (32, HEADS) and (drawn.weight == 0.5).all() and drawn.max_distance == 128


REFUSED = [
    (True, 3, 9, "num_buckets = 3 and max_distance = 9: there must be at least 4 buckets"),
    (False, 1, 9, "num_buckets = 1 and max_distance = 9: there must be at least 2 buckets"),
    (True, 32, 8, "num_buckets = 32 and max_distance = 8: .* distances beyond the 8 that have one each"),
    (False, 32, 16, "num_buckets = 32 and max_distance = 16: .* distances beyond the 16 that have one each"),
    (False, 32, 0, "max_distance = 0"),
]


@pytest.mark.parametrize(("bidirectional", "num_buckets", "max_distance", "said"), REFUSED)
def test_buckets_that_cannot_be_are_refused(bidirectional, num_buckets, max_distance, said):
    with pytest.raises(ValueError, match=said):
        bias_of(bidirectional, num_buckets, max_distance)


def test_the_fewest_buckets_and_the_nearest_end_are_taken():
    for bidirectional, num_buckets in ((True, 4), (False, 2)):
        bias = bias_of(bidirectional, num_buckets, 2)
        np.testing.assert_array_equal(bias(3, 3), literal(f64(bias.weight), 3, 3, 0, num_buckets, 2, bidirectional))


@both_ways
def test_places_in_any_order_have_the_biases_of_their_distances(bidirectional):
    made = bias_of(bidirectional)
    places = nn.Places(jnp.array([9, 2, 2]), jnp.array([0, 30, 2, 9, 1]))
    table = np.asarray(made(40, 40))
    np.testing.assert_array_equal(
        made(3, 5, places), table[:, np.asarray(places.queries)][:, :, np.asarray(places.keys)]
    )
