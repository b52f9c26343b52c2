"""Adapters of a whole model: added by path, weighed, masked, labelled, merged and taken apart again; messages."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_transformers import CausalLM, MaskedLM, nn, select, stack
from eqx_transformers.surgery import leaves_by_path, nodes, spell
from eqx_transformers.surgery.adapter_masks import adapter_labels, adapter_mask
from eqx_transformers.surgery.adapters import add_adapter, set_adapters
from eqx_transformers.surgery.ia3 import IA3
from eqx_transformers.surgery.lora import LoRA
from eqx_transformers.surgery.merging import Merged, merge, unmerge

from ..models.ours import make
from .adapted import FUSED, IDS, KEY, LINEAR, TABLE, adapted, added, coded, run, small, trained
from .test_lora import bits, close, every_case, layouts
from .test_select import equal

# ---- added


@layouts
def test_adding_is_tree_at_of_a_selection(stacked):
    model = small(stacked)
    where = (LINEAR | TABLE).on(model)
    make_lora = LoRA.adapter(3, 5.0, dora=True, dropout=0.1)
    by_hand = eqx.tree_at(where, model, where.each(model, make_lora, key=KEY))
    assert equal(add_adapter(model, LINEAR | TABLE, rank=3, alpha=5.0, dora=True, dropout=0.1, key=KEY), by_hand)


def test_the_first_pattern_that_matches_says_rank_and_alpha():
    patterns = {"rank_pattern": {"**.0.fused": 4, "**.blocks": 1}, "alpha_pattern": {"**.{fused,other}": 7.0}}
    model = added(LINEAR | TABLE, rank=2, alpha=3.0, **patterns)(small())
    block, other, table = model.stack.blocks[0], model.stack.blocks[1], model.embedding
    assert [node.adapters[0].rank for node in (block.fused, block.output, other.fused, table)] == [4, 1, 1, 2]
    scales = [float(node.adapters[0].scale) for node in (block.fused, block.output, other.fused, table)]
    assert scales == [7 / 4, 3.0, 7.0, 1.5]
    assert equal(add_adapter(small(), FUSED, rank=2, key=KEY), add_adapter(small(), FUSED, rank=2, alpha=2, key=KEY))
    deep = added(LINEAR, rank=2, alpha=3.0, rank_pattern={"stack.blocks.output": 1})(small(stacked=True))
    flat = added(LINEAR, rank=2, alpha=3.0, rank_pattern={"**.output": 1})(small())
    assert equal(stack(flat), deep)


def test_a_second_name_extends_the_layer_whichever_way_it_is_selected():
    first = added(FUSED)(small())
    ways = [select(LoRA), FUSED, LINEAR & select(under="**.base"), select(LoRA) | select("Linear", under="**.fused")]
    for way in ways:
        second = add_adapter(first, way, rank=2, name="other", key=KEY)
        node = second.stack.blocks[0].fused
        assert node.names == ("default", "other") and type(node.base) is nn.Linear
        assert equal(second, add_adapter(first, ways[0], rank=2, name="other", key=KEY))
    assert not np.array_equal(node.adapters[1].a[:2], node.adapters[0].a[:2])  # the same key, another name


def test_a_whole_model_with_a_tied_output():
    model = make(MaskedLM, "bert", True)
    chosen = select("Linear", under="**.attention.{query,value}_proj") | select(under="**.tokens")
    after = added(chosen, dora=True, dropout=0.2)(model)
    moved = trained(after)
    assert close(run(after, IDS), run(model, IDS), 1e-5)
    assert bits(unmerge(merge(moved, keep=True)), moved)
    assert close(run(merge(moved), IDS), run(moved, IDS), 1e-5)


# ---- weights


@layouts
def test_switching_is_other_numbers_of_the_same_program(stacked):
    model, traces = trained(adapted("two", stacked)), []

    @eqx.filter_jit
    def call(model, ids):
        traces.append(1)
        return model(ids)

    default, other, none = (set_adapters(model, which) for which in ("default", "other", ()))
    outputs = [np.asarray(call(m, IDS)) for m in (model, default, other, none)]
    half = set_adapters(model, {"other": 0.5, "default": 1.0})
    call(half, IDS)
    assert len(traces) == 1
    assert np.array_equal(outputs[3], run(small(stacked), IDS))
    assert all(not close(outputs[i], outputs[j], 1e-3) for i in range(4) for j in range(i))
    assert equal(set_adapters(half, ("other", "default")), model)
    weights = half.stack.blocks.fused.weights if stacked else half.stack.blocks[0].fused.weights
    assert np.array_equal(weights[0] if stacked else weights, [1.0, 0.5])
    assert float(np.abs(call(default, IDS) - run(merge(default), IDS)).max()) < 1e-4


def test_another_scale_is_the_same_program_too():
    model, traces = adapted("linear"), []

    @eqx.filter_jit
    def call(model, ids):
        traces.append(1)
        return model(ids)

    for alpha in (5.0, 8.0):
        call(added(LINEAR, alpha=alpha)(small()), IDS)
    call(model, IDS)
    assert len(traces) == 1


def test_weights_stay_where_they_are_placed():
    placed = jax.device_put(adapted("two").embedding, jax.devices()[0])
    assert placed.weights.committed and set_adapters(placed, "other").weights.committed
    assert not set_adapters(adapted("two").embedding, "other").weights.committed


# ---- what trains


def learned_by_hand(model):
    tails = (".a", ".b", ".b_bias", ".magnitude")
    factors = {f"{spell(path)}.scale" for path, node in nodes(model) if isinstance(node, IA3)}
    return factors | {path for path in leaves_by_path(model) if ".adapters." in path and path.endswith(tails)}


@every_case
@layouts
def test_gradients_reach_what_the_mask_says_and_nothing_else(case, stacked):
    model = trained(adapted(case, stacked))
    mask = leaves_by_path(adapter_mask(model))
    assert {path for path, keep in mask.items() if keep} == learned_by_hand(model)
    assert list(mask) == list(leaves_by_path(model))
    learned, rest = eqx.partition(model, adapter_mask(model))
    gradient = eqx.filter_jit(jax.grad(lambda learned: (eqx.combine(learned, rest)(IDS) ** 2).sum()))(learned)
    reached = {path for path, g in leaves_by_path(gradient).items() if np.abs(g).max() > 0}
    assert reached == learned_by_hand(model)


def test_biases_and_what_else_trains():
    untied = eqx.tree_at(lambda m: m.head, small(), nn.Linear(7, 11, key=KEY), is_leaf=lambda x: x is None)
    model = added(FUSED, rank=1)(untied)
    kept = lambda **options: {p for p, keep in leaves_by_path(adapter_mask(model, **options)).items() if keep}
    own = learned_by_hand(model)
    of_layers = {f"stack.blocks.{i}.fused.base.bias" for i in (0, 1)}
    assert kept() == kept(bias="none") == own and len(own) == 4
    assert kept(bias="adapters") == own | of_layers
    assert kept(bias="all") == own | of_layers | {"head.bias"}
    assert kept(also=select(under="head")) == own | {"head.weight", "head.bias"}


def test_one_name_alone_trains():
    model = adapted("two")
    mask = leaves_by_path(adapter_mask(model, name="other"))
    assert {path for path, keep in mask.items() if keep} == {p for p in learned_by_hand(model) if ".adapters.1." in p}
    labels = leaves_by_path(adapter_labels(model, name="default"))
    assert {path.split(".adapters.")[1][0] for path, label in labels.items() if label != "frozen"} == {"0"}


@layouts
def test_labels_let_b_learn_faster(stacked):
    model = trained(added(LINEAR, dora=True)(small(stacked)))
    labels = adapter_labels(model)
    params = eqx.filter(model, adapter_mask(model))
    rates = {"a": 0.01, "b": 0.16, "other": 0.02}
    parts = {label: optax.sgd(rate) for label, rate in rates.items()} | {"frozen": optax.set_to_zero()}
    optimizer = optax.multi_transform(parts, adapter_labels)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    field = {"a": "a", "b": "b", "magnitude": "other"}
    for path, update in leaves_by_path(updates).items():
        assert np.allclose(update, -rates[field[path.split(".")[-1]]])
    assert {leaves_by_path(labels)[path] for path in leaves_by_path(params)} == set(rates)
    assert set(jax.tree.leaves(adapter_labels(adapted("ia3")))) == {"other", "frozen"}


def test_training_moves_the_adapters_alone_and_lowers_the_loss():
    model, wanted = added(LINEAR | TABLE)(small(stacked=True)), jnp.array([10, 0, 3, 7, 1])
    params, rest = eqx.partition(model, adapter_mask(model))
    loss = lambda params: (
        -jnp.take_along_axis(jax.nn.log_softmax(eqx.combine(params, rest)(IDS)), wanted[:, None], axis=1).mean()
    )
    optimizer = optax.adam(0.03)
    step = jax.jit(lambda params, state: optimizer.update(jax.grad(loss)(params), state))
    state, first = optimizer.init(params), loss(params)
    for _ in range(20):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.5 * first
    assert equal(eqx.combine(params, rest).stack.blocks.fused.base, small(stacked=True).stack.blocks.fused)


# ---- merged


def test_a_thousand_times_there_and_back_is_the_very_model():
    model = trained(added(FUSED, dora=True)(small(stacked=True, dtype=jnp.bfloat16)))
    again = model
    for _ in range(1000):
        again = unmerge_quickly(merge_quickly(again))
    assert bits(again, model)


merge_quickly = eqx.filter_jit(lambda model: merge(model, keep=True))
unmerge_quickly = eqx.filter_jit(unmerge)


@every_case
@layouts
def test_what_is_kept_computes_the_same_and_comes_back(case, stacked):
    model = trained(adapted(case, stacked))
    kept = merge(model, keep=True)
    assert select(Merged).count(kept) == select((LoRA, IA3)).count(model)
    assert np.array_equal(run(kept, IDS), run(merge(model), IDS))
    assert bits(unmerge(kept), model) and bits(merge(kept), merge(model)) and bits(merge(kept, keep=True), kept)


def test_a_merged_layer_has_the_sizes_and_numbers_of_a_plain_one():
    model = merge(trained(added(FUSED | TABLE)(small())), keep=True)
    layer, table = model.stack.blocks[0].fused, model.embedding
    assert (layer.in_features, layer.out_features, table.vocab_size, table.embed_dim) == (7, 15, 11, 7)
    assert all(equal(node.dense(), node.base.weight) for node in (layer, table))
    assert equal(layer.bias, layer.base.bias) and table.bias is None
    x = jnp.ones((2, 7))
    assert equal(layer(x, key=KEY), layer.base(x)) and equal(table.attend(x), table.base.attend(x))


def test_an_adapter_around_another_is_merged_from_within():
    inside = added(FUSED, init="random", dora=True)(small())
    where = select(LoRA).on(inside)
    around = eqx.tree_at(where, inside, where.each(inside, IA3.adapter()))
    for model in (around, eqx.tree_at(where, around, [outer(node) for node in select(IA3).get(around)])):
        model = trained(model)
        assert close(run(merge(model), IDS), run(model, IDS), 1e-6)
        assert type(merge(model).stack.blocks[0].fused) is nn.Linear


def outer(node):
    return LoRA.adapter(2, init="random", dora=True)(node, key=KEY)


# ---- messages


@pytest.mark.parametrize("kind", [MaskedLM, CausalLM])
def test_the_other_end_of_a_tie_names_the_owner(kind):
    model = make(kind, {MaskedLM: "bert", CausalLM: "gpt2"}[kind], False)
    end = "head.decoder"
    with pytest.raises(ValueError) as caught:
        added(select("Linear", under=end))(model)
    said = str(caught.value)
    assert f"{end} is None in this {kind.__name__}" in said and "Its tables: backbone.embedding.tokens" in said
    assert f"eqx.tree_at(lambda m: m.{end}, model, layer, is_leaf=lambda x: x is None)" in said
    with pytest.raises(ValueError, match=r"head is None in this Small.* Its tables: embedding\. Adapt the owner"):
        added(select(under="head"))(small())


MESSAGES = {
    "nothing": (lambda: added(select("Linear", under="**.query"))(small()), "nothing lies at '**.query'"),
    "unused rank": (
        lambda: added(FUSED, rank_pattern={"**.output": 2})(small()),
        "rank_pattern has '**.output', which none of the 2 selected layers matches or lies in.",
    ),
    "unused alpha": (
        lambda: added(LINEAR, alpha_pattern={"**.fusd": 2.0})(small()),
        "alpha_pattern has '**.fusd', but select(under='**.fusd'): nothing lies at '**.fusd'",
    ),
    "layers": (lambda: added(LINEAR, rank_pattern={"**.blocks.0": 2})(small(True)), "unstack(model)"),
    "same name": (lambda: added(FUSED)(added(FUSED)(small())), "there is an adapter named 'default' here already"),
    "container": (lambda: added(select(under="stack"))(small()), "a Stack is neither linear"),
    "unknown name": (
        lambda: set_adapters(adapted("two"), {"others": 1.0}),
        "no LoRA is named others; there are default, other.",
    ),
    "no lora": (lambda: set_adapters(small(), "default"), "there is no LoRA in this Small"),
    "set merged": (
        lambda: set_adapters(merge(adapted("embedding"), keep=True), ()),
        "set_adapters: the adapters at embedding are merged. unmerge(model) first.",
    ),
    "add merged": (lambda: added(FUSED)(merge(adapted("embedding"), keep=True)), "add_adapter: the adapters at"),
    "train merged": (lambda: adapter_mask(merge(adapted("linear"), keep=True)), "are merged. unmerge(model) first"),
    "merge": (lambda: merge(small()), "merge: there is no adapter in this Small."),
    "unmerge": (lambda: unmerge(adapted("two")), "unmerge: there is no layer that merge(…, keep=True) made"),
    "mask": (lambda: adapter_mask(small()), "There is no adapter in this Small."),
    "mask of a name": (
        lambda: adapter_mask(adapted("two"), name="third"),
        "There is no adapter named 'third' in this Small. There are default, other.",
    ),
    "no bias": (
        lambda: merge(added(select("Linear", under="**.output"), use_bias=True)(small())),
        "merge: a LoRA adds a bias, which this Linear has no place for",
    ),
    "quantized": (
        lambda: merge(IA3_ON_CODED(FUSED.map(small(), coded))),
        "merge: a IA3 stands beside a Coded, whose matrix is stored in a code",
    ),
}
IA3_ON_CODED = lambda model: select("Coded").map(model, IA3.adapter())


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    act, message = MESSAGES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        act()


def test_an_unknown_kind_of_bias(unchecked):
    with pytest.raises(ValueError, match="bias must be one of none, all, adapters; it is 'lora_only'"):
        adapter_mask(adapted("two"), bias="lora_only")


def test_an_error_of_a_layer_says_where():
    with pytest.raises(ValueError, match="the rank is 8, but a matrix 15 by 7 has at most 7") as caught:
        added(LINEAR, rank=8)(small())
    assert "at stack.blocks.0.fused" in caught.value.__notes__


# ---- what a reviewer tried


def test_a_pattern_that_earlier_ones_leave_nothing_for_is_an_error():
    with pytest.raises(
        ValueError, match=r"rank_pattern has '\*\*.fused', but every layer .* put the narrower one first"
    ):
        add_adapter(small(), LINEAR, rank=2, rank_pattern={"**": 3, "**.fused": 1}, key=KEY)


def test_what_else_trains_has_no_whole_numbers_in_it():
    model = added(FUSED, dropout=0.5)(small())
    mask = adapter_mask(model, also=select(under="stack.blocks.0"))
    trained, frozen = eqx.partition(model, mask)
    assert not any(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(trained))
    slopes = jax.grad(lambda trained: (eqx.combine(trained, frozen)(IDS) ** 2).sum())(trained)
    assert any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(slopes.stack.blocks[0].output))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given", ["**.fused", ["fused"], None])
def test_a_pattern_is_no_selection(given):
    with pytest.raises(TypeError, match=r"add_adapter takes a Selection, as select\(…\) makes it"):
        add_adapter(small(), given, rank=2, key=KEY)
