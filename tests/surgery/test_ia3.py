"""(IA)³ scales outputs, inputs or rows. The laws that it shares with LoRA are in test_lora.py and test_adapters.py."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import nn
from eqx_transformers.surgery.ia3 import IA3
from eqx_transformers.surgery.merging import merge

from .adapted import IDS, KEY, coded
from .test_lora import NORM, X, close, layer, table

pytestmark = pytest.mark.usefixtures("strict_promotion")


def scaled(base, on="output"):
    node = IA3.adapter(on)(base)
    return eqx.tree_at(lambda n: n.scale, node, 1 + jnp.arange(node.scale.size) / 4)


def test_what_it_computes():
    out, into, rows = scaled(layer()), scaled(layer(), "input"), scaled(table())
    assert np.allclose(out(X), np.asarray(out.scale) * np.asarray(layer()(X)), atol=1e-6)
    assert np.allclose(into(X), layer()(jnp.asarray(np.asarray(X) * np.asarray(into.scale))), atol=1e-6)
    assert np.allclose(rows(IDS), np.asarray(table()(IDS)) * np.asarray(rows.scale), atol=1e-6)
    assert np.allclose(rows.attend(X), np.asarray(X) @ np.asarray(rows.dense()).T, atol=1e-5)
    assert (out.in_features, out.out_features, rows.vocab_size, rows.embed_dim) == (7, 5, 11, 7)
    assert (out.scale.shape, into.scale.shape, rows.scale.shape) == ((5,), (7,), (7,))


@pytest.mark.parametrize("on", ["output", "input"])
def test_the_matrix_and_the_bias_are_those_that_are_merged(on):
    node = scaled(layer(), on)
    assert close(merge(node).weight, node.dense(), 1e-7) and close(merge(node).bias, node.bias, 1e-7)
    assert close(merge(node)(X), node(X), 1e-6)
    assert merge(scaled(nn.Linear(7, 5, use_bias=False, key=KEY), on)).bias is None


def test_in_half_precision_and_on_a_quantized_base():
    node = scaled(layer(jnp.bfloat16))
    assert node(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16 and merge(node).weight.dtype == jnp.bfloat16
    node = scaled(coded(layer()))
    assert close(node(X), X @ node.dense().T, 1e-6)
    assert eqx.filter_jit(lambda n, k: n(X, key=k))(node, KEY).shape == (2, 3, 5)


def test_messages(unchecked):
    with pytest.raises(ValueError, match="on must be one of output, input; it is 'both'"):
        IA3.adapter("both")
    with pytest.raises(ValueError, match="what goes into an Embedding are ids"):
        IA3.adapter("input")(table())
    with pytest.raises(ValueError, match=re.escape("IA3: a LayerNorm is neither linear")):
        IA3.adapter()(NORM)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), layer())
    with pytest.raises(ValueError, match=re.escape("the weight of this Linear is [2, 5, 7]")):
        IA3.adapter()(stacked)
