"""Replacements with keys of their own, layers of stacked blocks, masks, skeletons; and the page of examples."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_transformers import Encoder, nn, select, stack, unstack
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery import leaves_by_path

from ..examples import run_examples
from .test_patterns import ROOT
from .test_select import FOUND, QUERIES_AND_VALUES, equal, every, model_of

pytestmark = pytest.mark.usefixtures("strict_promotion")
KEY = jax.random.key(7)


class Adapter(eqx.Module):
    """What LoRA needs of a selection: something new beside a layer, with numbers of its own."""

    base: eqx.Module
    down: jax.Array

    def __init__(self, base, *, key):
        self.base = base
        self.down = jax.random.normal(key, (2, base.weight.shape[-1]))


# ---- replacements, each with a key of its own


@every
@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_adapters_differ_from_node_to_node_and_layer_to_layer(name, stacked):
    model = model_of(name, stacked)
    where = select(type="Linear", under=QUERIES_AND_VALUES).on(model)
    adapted = eqx.tree_at(where, model, where.each(model, Adapter, key=KEY))
    adapters = [adapter.down for adapter in select(Adapter).get(unstack(adapted))]
    assert len(adapters) == len(FOUND[name])
    for i, one in enumerate(adapters):
        assert one.shape[0] == 2 and one.ndim == 2
        assert all(one.shape != other.shape or np.abs(one - other).max() > 0.1 for other in adapters[:i])


@every
def test_stacked_blocks_get_what_the_tuple_gets(name):
    flat, deep = model_of(name), model_of(name, stacked=True)
    chosen = select(type="Linear", under=QUERIES_AND_VALUES)
    adapt = lambda model: eqx.tree_at(chosen, model, chosen.each(model, Adapter, key=KEY))
    assert equal(stack(adapt(flat)), adapt(deep))
    tripled = lambda model: chosen.map(model, lambda x: jax.tree.map(lambda y: 3 * y, x))
    assert equal(stack(tripled(flat)), tripled(deep)) and not equal(tripled(deep), deep)
    other = nn.Linear(2, 5, key=KEY)
    assert equal(stack(chosen.set(flat, other)), chosen.set(deep, other))
    rates = select("Dropout", under="**.blocks")
    calm = lambda model: rates.set(model, eqx.nn.Dropout(0.25))
    assert equal(stack(calm(flat)), calm(deep)) and rates.get(calm(deep))[0].p == 0.25


def test_stacked_blocks_are_shown_layer_by_layer():
    model, shapes = model_of("roberta", stacked=True), []

    def look(node):
        shapes.append(node.weight.shape)
        return node

    select("Linear", under="**.attention.query_proj").map(model, look)
    select("Linear", under="pooler").map(model, look)
    assert shapes == [(21, 21), (21, 21)]
    assert model.stack.blocks.attention.query_proj.weight.shape == (2, 21, 21)
    block = select(type="EncoderBlock")
    assert block.count(model) == 1 and block.count(unstack(model)) == 2
    scaled = lambda model: block.map(
        model, lambda b: eqx.tree_at(lambda b: b.mlp_norm.bias, b, replace_fn=jnp.ones_like)
    )
    assert equal(scaled(model), stack(scaled(unstack(model))))


def test_arrays_of_numpy_are_layers_too():
    on_host = lambda tree: jax.tree.map(lambda x: np.asarray(x) if eqx.is_array(x) else x, tree)
    deep = on_host(model_of("roberta", stacked=True))
    chosen = select(under="stack.**.mlp.up_proj.bias")
    assert chosen.map(deep, lambda x: 2 * x).stack.blocks.mlp.up_proj.bias.shape == (2, 37)
    assert chosen.map(deep, lambda x: np.zeros(5)).stack.blocks.mlp.up_proj.bias.shape == (2, 5)


def test_a_key_is_folded_from_the_path_alone():
    model = model_of("gpt2")
    draw = lambda node, key: jax.random.uniform(key)
    few = select("Linear", under="**.value_proj")
    drawn = lambda chosen: dict(zip(chosen.paths(model), map(float, chosen.each(model, draw, key=KEY)), strict=True))
    all_, some = drawn(select("Linear")), drawn(few)
    assert some.items() < all_.items() and len(set(all_.values())) == len(all_)
    assert drawn(few.on(model)) == some == drawn(select("Linear") & few)
    changed = few.each(model, draw, key=jax.random.key(8))
    assert not set(map(float, changed)) & set(some.values())
    old_style = few.each(model, draw, key=jax.random.PRNGKey(7))
    assert list(map(float, old_style)) == list(some.values())


def test_without_a_key_make_gets_none():
    assert select("Dense").each(ROOT, lambda node: node.heads) == [2, 2, 5]


ONE_LAYER = [
    "**.blocks.1.attention",
    "**.blocks.[0:1]",
    "**.blocks.{0,1}.mlp.*",
    "**.[-1]",
    "**.1*.mlp",
    "**.blocks.[:]",
]


@pytest.mark.parametrize("pattern", ONE_LAYER)
def test_layers_that_are_stacked_cannot_be_singled_out(pattern):
    step = next(step for step in pattern.split(".") if set(step) & set("01["))
    chosen, model = select("Linear", under=pattern), model_of("roberta", stacked=True)
    said = f"{chosen}: {step!r} asks for layers by their index, but the blocks at stack.blocks are stacked"
    for use in (chosen.paths, chosen.mask, chosen, lambda model: chosen.set(model, 1)):
        with pytest.raises(ValueError, match=re.escape(said) + r".*unstack\(model\)"):
            use(model)
    if pattern != "**.1*.mlp":
        assert chosen.count(unstack(model)) > 0
    with pytest.raises(ValueError, match=r"asks for layers by their index, but the blocks at encoder\.stack\.blocks"):
        chosen.paths(model_of("t5", stacked=True))


def test_any_layer_of_stacked_blocks_has_no_step():
    with pytest.raises(ValueError, match=r"Blocks are stacked, their paths without an index, at stack\.blocks\."):
        select(under="stack.blocks.*.attention.query_proj").paths(model_of("roberta", stacked=True))


# ---- masks


def test_a_mask_is_true_for_the_arrays_at_or_below_a_node():
    mask = (select("Dense") | select(under="table.pair") | select(under="table.pair.0") | select(under="act")).mask(
        ROOT
    )
    true = [path for path, x in leaves_by_path(mask).items() if x]
    assert true == [
        "parts.0.weight",
        "parts.0.bias",
        "parts.2.weight",
        "parts.2.bias",
        "table.pair.0",
        "table.pair.1.weight",
        "table.query_proj.weight",
    ]
    assert jax.tree.structure(mask) == jax.tree.structure(ROOT)
    assert {type(x) for x in jax.tree.leaves(mask)} == {bool}


@every
def test_a_mask_parts_a_model(name):
    model = model_of(name)
    chosen = select(type="Linear", under=QUERIES_AND_VALUES)
    trained, rest = eqx.partition(model, chosen.mask(model))
    assert sorted({path.rsplit(".", 1)[0] for path in leaves_by_path(trained)}) == sorted(FOUND[name])
    assert equal(eqx.combine(trained, rest), model)


def test_optax_masks_with_a_selection():
    model = model_of("roberta")
    params = eqx.filter(model, eqx.is_array)
    chosen = select(type="LayerNorm") | select(under="pooler.dense.bias")
    freeze = lambda params: jax.tree.map(lambda x: not x, chosen.mask(params))
    optimizer = optax.chain(optax.sgd(1.0), optax.masked(optax.set_to_zero(), freeze))
    with jax.numpy_dtype_promotion("standard"):
        gradient = jax.tree.map(jnp.ones_like, params)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    moved = [path for path, x in leaves_by_path(updates).items() if x.any()]
    assert moved == [p for p in leaves_by_path(params) if "norm." in p or p == "pooler.dense.bias"] and len(moved) == 11
    whole = leaves_by_path(chosen.mask(model))
    assert leaves_by_path(chosen.mask(params)) == {path: whole[path] for path in leaves_by_path(params)}


# ---- skeletons


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_a_skeleton_is_selected_in_and_changed_as_its_model(stacked):
    model = model_of("roberta", stacked)
    built = skeleton(Encoder, model.config, stacked)
    chosen = select(type="Linear", under=QUERIES_AND_VALUES)
    adapt = lambda tree: eqx.tree_at(chosen, tree, chosen.each(tree, Adapter, key=KEY))
    assert chosen.paths(built) == chosen.paths(model)
    shapes = eqx.filter_eval_shape(adapt, model)
    assert equal(adapt(built), shapes) and equal(chosen.mask(built), chosen.mask(model))
    assert select(Adapter).get(shapes)[0].down.shape == ((2, 2, 21) if stacked else (2, 21))
    large = select(where=lambda path, node: getattr(node, "shape", None) == ((2, 37) if stacked else (37,)))
    assert large.paths(built) == large.paths(model)
    assert all(path.endswith("mlp.up_proj.bias") for path in large.paths(built))


# ---- the page


def test_the_examples_of_surgery_run_in_order():
    _, names = run_examples("docs/surgery.md")
    assert names["where"].count(names["model"]) == 4
    assert names["where"].paths(names["adapted"]) == FOUND["bert"]
    assert names["shorter"].backbone.stack.num_layers == 1 and names["whole"].config.num_layers == 3


def test_the_examples_of_adapters_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        _, names = run_examples("docs/adapters.md")
    assert names["value"] < jnp.log(2) * 2 and select("LoRA").count(names["qlora"]) == 8
