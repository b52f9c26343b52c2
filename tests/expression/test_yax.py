"""What YAX tests of tracing, dumping and querying, asked of Equinox's modules, of its own kind and of real families.

Its tests are told here in our own words, by the names that they have there. Its queries run as they are written, with
the names of Equinox's classes and fields in place of Flax's: `dialect="yax"`.
"""

import json
import operator
from xml.etree.ElementTree import fromstring

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import T5, CausalLM, MaskedLM
from eqx_transformers.expression import ExpressionError, NoMatch, trace

from ..models.ours import make
from ..models.test_t5 import make as make_t5
from .small import expect_bits

KEY = jax.random.key(42)
TOKENS = jnp.arange(3, 8)
OPERATORS = [operator.add, operator.mul, operator.sub]


class ResBlock(eqx.Module):
    """A linear layer beside the stream; with relu, a function that YAX's README asks for."""

    dense: eqx.nn.Linear
    relu: bool = eqx.field(static=True)

    def __init__(self, features=10, relu=False):
        self.dense = eqx.nn.Linear(features, features, key=KEY)
        self.relu = relu

    def __call__(self, x):
        y = jax.vmap(self.dense)(x)
        return x + (jax.nn.relu(y) if self.relu else y)


BATCH = jax.random.normal(jax.random.key(1), (2, 10))
BLOCK, RELU = trace(ResBlock())(BATCH), trace(ResBlock(relu=True))(BATCH)


def same(a, b):
    """Equal in structure, and to the last bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        expect_bits(x, y)


def evaluates(model, *args, **kwargs):
    """Its expression gives what it gives, also when compiled; the expression."""
    expression = trace(model)(*args, **kwargs)
    direct = model(*args, **kwargs)
    same(expression(model, *args, **kwargs), direct)
    compiled = eqx.filter_jit(lambda *args, **kwargs: expression(model, *args, **kwargs))(*args, **kwargs)
    assert jax.tree.structure(compiled) == jax.tree.structure(direct)
    for x, y in zip(jax.tree.leaves(compiled), jax.tree.leaves(direct), strict=True):
        assert x == y if isinstance(y, str) else np.allclose(x, y, rtol=1e-6, atol=1e-6)
    return expression


# ---- yax_test


@pytest.mark.parametrize("function", OPERATORS)
def test_binary_func(function):
    """An operator is one equation of its primitive, of two arrays, that gives one."""
    node = evaluates(function, jnp.arange(3.0), jnp.ones(3)).query("/*/*", "yax").one()
    assert (node.kind, node.tag, len(node.inputs), len(node.outputs)) == ("equation", function.__name__, 2, 1)


class Binary(eqx.Module):
    function: object = eqx.field(static=True)

    def __call__(self, x, y):
        return self.function(x, y)


@pytest.mark.parametrize("function", OPERATORS)
def test_binary_module(function):
    """A module without weights is one call below a root that is none."""
    expression = evaluates(Binary(function), jnp.arange(4.0), jnp.ones(4))
    root, node = expression.query("//module_call", "yax").nodes
    assert expression.query("//[@ephemeral='true']", "yax").one() is root is expression.root
    assert expression.query("//[@ephemeral='false']", "yax").one() is node
    assert (len(node.inputs), len(node.outputs), node.cls) == (2, 1, Binary)
    assert [child.tag for child in node.children] == [function.__name__]


class Identity(eqx.Module):
    def __call__(self, x):
        return x


def test_identity_module():
    """A module that does nothing is a call nevertheless, inside of another one too."""
    node = evaluates(Identity(), jnp.arange(3.0)).query("//Identity").one()
    assert node.inputs == node.outputs and node.children == ()
    chain = evaluates(eqx.nn.Sequential([eqx.nn.Lambda(jnp.sin), Two(Identity())]), jnp.arange(3.0))
    assert chain.query("//Identity").paths == ("layers.1.inner",) and chain.query("//Identity").count == 2


class Two(eqx.Module):
    inner: eqx.Module

    def __call__(self, x, *, key=None):
        return self.inner(self.inner(x))


class Noise(eqx.Module):
    dropout: eqx.nn.Dropout

    def __call__(self, x, *, key):
        first, second, third = jax.random.split(key, 3)
        return self.dropout(x, key=first), self.dropout(x, key=second), jax.random.normal(third, x.shape)


def test_rng_module():
    """Random streams are played again exactly; another key gives what it gives directly."""
    model, x = Noise(eqx.nn.Dropout(0.5)), jnp.ones((7, 3))
    expression = evaluates(model, x, key=KEY)
    same(expression(model, x, key=jax.random.key(3)), model(x, key=jax.random.key(3)))
    assert expression.query("//Dropout").count == 2


class Normal(eqx.Module):
    dense: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self):
        self.dense = eqx.nn.Linear(4, 3, key=KEY)
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(self.dense(x), state)


def test_stateful_module():
    """What a module keeps goes in and comes out."""
    model, state = eqx.nn.make_with_state(Normal)()
    run = lambda model, x, state: jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    x = jax.random.normal(KEY, (5, 4))
    expression = trace(run)(model, x, state)
    out, after = expression(run, model, x, state)
    wanted, wanted_after = run(model, x, state)
    same(out, wanted)
    same(jax.tree.leaves(after), jax.tree.leaves(wanted_after))
    assert expression.query("//BatchNorm").one().path == "norm"


def test_res_block():
    """One module within another; the tree as data."""
    evaluates(ResBlock(4), jnp.ones((2, 4)))
    node = BLOCK.query("//module_call[@type='Linear']", "yax").one()
    assert (node.path, len(node.inputs), len(node.outputs)) == ("dense", 1, 1)
    told = json.loads(BLOCK.to_json())
    assert told["attributes"] == {"kind": "root"} and len(told["children"]) == 1
    assert told["children"][0]["attributes"]["type"] == "ResBlock"


class Setup(eqx.Module):
    """Its layers are made by one method and called by another."""

    dense: eqx.nn.Linear

    def __init__(self):
        self.dense = self.made()

    def made(self):
        return eqx.nn.Linear(10, 10, key=KEY)

    def __call__(self, x):
        return self.dense(x)


def test_setup_module():
    """Only calls of the forward pass are nodes."""
    expression = evaluates(Setup(), jnp.ones(10))
    assert [node.tag for node in expression.query("//module_call[@entrypoint]", "yax").nodes] == ["Setup", "Linear"]


FAMILIES = {
    "RoBERTa": lambda stacked: (make(MaskedLM, "roberta", stacked), (TOKENS,)),
    "GPT-2": lambda stacked: (make(CausalLM, "gpt2", stacked), (TOKENS,)),
    "T5": lambda stacked: (make_t5(T5, "t5", stacked), (TOKENS, TOKENS[:3])),
}


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models(family, stacked):
    """Whole models evaluate to the same numbers, and are asked by what YAX's example of LoRA asks for."""
    model, args = FAMILIES[family](stacked)
    expression = trace(model)(*args)
    run = eqx.filter_jit(lambda f, *args: f(*args))
    np.testing.assert_allclose(run(lambda *args: expression(model, *args), *args), run(model, *args), atol=1e-6, rtol=0)

    blocks = {"T5": 2 if stacked else 5}.get(family, 1 if stacked else 2)
    attentions = {"T5": 3 if stacked else 8}.get(family, blocks)
    query = '//.[@name="query_proj"] | //.[@name="key_proj"]'
    found = expression.query(query, "yax")
    assert found.count == 2 * attentions and all(node.tag == "Linear" for node in found.nodes)
    assert found.paths == expression.query("//*[@name=('query_proj', 'key_proj')]").paths
    assert expression.query('//module_call[@type="MLP"]', "yax").count == blocks
    assert (
        expression.query('//module_call[@type="MLP"]//module_call[@type="Linear"][@features=21]', "yax").count == blocks
    )
    changed = eqx.tree_at(found.where, model, replace_fn=lambda layer: jax.tree.map(lambda x: 0 * x, layer))
    assert bool(jnp.any(run(changed, *args) != run(model, *args)))


# ---- custom_jvp_test, whose derivatives YAX never tests


class Perceptron(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


@pytest.mark.parametrize("change", [lambda f: f, jax.grad], ids=["relu", "its gradient"])
@pytest.mark.parametrize("at", [1.0, 0.0, -1.0])
def test_relu(change, at):
    expression = evaluates(change(jax.nn.relu), jnp.array(at))
    assert float(jax.grad(lambda x: trace(jax.nn.relu)(x)(jax.nn.relu, x))(jnp.array(0.0))) == 0.0
    assert expression.root.children


def test_model_mlp():
    model = Perceptron(eqx.nn.Linear(3, 2, key=KEY), eqx.nn.Linear(2, 2, key=jax.random.key(1)))
    expression = evaluates(model, jnp.ones(3))
    loss = lambda f: lambda model, x: jnp.square(f(model, x)).sum()
    same(
        eqx.filter_grad(loss(expression))(model, jnp.ones(3)),
        eqx.filter_grad(loss(lambda m, x: m(x)))(model, jnp.ones(3)),
    )
    assert expression.query("//relu").one().kind == "function"


# ---- dynamic_test


def test_pure_inputs():
    expression = evaluates(lambda x: x, jnp.ones((2, 3)))
    assert expression.root.children == ()


def test_pure_consts():
    evaluates(lambda: jnp.ones((3, 2)))
    constant = jnp.arange(6.0).reshape(3, 2)
    assert evaluates(lambda: constant).root.children == ()


def test_pure_mixed():
    constant = jnp.arange(6.0)
    evaluates(lambda x: (x, constant, None, {"text": "as it is", "n": 3}), jnp.ones((2, 3)))


def test_an_operand_that_is_a_literal():
    expression = evaluates(lambda x: jnp.where(x > 0, x, 0.0), jnp.arange(-2.0, 3.0))
    assert expression.query("//gt").one().inputs[1].shape == ()


class LiteralInput(eqx.Module):
    dense: eqx.nn.Linear

    def __call__(self, x):
        return self.dense(jnp.ones_like(x))


class LiteralOutput(eqx.Module):
    dense: eqx.nn.Linear

    def __call__(self, x):
        return self.dense(x), jnp.ones((2, 3))


@pytest.mark.parametrize("kind", [LiteralInput, LiteralOutput])
def test_pure_dense(kind):
    expression = evaluates(kind(eqx.nn.Linear(2, 2, key=KEY)), jnp.arange(2.0))
    assert expression.query('//module_call[@type="Linear"]', "yax").one().inputs[0].shape == (2,)


# ---- static_test


class Drop(eqx.Module):
    dropout: eqx.nn.Dropout

    def __call__(self, x, train: bool = True, *, key):
        return self.dropout(x, inference=not train, key=key)


@pytest.mark.parametrize("options", [{}, {"train": True}, {"train": False}])
def test_static_bool_kwargs(options):
    model, x = Drop(eqx.nn.Dropout(0.5)), jnp.ones((2, 3))
    expression = evaluates(model, x, key=KEY, **options)
    other = {"train": not options.get("train", True)}
    with pytest.raises(ExpressionError, match="trace anew" if options else "another structure"):
        expression(model, x, key=KEY, **other)


def test_numeric_scalars():
    """An array without axes may change its value. A number of Python's is a part of the program, as it is to Equinox:
    another one is no wrong result but an error."""
    scaled = lambda x, scale: x * scale
    x = jnp.ones((2, 3))
    same(trace(scaled)(x, np.float32(2.0))(scaled, x, np.float32(3.0)), scaled(x, np.float32(3.0)))
    with pytest.raises(ExpressionError, match=r"made with 2\.0, but now there is 3\.0"):
        trace(scaled)(x, 2.0)(scaled, x, 3.0)


# ---- dump_test


def test_dump_xml():
    """Below the root one call, in it one call, as in YAX's dump."""
    root = fromstring(BLOCK.to_xml("yax"))
    assert (root.tag, root.get("primitive"), root.get("ephemeral")) == ("module_call", "module_call", "true")
    (outer,) = root.findall("module_call")
    (inner,) = outer.findall("module_call")
    assert (outer.get("type"), outer.get("ephemeral"), outer.get("entrypoint")) == ("ResBlock", "false", "__call__")
    assert (inner.get("type"), inner.get("features"), inner.get("use_bias"), inner.get("name")) == (
        "Linear",
        "10",
        "true",
        "dense",
    )
    assert [x.tag for x in inner] == ["dot_general", "transpose", "broadcast_in_dim", "add"]
    assert inner[0].get("dimension_numbers") == "(((1,), (1,)), ((), ()))"


def test_dump_data():
    """As data; YAX writes YSON."""
    told = json.loads(BLOCK.to_json())
    assert told["tag"] == "expression" and told["children"][0]["children"][0]["attributes"]["out_features"] == 10


# ---- query_test

# A query -> how many nodes, and the tag of the first
QUERIES = {
    "/": (1, "expression"),
    "//": (11, "expression"),
    "//pjit": (1, "relu"),
    '//[@primitive="module_call"]': (3, "expression"),
    '//[@primitive="pjit"][@name="relu"]': (1, "relu"),
    '//[@name="dense"][@features=10]': (1, "Linear"),
    '//[@name="ResBlock"]//[@features=10]': (1, "Linear"),
    './module_call/..//[@type="Linear"][@features=10]': (1, "Linear"),
    "//module_call": (3, "expression"),
    '//[@type="Linear"]': (1, "Linear"),
    "//[@features=10]": (1, "Linear"),
    # what its parser fails at: its own test that is expected to fail, and its README
    '//.[@name="dense"] | //.[@name="ResBlock"]': (2, "ResBlock"),
    "//module_call[@features=10]": (1, "Linear"),
    '//jit[@name="relu"]': (1, "relu"),
    '//module_call[@type="Linear"]': (1, "Linear"),
    # what it gives wrong answers to, does not implement, or never ends with
    "//*": (11, "expression"),
    "//module_call[1]": (3, "expression"),
    "//module_call[last()]": (3, "expression"),
    "//[@features=10]/..": (1, "ResBlock"),
    "//[@type='Linear' and @features > 9]": (1, "Linear"),
    "//[not(@ephemeral)][contains(@in, '2,10')][1]": (4, "dot_general"),
    " //module_call [ @features = 10 ] ": (1, "Linear"),
    "//[@name=' ' or @type='ResBlock']": (1, "ResBlock"),
    "//module_call/ancestor::module_call": (2, "expression"),
    "//custom_jvp_call[@name='relu']": (1, "relu"),
}


@pytest.mark.parametrize("query", QUERIES)
def test_query(query):
    found = RELU.query(query, "yax")
    assert (found.count, found.nodes[0].tag) == QUERIES[query]
    if QUERIES[query][1] == "Linear":
        assert found.paths == ("dense",) and len(found.where(ResBlock())) == 1


@pytest.mark.parametrize("query", ['//[@features=999][@primitive="module_call"]', "//Dense", "//[@nothing=1]"])
def test_query_of_nothing(query):
    """Every predicate counts, not the last alone; a missing attribute is no match; and nothing found is an error."""
    with pytest.raises(NoMatch):
        RELU.query(query, "yax")
    assert RELU.query(query, "yax", allow_empty=True).nodes == ()


def test_query_of_an_inlined_function():
    """What JAX wrote inline is asked for as the call that it was."""
    gelu = lambda dense, x: jax.nn.gelu(dense(x))
    node = trace(gelu)(eqx.nn.Linear(3, 2, key=KEY), jnp.ones(3)).query('//jit[@name="gelu"]', "yax").one()
    assert node.recognised and node.outputs[0].shape == (2,)


# ---- what YAX cannot trace at all

AROUND = {
    "vmap": lambda dense, x: jax.vmap(dense)(x),
    "jit": lambda dense, x: eqx.filter_jit(dense)(x[0]),
    "scan": lambda dense, x: jax.lax.scan(lambda h, _: (dense(h), None), x[0], None, length=3)[0],
    "grad": lambda dense, x: jax.grad(lambda x: dense(x).sum())(x[0]),
    "checkpoint": lambda dense, x: eqx.filter_checkpoint(dense)(x[0]),
}


@pytest.mark.parametrize("around", AROUND)
def test_transformations_within(around):
    found = evaluates(AROUND[around], eqx.nn.Linear(10, 10, key=KEY), BATCH).query("//module_call[@features=10]", "yax")
    assert {node.path for node in found.nodes} == {""}
