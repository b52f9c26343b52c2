"""Operations and bytes of every node, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import CausalLM
from eqx_transformers.expression import Cost, Expression, Node, costs, trace
from eqx_transformers.nn import Linear

from ..models.ours import LENGTH, make, tokens

X = jnp.ones((5, 3))
LINEAR = Linear(3, 7, key=jax.random.key(0))


def cost(f, *args):
    expression = trace(f)(*args)
    return costs(expression)[expression.root]


def test_a_product_is_two_operations_for_each_pair_of_numbers():
    found = cost(lambda a, b: a @ b, X, jnp.ones((3, 7)))
    assert (found.flops, found.bytes, found.bounded) == (2 * 5 * 3 * 7, 4 * (15 + 21 + 35), True)
    batched = cost(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((2, 5, 3)), jnp.ones((2, 3, 7)))
    assert batched.flops == 2 * 2 * 5 * 3 * 7
    image, kernel = jnp.ones((1, 2, 6, 6)), jnp.ones((4, 2, 3, 3))
    conv = cost(lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME"), image, kernel)
    assert conv.flops == 2 * (4 * 36) * (2 * 9)


def test_a_number_is_one_operation_and_what_only_moves_it_none():
    assert cost(lambda x: jnp.exp(x) + 1, X).flops == 30
    assert cost(lambda x: x.sum(), X).flops == 15
    assert cost(lambda x: x.T.reshape(-1)[2:], X).flops == 0


def test_a_module_costs_what_is_inside_of_it():
    expression = trace(lambda m, x: m(m(x) @ jnp.ones((7, 3))))(LINEAR, X)
    found = costs(expression)
    calls = [node for node in expression.nodes() if node.tag == "Linear"]
    one = 2 * 5 * 3 * 7 + 35  # the bias is added
    assert [found[node].flops for node in calls] == [one, one]
    assert found[expression.root].flops == 2 * one + 2 * 5 * 7 * 3
    assert isinstance(expression, Expression) and repr(calls[0]) == "<module Linear>"
    assert all(isinstance(node, Node) and isinstance(cost, Cost) for node, cost in found.items())


def test_a_scan_counts_every_turn_a_cond_its_dearest_branch_and_a_loop_once():
    scanned = cost(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=11)[0], X)
    assert scanned.flops == 11 * 15
    dear, cheap = lambda x: jnp.sin(jnp.cos(x)), jnp.sin
    assert cost(lambda p, x: jax.lax.cond(p, dear, cheap, x), jnp.array(True), X).flops == 30
    assert cost(lambda p, x: jax.lax.cond(p, cheap, dear, x), jnp.array(True), X).flops == 30
    looped = cost(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 3, lambda x: x + 1, x), X)
    assert looped.flops >= 15 and not looped.bounded


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_the_products_of_a_model_cost_what_their_matrices_say(stacked):
    model = make(CausalLM, "gpt2", stacked)
    expression = trace(model)(tokens())
    found = costs(expression)
    linear = sum(found[node].flops for node in expression.nodes() if node.tag == "Linear")
    if stacked:
        linear *= 2
    shapes = [x.weight.shape for x in jax.tree.leaves(model, is_leaf=_is_linear) if _is_linear(x)]
    expected = sum(2 * LENGTH * int(np.prod(shape)) for shape in shapes)
    biases = sum(LENGTH * int(np.prod(shape[:-1])) for shape in shapes)
    assert linear == expected + biases
    root = found[expression.root]
    assert root.flops > linear and root.bytes > 4 * expected / LENGTH / 2


def _is_linear(x):
    return isinstance(x, Linear)
