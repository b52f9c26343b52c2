"""Dropout: its share is dropped wherever one looks, the rest is scaled, and it is off when it should be."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import nn
from eqx_transformers.nn.dropout import keep

KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_its_share_is_dropped_of_all_of_each_row_and_of_each_place(rate):
    shape = 4, 128, 256
    seeds = jax.random.bits(KEY, shape[:2], jnp.uint32)
    factors = np.asarray(keep(seeds, jnp.float32(rate), shape[2]))
    assert set(np.unique(factors)) == {0, np.float32(1 / (1 - jnp.float32(rate)))}
    layer = np.asarray(nn.Dropout(rate)(jnp.ones(shape), key=KEY))
    np.testing.assert_array_equal(layer, factors)
    kept = (factors > 0) - (1 - rate)
    noise = math.sqrt(rate * (1 - rate))
    for axes in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        means = kept.mean(axes)
        assert np.abs(means).max() < 5 * noise / math.sqrt(kept.size / means.size)
    for axis, step in ((0, 1), (1, 1), (2, 1), (1, 64), (2, 64), (2, 128)):  # neighbours do not know of each other
        pairs = kept * np.roll(kept, step, axis)
        assert abs(pairs.mean()) < 5 * noise**2 / math.sqrt(kept.size)


def test_keys_draw_independently():
    split = jax.random.split(KEY, 200)
    masks = np.asarray(jax.vmap(lambda key: nn.Dropout(0.5)(jnp.ones((3, 41)), key=key))(split)) - 1  # -1 or 1
    flat = masks.reshape(200, -1)
    between = (flat @ flat.T / flat.shape[1])[np.triu_indices(200, 1)]  # of two keys
    assert np.abs(between).max() < 6 / math.sqrt(flat.shape[1])
    assert abs(between.std() * math.sqrt(flat.shape[1]) - 1) < 0.05
    np.testing.assert_array_equal(masks[3], nn.Dropout(0.5)(jnp.ones((3, 41)), key=split[3]) - 1)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_what_is_kept_is_scaled_in_its_dtype_and_so_is_the_gradient(dtype):
    x = jnp.linspace(-3, 3, 7 * 9).reshape(7, 9).astype(dtype)
    y, pull = jax.vjp(lambda x: nn.Dropout(0.3)(x, key=KEY), x)
    kept = np.asarray(nn.Dropout(0.3)(jnp.ones((7, 9)), key=KEY) > 0)
    scaled = lambda x: np.where(kept, np.asarray(x, np.float32) / np.float32(0.7), 0).astype(dtype)
    assert y.dtype == dtype and 0 < kept.sum() < kept.size
    near = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(scaled(x), np.float32), rtol=near)
    found = np.asarray(pull(jnp.ones_like(y))[0], np.float32)
    np.testing.assert_allclose(found, np.asarray(scaled(jnp.ones_like(x)), np.float32), rtol=near)


def test_it_is_off_when_it_should_be():
    x, layer = jnp.arange(1.0, 9).reshape(2, 4), nn.Dropout(0.5)
    assert not np.allclose(layer(x, key=KEY), x)
    off = {
        "inference": eqx.nn.inference_mode(layer)(x, key=KEY),
        "inference of the call": layer(x, inference=True),
        "no rate": nn.Dropout(0)(x),
        "a rate of 0 in an array": nn.Dropout(jnp.zeros(()))(x, key=KEY),
    }
    for name, y in off.items():
        np.testing.assert_array_equal(y, x, err_msg=name)
    on = eqx.nn.inference_mode(layer)(x, key=KEY, inference=False)
    np.testing.assert_array_equal(on, layer(x, key=KEY))
    assert not nn.Dropout(1.0)(x, key=KEY).any()
    with pytest.raises(RuntimeError, match=r"rate 0\.5 needs a key"):
        layer(x)


def test_a_rate_may_be_an_array_that_no_gradient_reaches_and_any_shape_goes():
    x = jnp.arange(1.0, 9).reshape(2, 4)
    total = lambda rate: nn.Dropout(rate)(x, key=KEY).sum()
    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.array(0.5))
    assert float(gradient) == 0 and float(value) == float(nn.Dropout(0.5)(x, key=KEY).sum())
    number = [float(nn.Dropout(0.5)(jnp.array(3.0), key=key)) for key in jax.random.split(KEY, 20)]
    assert set(number) == {0.0, 6.0}
    assert nn.Dropout()(jnp.ones((0, 4)), key=KEY).shape == (0, 4)
    raw = jax.random.key_data(KEY)
    np.testing.assert_array_equal(nn.Dropout()(x, key=raw), nn.Dropout()(x, key=KEY))
