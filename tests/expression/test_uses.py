"""Weights that are read outside of their own module's call, and the first node at which two models differ."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import CausalLM, MaskedLM
from eqx_transformers.expression import Difference, ExpressionError, Use, compare, direct_uses, trace
from eqx_transformers.nn import Embedding, Linear

from ..models.ours import make, tokens

KEYS = jax.random.split(jax.random.key(0), 2)
IDS = jnp.array([1, 2, 0])
X = jnp.ones((2, 3))


class Tied(eqx.Module):
    """An output that reads the embedding's own weight."""

    embed: Embedding
    dense: Linear

    def __call__(self, ids):
        return self.dense(self.embed(ids)) @ self.embed.weight.T


class Inner(eqx.Module):
    tied: Tied

    def __call__(self, ids):
        scale = jax.lax.cond(True, lambda w: w.sum(), lambda w: w.max(), self.tied.dense.bias)
        more = jax.lax.scan(lambda c, _: (c + self.tied.dense.weight[0, 0], None), scale, None, length=2)[0]
        return self.tied(ids) * more


TIED = Tied(Embedding(5, 3, key=KEYS[0]), Linear(3, 3, key=KEYS[1]))


def test_s14_a_weight_that_is_read_by_attribute_is_told_with_its_place():
    found = direct_uses(trace(TIED)(IDS))
    assert list(found) == ["embed.weight"]
    assert {use.within for use in found["embed.weight"]} == {""}
    assert found["embed.weight"][0] in (Use("transpose", ""), Use("dot_general", ""))
    inner = direct_uses(trace(Inner(TIED))(IDS))
    assert set(inner) == {"tied.embed.weight", "tied.dense.bias", "tied.dense.weight"}
    assert {use.within for use in inner["tied.embed.weight"]} == {"tied"}
    assert {use.within for use in inner["tied.dense.bias"]} == {""}
    as_function = direct_uses(trace(lambda m, ids: m(ids))(TIED, IDS))
    assert as_function.keys() == found.keys()


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
@pytest.mark.parametrize(("head", "family"), [(MaskedLM, "roberta"), (CausalLM, "gpt2"), (CausalLM, "llama")])
def test_our_own_models_read_weights_where_they_are(head, family, stacked):
    """A tied output is a call of the embedding."""
    assert direct_uses(trace(make(head, family, stacked))(tokens())) == {}


# ---- where two models differ


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_the_first_node_that_differs_is_named(stacked):
    model, ids = make(MaskedLM, "roberta", stacked), tokens()
    assert compare(model, model)(ids) is None
    at = (lambda m: m.backbone.stack.blocks) if stacked else (lambda m: m.backbone.stack.blocks[1])
    where = lambda m: at(m).mlp.up_proj.bias
    bent = eqx.tree_at(where, model, replace_fn=lambda b: b.at[(1, 1) if stacked else 1].add(0.5))
    found = compare(model, bent)(ids)
    path = "backbone.stack.blocks.mlp.up_proj" if stacked else "backbone.stack.blocks.1.mlp.up_proj"
    assert isinstance(found, Difference) and found[:2] == (path, "Linear")
    assert found.layer == (1 if stacked else None)
    np.testing.assert_allclose(found.largest, 0.5, rtol=1e-5)
    assert compare(model, bent, atol=10.0, rtol=10.0)(ids) is None
    other = eqx.tree_at(lambda m: at(m).mlp.activation, model, jax.nn.relu)
    found = compare(model, other)(ids)
    assert (found.path, found.tag) == (path.replace("up_proj", "activation"), "gelu") and found.layer in (None, 0)


def test_nan_and_other_shapes_differ_without_end():
    broken = eqx.tree_at(lambda m: m.dense.bias, TIED, jnp.full(3, jnp.nan))
    assert compare(TIED, broken)(IDS)[:3] == ("dense", "Linear", np.inf)
    wide = eqx.tree_at(lambda m: (m.embed, m.dense), TIED, (Embedding(5, 4, key=KEYS[0]), Linear(4, 4, key=KEYS[0])))
    found = compare(TIED, wide)(IDS)
    assert (found.path, found.largest, found.scale) == ("embed", np.inf, np.inf)


def test_models_without_a_path_in_common_cannot_be_compared():
    with pytest.raises(ExpressionError, match="no path in common"):
        compare(TIED, TIED.embed)(IDS)
