"""Scenarios 8 and 11 inside of whole models: derivative rules, and values that several parts read."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import CausalLM, MaskedLM, T5Model, select
from eqx_transformers.expression import capture, rewrite, trace

from ..models import ours
from ..models.test_t5 import make as make_t5, tokens as t5_tokens

NEAR = 1e-6  # of the largest number of all: the same sums in two programs


@functools.cache
def given(name):
    """A model and what it is called with."""
    kind, _, layout = name.partition(" ")
    if kind == "t5":
        return make_t5(T5Model, "t5", layout == "stacked"), tuple(map(jnp.asarray, (t5_tokens(), t5_tokens(1, 4))))
    head = MaskedLM if kind == "roberta" else CausalLM
    return ours.make(head, kind, layout == "stacked"), (jnp.asarray(ours.tokens()),)


NAMES = [f"{kind} {layout}" for kind in ("roberta", "gpt2", "t5") for layout in ("list", "stacked")]
every = pytest.mark.parametrize("name", NAMES)


@jax.custom_vjp
def odd(x):
    """The square, whose slope is said to be 7."""
    return x * x


odd.defvjp(lambda x: (x * x, None), lambda _, g: (7 * g,))


def at_zero(model):
    """What goes into every activation is exactly zero, where rules and difference quotients part."""
    ups = select("Linear", under="**.mlp.up_proj")
    model = eqx.tree_at(ups, model, replace_fn=lambda one: jax.tree.map(jnp.zeros_like, one))
    return model, select(under="**.mlp.activation")


def same(found, wanted):
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    largest = max(float(np.abs(y).max()) for _, y in pairs)
    assert max(float(np.abs(x - y).max()) for x, y in pairs) < NEAR * largest


def slopes(function, model, inputs):
    loss = lambda model: sum(jnp.square(x).sum() for x in jax.tree.leaves(function(model, *inputs)))
    return eqx.filter_jit(eqx.filter_grad(loss))(model)


@every
def test_s08_rules_of_activations_hold_in_a_model_that_is_rewritten_around_them(name):
    """relu'(0) is 0 and an odd rule stays odd, where the first table's rows are doubled."""
    model, inputs = given(name)
    for activation in (jax.nn.relu, odd):
        zero, activations = at_zero(model)
        zero = eqx.tree_at(activations, zero, replace_fn=lambda _, activation=activation: activation)
        found, wanted = (slopes(one, zero, inputs) for one in doubled(zero, inputs))
        same(found, wanted)
        weights = select("Linear", under="**.mlp.up_proj").get(found)
        assert all(bool(jnp.any(x.weight != 0)) == (activation is odd) for x in weights)


def doubled(model, inputs):
    """All calls of the first table rewritten (T5 has one for both halves), and the same edit by hand."""
    first = "//Embedding[@path = (//Embedding)[1]/@path][@method = '__call__']"
    where = trace(model)(*inputs).query(first).where
    rewritten = lambda m, *x: rewrite(m, {first: lambda ids: 2 * where(m)[0](ids)})(*x)
    by_hand = lambda m, *x: eqx.tree_at(where, m, [Doubled(where(m)[0])])(*x)
    return rewritten, by_hand


class Doubled(eqx.Module):
    module: eqx.Module

    def __call__(self, *args, **kwargs):
        return 2 * self.module(*args, **kwargs)

    def attend(self, x):
        return self.module.attend(x)


def with_loss(model, *inputs):
    """The output, and the squares of what the first MLP gave, which the residual stream reads too."""
    output, activations = capture(model, "(//MLP)[1]")(*inputs)
    return output, jnp.square(next(iter(activations.values()))).sum()


@every
def test_s11_a_replaced_value_is_what_the_residual_and_a_loss_read(name):
    model, inputs = given(name)
    new = lambda x, key=None: jnp.sin(x)
    by_hand = eqx.tree_at(select("MLP"), model, replace_fn=lambda _: eqx.nn.Lambda(jnp.sin))
    found = rewrite(with_loss, {"//MLP": new})(model, *inputs)
    output, loss = with_loss_of_lambda(by_hand, *inputs)
    same(found, (output, loss))
    plain = with_loss(model, *inputs)
    assert not np.allclose(found[1], plain[1], rtol=1e-2)


def with_loss_of_lambda(model, *inputs):
    output, activations = capture(model, "(//Lambda)[1]")(*inputs)
    return output, jnp.square(next(iter(activations.values()))).sum()
