"""What is trained, how fast, and what decays: masks, labels and rates, in optax."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_transformers import CausalLM, MaskedLM, SequenceClassifier, select, stack, unstack
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery import add_adapter, leaves_by_path
from eqx_transformers.surgery.freeze import decay_mask, labels, layer_rates, partition, scale_by_rates

from ..models.ours import CONFIGS, DECODERS, make, tokens
from .test_patterns import ROOT
from .test_select import equal, model_of

NAMES = ["roberta", "bert", "gpt2", "llama", "t5"]
every = pytest.mark.parametrize("name", NAMES)
layouts = pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])


def params_of(model):
    return eqx.filter(model, eqx.is_inexact_array)


def ones_like(model):
    return jax.tree.map(jnp.ones_like, params_of(model))


def updates_of(optimizer, params):
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[0]


# ---- partition


@every
@layouts
def test_a_model_is_parted_into_what_trains_and_the_rest(name, stacked):
    model = model_of(name, stacked)
    chosen = select("Linear", under="**.attention")
    trainable, frozen = partition(model, chosen)
    inside = [path for path in leaves_by_path(params_of(model)) if re.search(r"\.attention\.\w+_proj\.", path)]
    assert list(leaves_by_path(trainable)) == inside and len(inside) >= 4
    assert equal(eqx.combine(trainable, frozen), model)
    assert leaves_by_path(trainable).keys() | leaves_by_path(frozen).keys() == leaves_by_path(model).keys()


def test_only_what_has_a_gradient_trains():
    tree = {"a": [jnp.ones(2), jnp.arange(3), True, "s"], "b": jnp.ones(1, jnp.bfloat16), "c": np.ones(2)}
    trainable, frozen = partition(tree, select())
    assert list(leaves_by_path(trainable)) == ["a.0", "b", "c"] and list(leaves_by_path(frozen)) == [
        "a.1",
        "a.2",
        "a.3",
    ]
    grown = jax.grad(lambda tree: sum(x.astype("float32").sum() for x in jax.tree.leaves(tree)))(trainable)
    assert jax.tree.structure(grown) == jax.tree.structure(trainable)
    with pytest.raises(ValueError, match=r"there are no floating-point arrays in what it selects, so nothing to train"):
        partition(tree, select(under="a.[1:]"))
    with pytest.raises(ValueError, match="nothing lies at 'd'"):
        partition(tree, select(under="d"))


# ---- labels


@every
@layouts
def test_labels_drive_optax(name, stacked):
    model = model_of(name, stacked)
    selections = {"fast": select("Linear", under="**.mlp"), "slow": select("Linear", under="**.attention")}
    groups = labels(model, selections)
    assert jax.tree.structure(groups) == jax.tree.structure(model)
    params = params_of(model)
    rates: Any = {"fast": optax.sgd(10.0), "slow": optax.sgd(0.5), "frozen": optax.set_to_zero()}
    steps = leaves_by_path(updates_of(optax.multi_transform(rates, lambda _: groups), params))
    expected = lambda path: -10.0 if ".mlp." in path else -0.5 if re.search(r"\.(cross_)?attention\.", path) else 0.0
    known = lambda path: 0.0 if ".cross_attention." in path else expected(path)
    assert {path: float(x.reshape(-1)[0]) for path, x in steps.items()} == {path: known(path) for path in steps}
    assert steps.keys() == leaves_by_path(params).keys()
    assert set(map(type, jax.tree.leaves(groups))) == {str}


def test_a_default_may_be_anything_and_no_leaf_has_two_labels():
    groups = labels(ROOT, {"a": select("Dense"), "b": select("Scale")}, default="rest")
    said = leaves_by_path(groups)
    assert said["parts.0.weight"] == said["parts.2.bias"] == "a"
    assert said["parts.1.weight"] == "b" and said["act"] == "rest"
    assert set(jax.tree.leaves(labels(ROOT, {}))) == {"frozen"}
    message = (
        "labels: parts.0.bias is in the selections of 'a' (select(type='Dense')) and 'c' (select(under='**.bias'))."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        labels(ROOT, {"a": select("Dense"), "b": select("Scale"), "c": select(under="**.bias")})


# ---- rates


@layouts
def test_rates_fall_with_the_distance_from_the_head(stacked):
    model = make(SequenceClassifier, "roberta", stacked, num_layers=3)
    rates = layer_rates(model, decay=0.5)
    assert jax.tree.structure(rates) == jax.tree.structure(model)
    said = leaves_by_path(rates)
    for path in ("tokens.weight", "positions.weight", "norm.bias"):
        assert said[f"backbone.embedding.{path}"] == 0.5**4
    assert said["head.dense.weight"] == said["head.output.bias"] == 1.0
    leaf = "attention.query_proj.weight"
    if stacked:
        one = said[f"backbone.stack.blocks.{leaf}"]
        assert one.shape == (3, 1, 1) and one.dtype == np.float32 and one.ravel().tolist() == [0.125, 0.25, 0.5]
        assert said["backbone.stack.blocks.mlp_norm.bias"].shape == (3, 1)
    else:
        assert [said[f"backbone.stack.blocks.{i}.{leaf}"] for i in range(3)] == [0.125, 0.25, 0.5]


def test_halves_count_each_for_itself():
    said = leaves_by_path(layer_rates(model_of("t5"), decay=0.5))
    assert said["embedding.weight"] == 0.5**4  # before both: one more than the deeper has
    assert [said[f"encoder.stack.blocks.{i}.mlp_norm.weight"] for i in range(2)] == [0.25, 0.5]
    assert [said[f"decoder.stack.blocks.{i}.mlp_norm.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert (said["encoder.bias.weight"], said["decoder.bias.weight"]) == (0.5**3, 0.5**4)
    assert said["encoder.norm.weight"] == said["decoder.norm.weight"] == 1.0


@pytest.mark.parametrize("name", [*CONFIGS, *DECODERS])
def test_every_family_has_embeddings_lowest_and_its_head_at_one(name):
    kind, config = (MaskedLM, CONFIGS[name]) if name in CONFIGS else (CausalLM, DECODERS[name])
    for path, rate in leaves_by_path(layer_rates(skeleton(kind, config), decay=0.5)).items():
        block = re.match(r"backbone\.stack\.blocks\.(\d)", path)
        embedded = path.startswith("backbone.embedding")
        assert rate == (0.5 ** (2 - int(block[1])) if block else 0.125 if embedded else 1.0), path


@every
def test_both_layouts_are_updated_alike_bit_for_bit(name):
    flat = model_of(name)
    optimizer = lambda model: optax.chain(optax.sgd(0.3), scale_by_rates(layer_rates(model, decay=0.7)))
    one = updates_of(optimizer(flat), params_of(flat))
    deep = updates_of(optimizer(stack(flat)), params_of(stack(flat)))
    assert equal(stack(eqx.combine(one, flat)), eqx.combine(deep, stack(flat)))
    steps = {float(x.reshape(-1)[0]) for x in jax.tree.leaves(one)}
    assert len(steps) >= 4 and max(steps) < 0 and min(steps) == np.float32(-0.3)


def test_the_step_is_scaled_and_not_the_gradient():
    model = model_of("roberta")
    params, rates = params_of(model), layer_rates(model, decay=0.5)
    adam = updates_of(optax.adam(0.1), params)
    scaled = leaves_by_path(updates_of(optax.chain(optax.adam(0.1), scale_by_rates(rates)), params))
    for path, step in leaves_by_path(adam).items():
        assert np.allclose(scaled[path], step * leaves_by_path(rates)[path], rtol=1e-6)
    assert np.allclose(scaled["embedding.tokens.weight"], -0.0125, rtol=1e-4)


def test_rates_go_with_frozen_parts_other_dtypes_and_no_decay():
    model = model_of("roberta", stacked=True)
    frozen = select("Embedding")
    groups = labels(model, {"frozen": frozen}, default="trained")
    rates = layer_rates(model, decay=0.5)
    optimizer = optax.multi_transform(
        {"trained": optax.chain(optax.sgd(1.0), scale_by_rates(rates)), "frozen": optax.set_to_zero()},
        lambda _: groups,
    )
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(model))
    steps = leaves_by_path(updates_of(optimizer, half))
    assert {x.dtype for x in steps.values()} == {jnp.dtype(jnp.bfloat16)}
    assert float(jnp.abs(steps["embedding.tokens.weight"]).max()) == 0.0
    assert steps["stack.blocks.mlp.up_proj.bias"][:, 0].tolist() == [-0.25, -0.5]
    assert set(jax.tree.leaves(layer_rates(unstack(model), decay=1.0))) == {1.0}
    few = partition(model, select(under="stack"))[0]
    kept = updates_of(scale_by_rates(rates), few)
    assert jax.tree.structure(kept) == jax.tree.structure(few)
    lower = select(under="pooler").map(rates, lambda part: jax.tree.map(lambda _: 0.5, part))
    assert leaves_by_path(lower)["pooler.dense.bias"] == 0.5


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5])
def test_a_decay_is_a_fraction_and_a_model_has_layers(decay):
    with pytest.raises(ValueError, match=rf"decay = {decay} must be in \(0, 1\]"):
        layer_rates(model_of("roberta"), decay)
    with pytest.raises(ValueError, match=r"There is no nn\.Stack in this Root"):
        layer_rates(ROOT)


# ---- weight decay


@every
@layouts
def test_biases_and_norms_do_not_decay(name, stacked):
    model = model_of(name, stacked)
    mask = decay_mask(model)
    assert jax.tree.structure(mask) == jax.tree.structure(model) and set(map(type, jax.tree.leaves(mask))) == {bool}
    for path, decays in leaves_by_path(mask).items():
        steps = path.split(".")
        is_array = path in leaves_by_path(params_of(model))
        assert decays == (is_array and not ("bias" in steps or any(step.endswith("norm") for step in steps))), path
    tables = {path for path in leaves_by_path(mask) if re.search(r"embedding\.(\w+\.)?weight$", path)}
    tables -= {path for path in tables if "norm" in path}
    without = leaves_by_path(decay_mask(model, ("bias", "norm", "embedding")))
    assert {path for path, x in leaves_by_path(mask).items() if x != without[path]} == tables and tables


def test_what_decays_shrinks_in_adamw_and_the_rest_stays():
    model = model_of("roberta")
    params = params_of(model)
    optimizer = optax.adamw(0.1, weight_decay=0.5, mask=decay_mask(model))
    zeros = jax.tree.map(jnp.zeros_like, params)
    steps = leaves_by_path(optimizer.update(zeros, optimizer.init(params), params)[0])
    for path, x in leaves_by_path(params).items():
        decays = path.endswith("weight") and "norm" not in path
        assert np.allclose(steps[path], -0.05 * x if decays else 0.0, atol=1e-7), path


class OddNorm(eqx.Module):
    gain: jax.Array
    centre: eqx.nn.Linear


class Own(eqx.Module):
    before: OddNorm
    table: eqx.nn.Embedding
    key_bias: jax.Array
    norm: jax.Array
    weight: jax.Array
    steps: jax.Array

    def __init__(self):
        a, b = jax.random.split(jax.random.key(0))
        self.before = OddNorm(jnp.ones(2), eqx.nn.Linear(2, 2, key=a))
        self.table = eqx.nn.Embedding(3, 2, key=b)
        self.key_bias, self.norm, self.weight, self.steps = jnp.ones(2), jnp.ones(2), jnp.ones(2), jnp.arange(2)


def test_classes_and_names_of_others_and_selections_count_too():
    decaying = lambda *exclude: [path for path, x in leaves_by_path(decay_mask(Own(), exclude)).items() if x]
    whole = ["before.gain", "before.centre.weight", "before.centre.bias", "table.weight", "key_bias", "norm", "weight"]
    assert decaying() == whole
    assert decaying("bias") == [path for path in whole if "bias" not in path]
    assert decaying("norm") == ["table.weight", "key_bias", "weight"]
    assert decaying("embedding") == [path for path in whole if "table" not in path]
    assert decaying("bias", "norm", select(under="table")) == ["weight"]
    with pytest.raises(ValueError, match=r"exclude has 'biases', but takes 'bias', 'norm', 'embedding'"):
        decaying("biases")
    with pytest.raises(ValueError, match="nothing lies at 'tables'"):
        decaying(select(under="tables"))
    assert all(jax.tree.leaves(decay_mask([jnp.ones(2)])))  # a word that fits nothing is no error


def test_a_model_learns_with_all_of_it_and_what_is_frozen_stays():
    model, ids = model_of("roberta", stacked=True), jnp.asarray(tokens())
    trainable, frozen = partition(model, select(under="stack"))
    optimizer = optax.chain(optax.adamw(1e-2, mask=decay_mask(trainable)), scale_by_rates(layer_rates(model, 0.5)))

    @eqx.filter_jit
    def step(trainable, state):
        loss = lambda part: jnp.square(eqx.combine(part, frozen)(ids)).mean()
        value, gradient = eqx.filter_value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return value, eqx.apply_updates(trainable, updates), state

    state, values = optimizer.init(trainable), []
    for _ in range(4):
        value, trainable, state = step(trainable, state)
        values.append(float(value))
    assert values[-1] < values[0]
    after = eqx.combine(trainable, frozen)
    assert equal(after.embedding, model.embedding) and not equal(after.stack, model.stack)


def test_adapters_of_linear_layers_are_no_tables_and_decay():
    model = add_adapter(model_of("bert"), select("Linear"), rank=2, key=jax.random.key(0))
    mask = decay_mask(model, ("bias", "norm", "embedding"))
    low = select("LowRank").get(mask)
    assert low and all(one.a is True and one.b is True for one in low)
    tables = add_adapter(model_of("bert"), select("Embedding"), rank=1, key=jax.random.key(0))
    assert not any(one.a for one in select("LowRank").get(decay_mask(tables, ("embedding",))))
