"""Queries: what they find, how they fail, and what is done with what they found."""

import contextlib
import functools
import re
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import T5, CausalLM, MaskedLM, select
from eqx_transformers.expression import ExpressionError, Found, NoMatch, QueryError, find, trace
from eqx_transformers.nn import Attention, Linear
from eqx_transformers.surgery.paths import nodes

from ..lazily import Lazily
from ..models.ours import make
from ..models.test_t5 import make as make_t5
from .small import HIDDEN, KEY, MODEL, MODELS, Block, Feed, Small, ids, loss

IDS = ids()
TOKENS = jnp.arange(3, 8)
BLOCKS = range(len(MODEL.blocks))


@functools.cache
def traced():
    return trace(MODEL)(IDS)


@pytest.fixture(scope="module")
def houses():
    """Traces of this package's own models, by name."""
    models = {f"{name}{' stacked' * stacked}": make(head, name, stacked) for head, name, stacked in HOUSES}
    traces = {name: trace(model)(TOKENS) for name, model in models.items()}
    return traces | {"t5": trace(make_t5(T5, "t5"))(TOKENS, TOKENS)}


HOUSES = [
    (MaskedLM, "roberta", False),
    (MaskedLM, "roberta", True),
    (CausalLM, "gpt2", False),
    (CausalLM, "gpt2", True),
]


def tags(nodes):
    return [node.tag for node in nodes]


# ---- what is found

PER_BLOCK = {
    "//Feed": ["feed"],
    "//Block/Feed": ["feed"],
    "//Feed/Linear": ["feed.up", "feed.down"],
    "//Feed//*[@out_features=16]": ["feed.up"],
    "//Block//Linear[@out_features > 8][@in_features < 10.5]": ["feed.up"],
    "//Block//Linear[@use_bias='false']": [f"attention.{x}_proj" for x in ("query", "key", "value", "output")],
    "//*[@use_bias=false()][@name='query_proj']": ["attention.query_proj"],
    '//*[matches(@path, "attention[.](query|value)_proj$")]': ["attention.query_proj", "attention.value_proj"],
    "//*[@name='query_proj'] | //*[@name='down']": ["attention.query_proj", "feed.down"],
    "//MultiheadAttention/*[@kind='module'][last()]": ["attention.output_proj"],
    "//softmax/preceding-sibling::Linear[1]": ["attention.value_proj"],
    "//gelu/parent::*": ["feed"],
    '//Linear[ends-with(@out, "[16]")]': ["feed.up"],
    "//LayerNorm[following-sibling::Feed]": ["attention_norm", "feed_norm"],
    "//*[starts-with(@class, 'equinox.nn')][not(@vmap)][@kind='module']": ["attention", "feed.up", "feed.down"],
}


@pytest.mark.parametrize("xpath", PER_BLOCK)
def test_s04_a_query_finds_in_every_block_what_it_says(xpath):
    found = traced().query(xpath)
    assert found.paths == tuple(f"blocks.{i}.{path}" for i in BLOCKS for path in PER_BLOCK[xpath])
    assert found.count == len(found.nodes) == len(found.paths)


def test_s04_positions_containment_settings_of_functions_and_unions():
    second = traced().query("(//Block)[2]")
    assert second.one().path == "blocks.1"
    gelu = traced().query("(//Block)[2]//gelu").one()
    assert gelu in second.one().walk() and (gelu.tag, gelu.path, gelu.recognised) == ("gelu", None, True)
    assert traced().query("//gelu[@approximate='true']").count == 2
    assert traced().query("//gelu[@approximate=false()]", allow_empty=True).count == 0
    assert tags(traced().query("//softmax | //gelu").nodes) == ["softmax", "gelu"] * 2  # in the order of the call
    assert tags(traced().query("//Feed//*[@kind='equation'][contains(@out, '[5,16]')]").nodes).count("tanh") == 2


def test_s04_an_attribute_that_is_sometimes_a_number_is_compared_as_one():
    assert traced().query("//*[@shape=8]", allow_empty=True).count == 0  # "(8,)" is none
    assert traced().query("//*[@p=0]").paths == tuple(f"blocks.{i}.attention.dropout" for i in BLOCKS)
    assert traced().query("//*[@eps <= 1e-5]").count == 5
    assert traced().query("//*[@name=1]").paths == ("blocks.1",)
    assert traced().query("//*[@name='@path = 3' or @name=1]").paths == ("blocks.1",)  # a text is left as it is


@pytest.mark.parametrize("name", ["roberta", "roberta stacked", "gpt2", "gpt2 stacked", "t5"])
def test_s04_queries_of_models_that_are_used(houses, name):
    expression = houses[name]
    stacked = name.endswith("stacked")
    blocks = {"t5": 5}.get(name, 1 if stacked else 2)
    attentions = {"t5": 8}.get(name, blocks)
    assert expression.query("//Stack").count == {"t5": 2}.get(name, 1)
    assert expression.query("//Attention").count == attentions
    assert expression.query("//attend").paths == tuple(f"{p}.attend" for p in expression.query("//Attention").paths)
    assert expression.query("//Attention/Linear[@name='query_proj' or @name='value_proj']").count == 2 * attentions
    assert expression.query("//MLP/*[@name='activation']").count == blocks
    assert all(node.stack == 2 for node in expression.query("//MLP").nodes) == stacked


def test_s04_a_function_in_a_field_is_one_node_however_it_is_written(houses):
    """relu in a field is a call within a call within a call of that name."""
    relus = houses["t5"].query("//relu")
    assert relus.count == 5 and relus.nodes == find(houses["t5"], jax.nn.relu)
    assert all(path.endswith("mlp.activation") for path in relus.paths)


# ---- find: the same by other means

WAYS = Lazily(
    {
        "xpath": lambda: "//Feed",
        "class": lambda: Feed,
        "selection": lambda: select("Feed"),
        "selection by path": lambda: select(under="blocks.*.feed"),
        "selection resolved": lambda: select(Feed).on(MODEL),
        "selection that reads shapes": lambda: select(
            "Feed", where=lambda _, node: node.up.weight.shape == (HIDDEN, 8)
        ),
        "predicate": lambda: lambda node: node.tag == "Feed",
        "query": lambda: trace(MODEL)(ids(3)).query("//Feed"),  # of another expression: asked anew
        "nodes": lambda: traced().query("//Feed").nodes,
        "sequence": lambda: ["//*[@path='blocks.0.feed']", traced().query("//Feed").nodes[1], Feed],
    }
)


@pytest.mark.parametrize("way", WAYS)
def test_find_means_the_same_nodes_in_every_way(way):
    assert find(traced(), WAYS[way]) == traced().query("//Feed").nodes
    assert find(traced(), WAYS[way])[0].path == "blocks.0.feed"


def test_find_takes_functions_and_superclasses(houses):
    assert find(traced(), jax.nn.gelu) == traced().query("//gelu").nodes
    assert find(traced(), jax.nn.softmax) == traced().query("//softmax").nodes
    assert len(find(traced(), eqx.Module)) == 28
    assert find(traced(), (Block, eqx.nn.LayerNorm)) != find(traced(), (eqx.nn.LayerNorm, Block))
    assert len(find(houses["gpt2"], (Linear, Attention))) == 14


def test_find_never_gives_the_root():
    assert traced().query("/").one() is traced().root
    assert traced().query("//*").nodes[0] is traced().root
    assert len(find(traced(), "//*")) == traced().query("//*").count - 1 == len(list(traced().nodes()))
    assert find(traced(), "/", allow_empty=True) == ()


def test_a_selection_of_layers_that_a_forward_pass_stacks_itself_finds_the_call_that_they_share():
    expression = trace(Itself(MODEL.blocks))(jnp.ones((5, 8)))
    assert expression.query("//Feed").paths == ("blocks.*.feed",)
    assert find(expression, select("Feed")) == find(expression, select(under="blocks.1.feed")) == find(expression, Feed)
    with pytest.raises(NoMatch):
        find(expression, select(under="blocks.1.feed.up.weight"))


class Itself(eqx.Module):
    """Stacks its blocks within the forward pass."""

    blocks: list

    def __call__(self, x):
        return self.run(x)

    def run(self, x):
        arrays, rest = zip(*(eqx.partition(block, eqx.is_array) for block in self.blocks), strict=True)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *arrays)
        return jax.lax.scan(lambda x, layer: (eqx.combine(layer, rest[0])(x), None), x, stacked)[0]


def test_the_skeleton_is_the_model_without_its_numbers():
    shapes = eqx.filter_eval_shape(lambda model: model, MODEL)
    assert eqx.tree_equal(traced().skeleton(), shapes)
    assert type(trace(Itself(MODEL.blocks).run)(jnp.ones((5, 8))).skeleton()) is Itself
    assert type(trace(lambda x, model: model(x))(IDS, MODEL).skeleton()) is Small


# ---- what is wrong with a query

MALFORMED = [
    "//Feed[",
    "//Feed]",
    "",
    "//",
    "//[@a=1]",
    "//Feed[@a=]",
    "foo()",
    "//a:b",
    "'open",
    "//Feed[matches(@path, '[')]",
]
NO_NODES = ["count(//Feed)", "//Feed/@path", "'Feed'", "1 + 1", "true()", "//Feed/string(@path)", "1 div 2"]


@pytest.mark.parametrize("xpath", [*MALFORMED, "1 div 0", "(" * 5000 + "//Feed" + ")" * 5000])
def test_s04_what_is_no_query_is_quoted_with_the_engines_message(xpath):
    with pytest.raises(QueryError, match="This query is not XPath") as error:
        traced().query(xpath)
    assert xpath in str(error.value)
    if xpath in MALFORMED:
        assert re.search(r"line 1, column \d+: \[err:\w+\]", str(error.value))


@pytest.mark.parametrize("xpath", NO_NODES)
def test_s04_what_selects_no_nodes_is_an_error(xpath):
    with pytest.raises(QueryError, match="but a query selects nodes"):
        traced().query(xpath)


@pytest.mark.parametrize("dialect", [None, "yax"])
@pytest.mark.parametrize(
    "xpath", [" ", "// ", "//Feed ", "//Feed[last()]", "//Feed[ last() ]", "//Feed[@path = ' ']", "///", "[["]
)
def test_s04_no_query_hangs(xpath, dialect):
    start = time.perf_counter()
    with contextlib.suppress(QueryError):
        traced().query(xpath, dialect, allow_empty=True)
    assert time.perf_counter() - start < 5


def test_s04_a_dialect_is_one_of_two(unchecked):
    with pytest.raises(QueryError, match=r"None .* or 'yax'; it is 'xpath3'"):
        traced().query("//Feed", "xpath3")


NOTHING = [
    ("//Fed", "nearest tags: Feed"),
    ("//multiheadattention", "nearest tags: MultiheadAttention"),
    ("//*[@name='qery_proj']", "nearest paths: query_proj"),
    ("//*[@path='blocks.0.fed']", r"nearest paths: blocks\.0\.feed"),
    ("//*[@in_feature=8]", "nearest attributes: in_features"),
    ("//Zzzz", "Its modules: Small, Embedding, Block, LayerNorm, MultiheadAttention, Linear, Dropout, Feed"),
    ("//Linear/gelu", "Its modules"),
    (Attention, "^Attention finds none .* nearest tags: MultiheadAttention"),
    (jax.nn.silu, "^silu finds none of the"),
    (lambda node: False, "^<lambda> finds none"),
    (select(under="blocks.0.feed.up.weight"), "finds none"),  # an array is not called
]


@pytest.mark.parametrize("what, message", NOTHING)
def test_s09_nothing_found_names_what_is_near(what, message):
    with pytest.raises(NoMatch, match=message):
        find(traced(), what)
    assert find(traced(), what, allow_empty=True) == ()
    if isinstance(what, str):
        with pytest.raises(NoMatch, match=message):
            traced().query(what)
        assert traced().query(what, allow_empty=True).nodes == ()


def test_s09_one_part_of_several_that_finds_nothing_is_named():
    with pytest.raises(NoMatch, match="'//Fed' finds none"):
        find(traced(), ["//Feed", "//Fed"])
    with pytest.raises(ValueError, match=r"none is a 'Fed'.*Feed"):
        find(traced(), select("Fed"), allow_empty=True)


def test_what_cannot_mean_nodes_says_so():
    with pytest.raises(QueryError, match="this is 3"):
        find(traced(), 3)
    with pytest.raises(QueryError, match="of another expression"):
        find(traced(), trace(MODEL)(IDS).query("(//Feed)[1]").one())
    with pytest.raises(QueryError, match="a predicate gives a bool, not 'Small'"):
        find(traced(), lambda node: node.tag)

    def silu(x):
        return x * jax.nn.sigmoid(x)

    with pytest.raises(QueryError, match=r"No function that is called here has the name silu.*TypeError"):
        find(traced(), silu)


def test_one_says_what_else_there_was():
    with pytest.raises(QueryError, match=r"expected 1 node, found 2: blocks\.0\.feed, blocks\.1\.feed"):
        traced().query("//Feed").one()
    with pytest.raises(QueryError, match=r"found 11: blocks\.0\.attention\.query_proj, .*, …"):
        traced().query("//Linear[@in_features=8]").one()
    assert repr(traced().query("//Feed")) == "<'//Feed': 2 nodes, at blocks.0.feed, blocks.1.feed>"


# ---- query -> tree_at


def wider(feed):
    return Feed(3 * HIDDEN, key=KEY)


def by_hand(model):
    return eqx.tree_at(lambda model: [block.feed for block in model.blocks], model, replace_fn=wider)


def step(model, ids, rate=0.1):
    """(loss, the model after one step, its loss)."""
    before, grads = eqx.filter_value_and_grad(loss)(model, ids)
    model = eqx.apply_updates(model, jax.tree.map(lambda g: -rate * g, grads))
    return before, model, loss(model, ids)


def test_s05_what_a_query_finds_is_replaced_as_by_hand(tmp_path):
    found = traced().query("//Feed")
    model = eqx.tree_at(found.where, MODEL, replace_fn=wider)
    hand = by_hand(MODEL)
    assert jax.tree.structure(model) == jax.tree.structure(hand) and eqx.tree_equal(model, hand)
    modules = lambda tree: [node for _, node in nodes(tree) if isinstance(node, eqx.Module)]
    assert {type(x) for x in modules(model)} == {type(x) for x in modules(MODEL)}  # no class of a trace's
    assert all(vars(x).keys() == vars(y).keys() for x, y in zip(modules(model), modules(hand), strict=True))

    eqx.tree_serialise_leaves(tmp_path / "model", model)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(tmp_path / "model", hand), model)

    before, trained, after = eqx.filter_jit(step)(model, IDS)
    assert float(after) < float(before)
    assert bool(jnp.any(trained.blocks[1].feed.up.weight != model.blocks[1].feed.up.weight))
    # The expression of the new model is another one, and the old expression refuses it.
    assert trace(trained)(IDS).query("//Feed/Linear[@out_features=48]").count == 2
    with pytest.raises(ExpressionError, match=r"Linear of 2 .*48, True\) where there was Linear of 2 .*16, True\)"):
        traced()(trained, IDS)


def test_s05_a_query_of_one_length_is_a_where_for_any_model_of_this_structure():
    where = trace(MODEL)(ids(3)).query("//Linear[@name='up']").where
    other = Small(key=jax.random.key(7))
    doubled = eqx.tree_at(where, other, replace_fn=lambda layer: jax.tree.map(lambda x: 2 * x, layer))
    for block, old in zip(doubled.blocks, other.blocks, strict=True):
        np.testing.assert_array_equal(block.feed.up.weight, 2 * old.feed.up.weight)
        np.testing.assert_array_equal(block.feed.down.weight, old.feed.down.weight)


@pytest.mark.parametrize("name", MODELS)
def test_s05_stacked_blocks_are_one_place(name):
    model = MODELS[name]
    found = trace(model)(IDS).query("//Feed/Linear")
    count = len(found.paths)
    assert count == (4 if name == "list" else 2)
    half = eqx.tree_at(found.where, model, replace_fn=lambda layer: jax.tree.map(lambda x: x / 2, layer))
    layers = model.blocks if name == "list" else [model.blocks]
    halves = half.blocks if name == "list" else [half.blocks]
    for new, old in zip(halves, layers, strict=True):
        np.testing.assert_array_equal(new.feed.up.weight, old.feed.up.weight / 2)
        assert eqx.tree_equal(new.attention, old.attention)


def test_s05_blocks_that_are_stacked_in_the_call_are_all_replaced():
    model = Itself(MODEL.blocks)
    found = trace(model)(jnp.ones((5, 8))).query("//Feed")
    assert len(found.where(model)) == 2
    changed = eqx.tree_at(found.where, model, replace_fn=wider)
    assert [block.feed.up.out_features for block in changed.blocks] == [3 * HIDDEN] * 2
    assert changed(jnp.ones((5, 8))).shape == (5, 8)


def test_s05_a_function_in_a_field_is_a_place(houses):
    model = make(CausalLM, "gpt2")
    found = houses["gpt2"].query("//MLP/*[@name='activation']")
    silu = eqx.tree_at(found.where, model, replace_fn=lambda _: jax.nn.silu)
    assert [block.mlp.activation for block in silu.backbone.stack.blocks] == [jax.nn.silu] * 2
    assert houses["gpt2"].query("//gelu_tanh").paths == found.paths
    assert trace(silu)(TOKENS).query("//silu").paths == found.paths


def test_s05_one_place_that_is_called_again_is_one():
    embed = trace(make(CausalLM, "gpt2"))(TOKENS).query("//*[@path='backbone.embedding.tokens']")
    assert embed.count == 2 and embed.paths == ("backbone.embedding.tokens",)
    assert len(embed.where(make(CausalLM, "gpt2"))) == 1


def test_s05_what_has_no_place_says_what_to_do():
    for xpath, said in {"//gelu": "gelu is a function", "//dot_general": "dot_general is a equation"}.items():
        with pytest.raises(QueryError, match=rf"{said}, not a module: it has no place in the tree; use rewrite\(\)"):
            _ = traced().query(xpath).where


@pytest.mark.parametrize(
    "xpath, outer, inner",
    [
        ("//Block | //Feed", "blocks.0", "blocks.0.feed"),
        ("//Linear | //Feed", "blocks.0.feed", "blocks.0.feed.up"),
        ("//Small | //Feed", "the model itself", "blocks.0.feed"),
    ],
)
def test_s05_overlapping_places_are_both_named(xpath, outer, inner):
    with pytest.raises(QueryError, match=f"^{re.escape(outer)} contains {re.escape(inner)}:"):
        _ = traced().query(xpath).where


def test_s05_nothing_is_replaced_where_nothing_may_be_found():
    found = traced().query("//Fed", allow_empty=True)
    assert found.where(MODEL) == [] and found.paths == () and isinstance(found, Found)
