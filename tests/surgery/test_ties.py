"""Arrays that stand at several places are found; two that are merely equal are not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import stack
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery.ties import shared_leaves

from .test_patterns import ROOT
from .test_select import model_of

pytestmark = pytest.mark.usefixtures("strict_promotion")


@pytest.mark.parametrize("name", ["roberta", "bert", "llama", "t5"])
@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_our_models_share_nothing_tied_or_not(name, stacked):
    assert shared_leaves(model_of(name, stacked)) == ()


def test_groups_are_in_the_order_of_the_tree():
    a, b, c = jnp.ones(2), jnp.ones(2), np.ones(2)
    tree = {"x": [b, a, jnp.ones(2)], "y": (a, c, 1.0, "s", None), "z": {"p": c, "q": b, "r": a, "s": 1.0}}
    assert shared_leaves(tree) == (("x.0", "z.q"), ("x.1", "y.0", "z.r"), ("y.1", "z.p"))
    assert shared_leaves(ROOT) == (("parts.0.weight", "parts.2.weight"), ("parts.0.bias", "parts.2.bias"))
    assert shared_leaves(jax.tree.map(lambda x: x, ROOT)) == shared_leaves(ROOT)


def test_an_array_that_is_put_at_two_places_of_a_model_is_found():
    model = model_of("roberta")
    where = lambda m: (m.stack.blocks[0].mlp.up_proj.weight, m.stack.blocks[1].mlp.up_proj.weight)
    shared = eqx.tree_at(where, model, (where(model)[0],) * 2)
    assert shared_leaves(shared) == (("stack.blocks.0.mlp.up_proj.weight", "stack.blocks.1.mlp.up_proj.weight"),)
    assert shared_leaves(stack(shared)) == ()
    assert shared_leaves(jax.tree.map(lambda x: x + 1 if eqx.is_array(x) else x, shared)) == ()


def test_one_place_in_memory_is_one_array():
    x = jnp.arange(6.0)
    again = jax.device_put(x, may_alias=True)
    twin = x.addressable_data(0)
    host = np.arange(6.0)
    views = [host, host[:], host.reshape(2, 3), host[:3], host[::2], host.view(np.int64), host.copy()]
    assert shared_leaves([x, twin, jnp.arange(6.0)]) == (("0", "1"),)
    assert shared_leaves([x, again]) in ((), (("0", "1"),))  # whichever JAX chooses
    assert shared_leaves(views) == (("0", "1"),)


def test_arrays_of_which_nothing_is_known_count_as_objects():
    key, empty, gone = jax.random.key(0), jnp.zeros((0, 3)), jnp.ones(2)
    tree = [key, jax.random.key(0), key, empty, jnp.zeros((0, 3)), empty, gone, gone, jnp.ones(2)]
    gone.delete()
    assert shared_leaves(tree) == (("0", "2"), ("3", "5"), ("6", "7"))
    inside = []
    jax.jit(lambda x, y: inside.append(shared_leaves([x, y, x])))(jnp.ones(1), jnp.ones(1))
    assert inside == [(("0", "2"),)]
    model = model_of("roberta")
    assert shared_leaves(skeleton(type(model), model.config)) == ()
