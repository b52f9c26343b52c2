"""An expression gives what the call gave, to the last bit, under every transformation; and it leaves nothing behind."""

import gc
import threading
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, PRNGKeyArray

from eqx_transformers import CausalLM, MaskedLM, T5Model
from eqx_transformers.expression import ExpressionError, boundary, trace
from eqx_transformers.expression.boundary import Record

from ..full import FULL
from ..lazily import Lazily
from ..models import ours
from ..models.test_t5 import make as make_t5, tokens as t5_tokens
from .small import KEY, MODELS, Block, Feed, expect_bits, gradients, ids, loss, states

# The same program compiled as two: sums in another order. Eager calls are compared to the last bit.
NEAR = {"rtol": 1e-5, "atol": 1e-6}


def calls():
    """Our models: the layouts, one with a tuple of results, and one with two inputs."""
    found = {name: lambda name=name: (MODELS[name], (ids(),)) for name in MODELS}
    for stacked in (False, True):
        layout, make = "stacked" if stacked else "list", lambda *of, stacked=stacked: ours.make(*of, stacked)
        found[f"roberta {layout}"] = lambda make=make: (make(MaskedLM, "roberta"), (ours.tokens(),))
        found[f"gpt2 {layout}"] = lambda make=make: (make(CausalLM, "gpt2"), (ours.tokens(),))
        if stacked or FULL:
            t5 = lambda stacked=stacked: (make_t5(T5Model, "t5", stacked), (t5_tokens(), t5_tokens(1, 4)))
            found[f"t5 {layout}"] = t5
    return found


CALLS = Lazily(calls())
every = pytest.mark.parametrize("name", CALLS)
small = pytest.mark.parametrize("name", MODELS)


def expect_same(found, wanted, **near):
    """The same structure, static leaves and all, and the same numbers: all bits, unless a tolerance is given."""
    (a, tree), (b, other) = jax.tree.flatten(found), jax.tree.flatten(wanted)
    assert tree == other
    for x, y in zip(a, b, strict=True):
        assert type(x) is type(y) or isinstance(x, jax.Array)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        if near and isinstance(x, jax.Array):
            np.testing.assert_allclose(x, y, **near)
        else:
            expect_bits(x, y)


# ---- scenarios 2 and 3: the same numbers


@every
def test_s02_s03_an_expression_gives_the_direct_calls_bits(name):
    model, inputs = CALLS[name]
    expression = trace(model)(*inputs)
    expect_same(expression(model, *inputs), model(*inputs))


@every
def test_s02_s03_it_is_the_same_under_jit_and_its_gradients_too(name):
    model, inputs = CALLS[name]
    expression = trace(model)(*inputs)

    @eqx.filter_jit
    def both(function, model, inputs):
        return eqx.filter_value_and_grad(lambda model: sum(map(_square, jax.tree.leaves(function(model, *inputs)))))(
            model
        )

    found, wanted = both(expression, model, inputs), both(lambda model, *x: model(*x), model, inputs)
    assert len(jax.tree.leaves(found)) == 1 + len(jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(wanted)
    # Some gradients are zero but for what cancels, as that of a bias of keys: all are seen beside the largest.
    largest = max(float(np.abs(x).max()) for x in wanted)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest)


def _square(x):
    return jnp.square(x).sum()


@small
def test_s02_s03_it_is_the_same_under_vmap_and_a_vmap_of_gradients(name):
    model = MODELS[name]
    expression = trace(model)(ids())
    rows = np.stack([ids(seed=i) for i in range(3)])
    expect_same(jax.vmap(lambda x: expression(model, x))(rows), jax.vmap(model)(rows), **NEAR)
    mapped = lambda f: jax.vmap(lambda x: eqx.filter_grad(lambda m: _square(f(m, x)))(model))(rows)
    expect_same(jax.tree.leaves(mapped(expression)), jax.tree.leaves(mapped(lambda m, x: m(x))), **NEAR)


def test_s02_it_is_traced_under_a_transformation_as_well():
    model, x = MODELS["list"].blocks[0].feed, states()
    direct = lambda x: _square(model(x))
    traced = lambda x: _square(trace(model)(x)(model, x))
    ways = {
        "jit": lambda f: jax.jit(f)(x[0]),
        "grad": lambda f: jax.grad(f)(x[0]),
        "jvp": lambda f: jax.jvp(f, (x[0],), (x[1],)),
        "vmap of grad": lambda f: jax.vmap(jax.grad(f))(x),
        "hessian": lambda f: jax.jit(jax.hessian(f))(x[0]),
    }
    for way in ways.values():
        expect_same(way(traced), way(direct), **NEAR)


# ---- what models are made of


class Results(eqx.Module):
    """Every kind of result."""

    weight: Float[Array, " n"]
    name: str = eqx.field(static=True)

    def __call__(self, x, *, scale=2.0, flag=True, extra=None):
        y = self.weight * x * scale if flag else self.weight
        return {"y": y, "pair": (None, y > 0), "n": 3, "name": self.name, "extra": extra, "whole": y.astype(jnp.int32)}


class Noisy(eqx.Module):
    """Dropout under an inner vmap, and what is left of its key."""

    dropout: eqx.nn.Dropout
    feed: Feed

    def __call__(self, x: Float[Array, "seq dim"], key: PRNGKeyArray):
        keys = jax.random.split(key, len(x))
        y = jax.vmap(lambda x, k: self.dropout(self.feed(x), key=k))(x, keys)
        return y, jax.random.split(key)[0]


class Controlled(eqx.Module):
    """A module in every control structure."""

    block: Block
    steps: int = eqx.field(static=True)

    def __call__(self, x):
        x = jax.lax.cond(x.sum() > 0, lambda x: self.block(x), lambda x: x - self.block(x), x)
        x = jax.lax.while_loop(lambda c: c[0] < self.steps, lambda c: (c[0] + 1, self.block(c[1])), (0, x))[1]
        x, ys = jax.lax.scan(lambda x, i: (self.block(x), x.sum() * i), x, jnp.arange(2.0), reverse=True)
        return jax.lax.fori_loop(0, 2, lambda i, x: self.block(x), x), ys


warm = eqx.filter_jit(lambda block, x: block(x))


class Warm(eqx.Module):
    """Two blocks through one jitted function, which may have been traced before."""

    first: Block
    second: Block

    def __call__(self, x):
        return warm(self.second, warm(self.first, x))


@jax.custom_vjp
def odd(x):
    return 2 * x


odd.defvjp(lambda x: (2 * x, None), lambda _, g: (7 * g,))


class Derived(eqx.Module):
    """Derivative rules, and a derivative."""

    feed: Feed

    def __call__(self, x):
        return jax.nn.relu(odd(self.feed(x))) + jax.grad(lambda x: self.feed(x).sum())(x)


class Deep(eqx.Module):
    """vmap in vmap, over examples and over members of an ensemble."""

    members: Feed

    def __call__(self, x):
        one = lambda x: eqx.filter_vmap(lambda member: member(x))(self.members)
        return jax.vmap(jax.vmap(one))(x)


@pytest.mark.parametrize("flag", [True, False])
def test_s02_results_of_every_kind_and_keywords_keep_their_structure(flag):
    model, x = Results(jnp.arange(1.0, 4.0), "weights"), jnp.ones(3)
    given = {"scale": 3.0, "flag": flag, "extra": {"z": x}}
    expression = trace(model)(x, **given)
    expect_same(expression(model, x, **given), model(x, **given))
    assert expression(model, x, **given)["name"] == "weights"


MADE = Lazily(
    {
        "controlled": lambda: (Controlled(Block(key=KEY), 3), (states(),)),
        "warm": lambda: (Warm(Block(key=KEY), Block(24, key=KEY)), (states(),)),
        "derived": lambda: (Derived(Feed(key=KEY)), (states()[0],)),
        "ensemble": lambda: (
            Deep(eqx.filter_vmap(lambda k: Feed(key=k))(jax.random.split(KEY, 3))),
            (states()[None],),
        ),
        "dropout, typed key": lambda: (Noisy(eqx.nn.Dropout(0.5), Feed(key=KEY)), (states(), jax.random.key(3))),
        "dropout, raw key": lambda: (Noisy(eqx.nn.Dropout(0.5), Feed(key=KEY)), (states(), jax.random.PRNGKey(3))),
    }
)


@pytest.mark.parametrize("name", MADE)
def test_s02_control_structures_derivatives_caches_and_keys(name):
    model, inputs = MADE[name]
    model(*inputs)
    expression = trace(model)(*inputs)
    expect_same(expression(model, *inputs), model(*inputs))
    expect_same(eqx.filter_jit(expression)(model, *inputs), eqx.filter_jit(model)(*inputs), **NEAR)
    if name != "controlled":  # a while_loop has no reverse derivative
        grads = lambda f: eqx.filter_grad(lambda m: _square(jax.tree.leaves(f(m, *inputs))[0]))(model)
        expect_same(jax.tree.leaves(grads(expression)), jax.tree.leaves(grads(lambda m, *x: m(*x))), **NEAR)


@pytest.mark.parametrize("name", ["list", "stacked"])
def test_s02_bfloat16_is_the_same_to_the_last_bit(name):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, MODELS[name].blocks)
    block = half[0] if name == "list" else jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, half)
    x = states().astype(jnp.bfloat16)
    out = trace(block)(x)(block, x)
    assert out.dtype == jnp.bfloat16
    expect_same(out, block(x))


def test_s02_roberta_with_dropout_draws_the_same_bits():
    model = ours.make(MaskedLM, "roberta", True)
    expect_same(trace(model)(ours.tokens(), key=KEY)(model, ours.tokens(), key=KEY), model(ours.tokens(), key=KEY))
    assert np.abs(model(ours.tokens(), key=KEY) - model(ours.tokens())).max() > 1e-3


def test_s02_other_weights_of_the_same_shapes_are_no_other_model():
    model = MODELS["list"]
    other = jax.tree.map(lambda x: 2 * x if eqx.is_array(x) else x, model)
    expect_same(trace(model)(ids())(other, ids(seed=1)), other(ids(seed=1)))


# ---- scenario 2: wrong calls


def test_s02_wrong_arguments_are_refused_with_what_was_traced_and_what_was_given():
    model = MODELS["list"]
    expression = trace(model)(ids())
    with pytest.raises(ExpressionError, match=r"i32\[5\].*i32\[6\].*trace anew"):
        expression(model, ids(6))
    with pytest.raises(ExpressionError, match=r"i32\[5\].*f32\[5\]"):
        expression(model, jnp.ones(5))
    with pytest.raises(ExpressionError, match="another structure"):
        expression(model, ids(), ids())
    with pytest.raises(ExpressionError, match="another structure"):
        expression(MODELS["stacked"], ids())
    held = Results(jnp.ones(3), "a")
    with pytest.raises(ExpressionError, match=r"True.*False"):
        trace(held)(jnp.ones(3), flag=True)(held, jnp.ones(3), flag=False)


# ---- scenario 8: derivative rules


def test_s08_derivative_rules_hold_in_the_evaluation():
    x = jnp.array([0.0, -1.0, 2.0])
    for function, wanted in ((jax.nn.relu, [0, 0, 1]), (odd, [7, 7, 7]), (jax.nn.relu6, [0, 0, 1])):
        expression = trace(function)(x)
        assert jax.grad(lambda x, e=expression, f=function: e(f, x).sum())(x).tolist() == wanted


# ---- scenario 12: calls that share


class Thrice(eqx.Module):
    block: Block

    def __call__(self, x):
        return self.block(self.block(self.block(x)))


def test_s12_a_block_that_is_called_three_times_is_three_nodes_with_one_path():
    model = Thrice(Block(key=KEY))
    expression = trace(model)(states())
    assert [n.path for n in expression.nodes() if n.tag == "Block"] == ["block"] * 3
    expect_same(expression(model, states()), model(states()))


# ---- scenario 15: hygiene


def records():
    gc.collect()
    return sum(type(x) is Record for x in gc.get_objects())


@pytest.mark.parametrize("name", ["list", "remat", "warm"])
def test_s15_what_was_recorded_dies_with_the_expression(name):
    model, x = (MODELS[name], ids()) if name in MODELS else (MADE[name][0], states())
    made = [trace(model)(x) for _ in range(20 if FULL else 4)]
    made[-1](model, x)
    held = [weakref.ref(record) for expression in made for record in expression.records.values()]
    recorders = len(boundary._recorders)
    assert all(ref() is not None for ref in held) and len(held) >= 2 * len(made)
    del made
    gc.collect()
    assert not any(ref() is not None for ref in held)
    assert len(boundary._recorders) <= recorders


def test_s15_a_trace_that_fails_leaves_nothing():
    class Broken(eqx.Module):
        feed: Feed

        def __call__(self, x):
            self.feed(x)
            raise RuntimeError("broken")

    before = records()
    with pytest.raises(RuntimeError, match="broken"):
        trace(Broken(Feed(key=KEY)))(states()[0])
    assert records() == before


def test_s15_no_class_function_or_thread_changes():
    watched = lambda: (Block.__call__, Feed.__call__, eqx.nn.Linear.__call__, jax.nn.gelu, jax.nn.gelu.__code__)
    state = lambda: (threading.active_count(), jax.config.jax_disable_jit, threading.gettrace(), dict(vars(Block)))
    before, then = watched(), state()
    model = MODELS["list"]
    leaves, tree = jax.tree.flatten(model)
    trace(model)(ids())(model, ids())
    assert watched() == before and state() == then
    assert jax.tree.structure(model) == tree and all(
        a is b for a, b in zip(leaves, jax.tree.leaves(model), strict=True)
    )
    assert type(model.blocks[0]) is Block


def test_s15_a_warm_jit_within_the_model_hides_no_node():
    model, (x,) = MADE["warm"]
    wanted = [(n.tag, n.path) for n in trace(model)(x).nodes()]
    assert ("Feed", "first.feed") in wanted and ("Feed", "second.feed") in wanted
    for _ in range(2):
        model(x)
        assert [(n.tag, n.path) for n in trace(model)(x).nodes()] == wanted


def test_s15_threads_that_trace_at_once_do_not_interfere():
    models = [MODELS["list"], MODELS["stacked"], MADE["warm"][0]]
    inputs = [ids(), ids(), states()]
    wanted = [[(n.tag, n.path) for n in trace(m)(x).nodes()] for m, x in zip(models, inputs, strict=True)]
    found: dict[int, list] = {}
    start = threading.Barrier(len(models))

    def work(i):
        start.wait()
        found[i] = []
        for _ in range(3):
            expression = trace(models[i])(inputs[i])
            same = np.array_equal(expression(models[i], inputs[i]), models[i](inputs[i]))
            found[i].append(([(n.tag, n.path) for n in expression.nodes()], same))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(found[i] == [(wanted[i], True)] * 3 for i in range(len(models)))


def test_s15_a_trace_inside_of_disabled_jit_has_all_its_nodes():
    with jax.disable_jit():
        inside = [n.path for n in trace(MODELS["list"])(ids()).nodes() if n.kind == "module"]
    assert inside == [n.path for n in trace(MODELS["list"])(ids()).nodes() if n.kind == "module"]


def test_losses_and_gradients_of_the_small_models_agree():
    """The small models are one model in three layouts."""
    found = [loss(model, ids()) for model in MODELS.values()]
    np.testing.assert_allclose(found, found[0], **NEAR)
    (a, b) = (gradients(MODELS[name], ids()) for name in ("stacked", "remat"))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, **NEAR)
