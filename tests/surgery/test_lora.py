"""The laws of wrappers, for every kind of adapter in both layouts; what LoRA computes, and where it starts."""

import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import nn, select, stack, unstack
from eqx_transformers.surgery._lowrank import LowRank
from eqx_transformers.surgery.adapter_masks import adapter_mask
from eqx_transformers.surgery.adapters import set_adapters
from eqx_transformers.surgery.lora import LoRA
from eqx_transformers.surgery.merging import merge

from .adapted import CASES, FUSED, IDS, KEY, LINEAR, adapted, added, coded, run, small, trained
from .test_select import equal

pytestmark = pytest.mark.usefixtures("strict_promotion")
every_case = pytest.mark.parametrize("case", CASES)
layouts = pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
KINDS = (LoRA, "IA3")


def bits(a, b):
    """Whether two trees are the same, the sign of zero too."""
    as_bytes = lambda tree: [np.asarray(x).tobytes() for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]
    return equal(a, b) and as_bytes(a) == as_bytes(b)


def close(a, b, tolerance):
    """Within a tolerance of the largest number."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() <= tolerance * np.abs(b).max()


# ---- the three laws


@every_case
@layouts
def test_adding_changes_nothing(case, stacked):
    model = small(stacked)
    before, after = run(model, IDS), run(adapted(case, stacked), IDS)
    assert select(KINDS).count(adapted(case, stacked)) >= 1
    assert np.array_equal(before, after) if CASES[case].exact else close(after, before, 2e-6)


@every_case
@layouts
def test_merging_what_was_not_touched_is_the_identity(case, stacked):
    model, plain = small(stacked), merge(adapted(case, stacked))
    if CASES[case].exact:
        assert bits(plain, model)
    same = jax.tree.map(lambda a, b: close(a, b, 1e-6), *(eqx.filter(x, eqx.is_array) for x in (plain, model)))
    assert all(jax.tree.leaves(same)) and jax.tree.structure(plain) == jax.tree.structure(model)


@every_case
@layouts
def test_merging_preserves_the_function(case, stacked):
    learned = trained(adapted(case, stacked))
    after, plain = run(learned, IDS), merge(learned)
    assert not close(after, run(small(stacked), IDS), 0.01)
    assert close(run(plain, IDS), after, 1e-6)
    assert not any(isinstance(node, LoRA) for node in jax.tree.leaves(plain, is_leaf=lambda x: isinstance(x, LoRA)))


@every_case
def test_stacked_blocks_are_adapted_as_the_tuple_is(case):
    flat, deep = adapted(case), adapted(case, stacked=True)
    assert equal(jax.tree.map(jnp.shape, stack(flat)), jax.tree.map(jnp.shape, deep))
    leaves = zip(*(jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (stack(flat), deep)), strict=True)
    assert all(close(b, a, 1e-6) for a, b in leaves)
    flat = trained(flat)
    assert close(run(stack(flat), IDS), run(flat, IDS), 1e-6)


# ---- what it computes


def layer(dtype=jnp.float32):
    base = eqx.tree_at(lambda b: b.bias, nn.Linear(7, 5, key=jax.random.key(2)), jnp.arange(5.0))
    return jax.tree.map(lambda x: x.astype(dtype), base)


def table(dtype=jnp.float32):
    return jax.tree.map(lambda x: x.astype(dtype), nn.Embedding(11, 7, key=jax.random.key(2)))


def of(base, rank=3, **options):
    return LoRA.adapter(rank, **options)(base, key=KEY)


X = jax.random.normal(jax.random.key(4), (2, 3, 7))


def test_the_formula_for_a_linear_layer_and_its_sizes():
    node = of(layer(), alpha=4.0, init="random", use_bias=True)
    (adapter,) = node.adapters
    assert isinstance(adapter, LowRank)
    assert (node.in_features, node.out_features, adapter.rank, adapter.parts) == (7, 5, 3, 1)
    low = np.einsum("...i,ri,or->...o", X, adapter.a, adapter.b) + np.asarray(adapter.b_bias)
    assert np.allclose(node(X), layer()(X) + 4 / 3 * low, atol=1e-6)
    assert np.allclose(node.dense(), layer().weight + 4 / 3 * adapter.b @ adapter.a, atol=1e-6)
    assert float(of(layer(), alpha=4.0, rslora=True).adapters[0].scale) == pytest.approx(4 / math.sqrt(3))
    assert float(of(layer()).adapters[0].scale) == 1.0
    assert not hasattr(node, "vocab_size")


def test_the_formula_for_an_embedding_and_its_tied_output():
    node = of(table(), alpha=4.0, init="random")
    (adapter,) = node.adapters
    assert (node.vocab_size, node.embed_dim, adapter.a.shape, adapter.b.shape) == (11, 7, (3, 11), (7, 3))
    changed = np.asarray(table().weight + 4 / 3 * (adapter.b @ adapter.a).T)
    assert np.allclose(node.dense(), changed, atol=1e-6)
    assert np.allclose(node(IDS), changed[IDS], atol=1e-6)
    assert np.allclose(node.attend(X), X @ changed.T, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["lora", "dora"])
def test_rows_that_lookups_give_no_gradient_to_have_none_in_the_adapter(options):
    base = nn.Embedding(11, 7, padding_id=0, key=KEY)
    node = of(eqx.tree_at(lambda b: b.weight, base, replace_fn=lambda w: w + 1), init="random", **options)
    gradient = jax.grad(lambda a: (eqx.tree_at(lambda n: n.adapters[0].a, node, a)(IDS) ** 2).sum())
    columns = np.abs(gradient(node.adapters[0].a)).max(0)
    assert columns[0] == 0 and columns[3] > 0 and columns[1] == 0  # 1 is not looked up
    attended = jax.grad(lambda a: (eqx.tree_at(lambda n: n.adapters[0].a, node, a).attend(X) ** 2).sum())
    assert np.abs(attended(node.adapters[0].a)).max(0)[0] > 0


def test_an_id_outside_of_the_table_is_the_bases_error_or_not_a_number():
    node = of(table(), init="random")
    with pytest.raises(ValueError, match="ids must be 0 to 10"):
        node(jnp.array([11]))
    assert np.isnan(run(node, jnp.array([11, -1]))).all()


def test_each_part_of_a_fused_projection_has_its_own_a_and_b():
    base = nn.Linear(7, 15, key=KEY)
    node = of(base, rank=2, alpha=3.0, parts=3, init="random", use_bias=True)
    (adapter,) = node.adapters
    assert (adapter.a.shape, adapter.b.shape, adapter.rank, adapter.parts) == ((6, 7), (15, 2), 2, 3)
    for i in range(3):
        rows, outputs = slice(2 * i, 2 * i + 2), slice(5 * i, 5 * i + 5)
        part = nn.Linear(7, 5, key=KEY)
        part = eqx.tree_at(lambda p: (p.weight, p.bias), part, (base.weight[outputs], base.bias[outputs]))
        bias = adapter.b_bias[outputs]
        alone = LoRA(part, [LowRank(adapter.a[rows], adapter.b[outputs], 1.5, b_bias=bias)])
        assert np.allclose(node(X)[..., outputs], alone(X), atol=1e-6)


def test_parts_from_the_weight_are_each_their_own():
    base = nn.Linear(7, 15, key=KEY)
    for init in ("pissa", "olora"):
        whole = of(base, rank=2, parts=3, init=init).adapters[0]
        part = eqx.tree_at(lambda b: (b.weight, b.bias), base, (base.weight[5:10], base.bias[5:10]))
        alone = of(part, rank=2, init=init).adapters[0]
        assert np.allclose(whole.product()[5:10], alone.product(), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_base_in_half_precision_keeps_its_dtype_and_sums_run_in_float32(dtype):
    for base, x in ((layer(dtype=dtype), X.astype(dtype)), (table(dtype), IDS)):
        for options in ({}, {"dora": True}):
            node = of(base, init="random", **options)
            assert node(x).dtype == dtype and node.adapters[0].a.dtype == jnp.float32
            exact = of(jax.tree.map(lambda x: x.astype(jnp.float32), base), init="random", **options)
            fine = exact(x if x is IDS else x.astype(jnp.float32))
            assert close(node(x).astype(jnp.float32), fine, 2 * jnp.finfo(dtype).eps)
            assert np.array_equal(of(base)(x).astype(jnp.float32), base(x).astype(jnp.float32))
            plain = merge(node)
            assert plain.weight.dtype == dtype
            assert np.array_equal(plain.weight, node.dense().astype(dtype))  # rounded once


@pytest.mark.parametrize("case", ["two", "dora"])
def test_a_model_in_bfloat16(case):
    model = adapted(case, dtype=jnp.bfloat16)
    assert model(IDS).dtype == jnp.bfloat16
    assert np.array_equal(run(model, IDS), run(small(dtype=jnp.bfloat16), IDS)) or not CASES[case].exact
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(merge(model)) if eqx.is_array(x))
    assert close(run(merge(trained(model)), IDS), run(trained(model), IDS), 0.05)


def decoded(node):
    plain = nn.Linear(node.in_features, node.out_features, use_bias=False, key=KEY)
    return eqx.tree_at(lambda p: p.weight, plain, node.dense())


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"use_bias": True}], ids=str)
def test_a_quantized_base(options):
    model = LINEAR.map(small(), coded)
    learned = trained(added(select("Coded"), init="random", **options)(model))
    assert close(run(learned, IDS), run(select("Coded").map(learned, decoded), IDS), 1e-6)
    with pytest.raises(ValueError, match=re.escape("stands beside a Coded, whose matrix is stored in a code")):
        merge(learned)
    with pytest.raises(ValueError, match="leaves a remainder in the base, and a Coded would round it"):
        added(select("Coded"), init="pissa")(model)


def test_a_quantized_table():
    node = trained(of(coded(table()), init="random", dora=True))
    assert np.allclose(node(IDS), node.dense()[IDS], atol=1e-5)
    assert np.allclose(node.attend(X), X @ node.dense().T, atol=1e-4)


def test_a_row_of_zeros_has_a_magnitude_of_zero_and_a_finite_gradient():
    node = of(eqx.tree_at(lambda b: b.weight, layer(), replace_fn=lambda w: w.at[2].set(0.0)), dora=True)
    assert np.array_equal(node(X), node.base(X))
    learned, rest = eqx.partition(node, adapter_mask(node))
    gradient = jax.grad(lambda learned: (eqx.combine(learned, rest)(X) ** 2).sum())(learned)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


# ---- where it starts


def test_initial_numbers_have_the_distributions_that_they_say():
    base, many = nn.Linear(400, 300, key=KEY), nn.Embedding(300, 200, key=KEY)
    a = {init: of(base, rank=8, init=init).adapters[0] for init in ("kaiming", "gaussian", "random")}
    for init in ("kaiming", "random"):
        assert 0.049 < np.abs(a[init].a).max() <= 0.05 and np.std(a[init].a) == pytest.approx(0.05 / 3**0.5, rel=0.03)
    assert np.std(a["gaussian"].a) == pytest.approx(1 / 8, rel=0.03) and np.abs(a["gaussian"].a).max() > 3 / 8
    assert not np.any(a["kaiming"].b) and not np.any(a["gaussian"].b)
    assert 0.34 < np.abs(a["random"].b).max() <= 8**-0.5
    biased = lambda init: of(base, rank=8, init=init, use_bias=True).adapters[0].b_bias
    assert not np.any(biased("kaiming")) and 0.33 < np.abs(biased("random")).max() <= 8**-0.5
    for init in ("kaiming", "gaussian", "random"):
        adapter = of(many, rank=8, init=init).adapters[0]
        assert np.std(adapter.b) == pytest.approx(1, rel=0.06) and np.any(adapter.a) == (init == "random")
    assert np.std(of(many, rank=8, init="random").adapters[0].a) == pytest.approx(1, rel=0.06)


@pytest.mark.parametrize("make", [layer, table])
def test_pissa_takes_the_best_approximation_out_of_the_weight(make):
    base, node = make(), of(make(), rank=2, alpha=6.0, init="pissa")
    values = np.linalg.svd(base.weight, compute_uv=False)
    assert np.linalg.norm(node.base.weight) == pytest.approx(np.linalg.norm(values[2:]), rel=1e-5)
    assert np.allclose(np.linalg.norm(node.adapters[0].a, axis=1) ** 2, values[:2] / 3, atol=1e-5)
    assert np.allclose(np.linalg.norm(node.adapters[0].b, axis=0) ** 2, values[:2] / 3, atol=1e-5)
    assert np.allclose(node.dense(), base.weight, atol=1e-6)


def test_olora_takes_orthonormal_columns():
    node = of(layer(), rank=2, alpha=6.0, init="olora")
    (adapter,) = node.adapters
    assert np.allclose(adapter.b.T @ adapter.b, np.eye(2), atol=1e-6)
    assert np.allclose(node.base.weight, layer().weight - 3 * adapter.b @ adapter.a, atol=1e-6)


def test_dora_begins_with_the_norms_of_the_rows():
    for base in (layer(), table()):
        for init in ("kaiming", "random", "pissa"):
            node = of(base, init=init, dora=True)
            weight = np.asarray(node.base.weight if isinstance(base, nn.Linear) else node.base.weight.T)
            whole = weight + np.asarray(node.adapters[0].product())
            assert np.allclose(node.adapters[0].magnitude, np.linalg.norm(whole, axis=1), rtol=1e-6)


def test_the_norm_of_dora_gets_no_gradient():
    node = trained(of(layer(), init="random", dora=True))
    (adapter,) = node.adapters

    def by_hand(b):
        whole = node.base.weight + b @ adapter.a
        frozen = jnp.linalg.norm(node.base.weight + adapter.b @ adapter.a, axis=1)
        weight = whole * jnp.broadcast_to((adapter.magnitude / frozen)[:, None], whole.shape)
        return ((X @ weight.T + jnp.broadcast_to(node.base.bias, (2, 3, 5))) ** 2).sum()

    ours = jax.grad(lambda b: (eqx.tree_at(lambda n: n.adapters[0].b, node, b)(X) ** 2).sum())(adapter.b)
    assert close(ours, jax.grad(by_hand)(adapter.b), 1e-5)


# ---- dropout


def test_adapters_drop_what_goes_into_them_and_nothing_else():
    node = of(layer(), init="random", dropout=0.25)
    keys = jax.random.split(KEY, 4000)
    x = X[0, :1]
    drawn = jax.vmap(lambda key: node(x, key=key))(keys)
    assert np.allclose(drawn.mean(0), node(x), atol=0.03) and np.std(drawn, axis=0).max() > 0.05
    (adapter,) = node.adapters
    kept = jax.vmap(lambda key: adapter.dropout(x, key=jax.random.fold_in(key, adapter.salt)))(keys)
    assert np.mean(kept == 0) == pytest.approx(0.25, abs=0.01)
    low = jnp.einsum("n...i,ri,or->n...o", kept, adapter.a, adapter.b)
    assert np.allclose(drawn, node.base(x)[None] + low, atol=1e-6)
    assert np.array_equal(eqx.nn.inference_mode(node)(x, key=KEY), node(x))
    assert np.array_equal(of(layer(), init="random")(x, key=KEY), of(layer(), init="random")(x))


def test_layers_of_one_block_and_adapters_of_one_layer_drop_different_numbers():
    salts = [int(adapter.salt) for adapter in select(LowRank).get(dropping(False))]
    assert len(set(salts)) == len(salts) == 6
    assert dropping(False).stack.blocks[0].fused.names == ("default", "other")


@functools.cache
def dropping(stacked):
    model = added(FUSED, init="random", dropout=0.4)(small(stacked))
    return added(LINEAR, init="random", dropout=0.4, name="other", dora=True)(model)


def test_tuple_and_stacked_drop_the_same():
    flat, deep = dropping(False), dropping(True)
    assert close(run(deep, IDS, key=KEY), run(flat, IDS, key=KEY), 1e-6)
    assert not close(run(flat, IDS, key=KEY), run(flat, IDS), 0.01)
    assert not close(run(flat, IDS, key=KEY), run(flat, IDS, key=jax.random.key(8)), 0.01)


def test_dropout_under_vmap_of_examples():
    model = dropping(True)
    keys = jax.random.split(KEY, 3)
    batched = eqx.filter_jit(jax.vmap(lambda ids, key: model(ids, key=key)))(jnp.stack([IDS] * 3), keys)
    assert all(close(batched[i], run(model, IDS, key=keys[i]), 1e-6) for i in range(3))
    assert not close(batched[0], batched[1], 0.01)


# ---- several


@layouts
def test_several_adapters_add_up_as_their_weights_say(stacked):
    model = trained(adapted("two", stacked))
    node = unstack(model).stack.blocks[0].fused
    one, two = ((adapter.product() @ X.reshape(-1, 7).T).T.reshape(2, 3, 15) for adapter in node.adapters)
    for weights in ([1.0, 1.0], [1.0, 0.0], [0.25, -2.0]):
        weighed = eqx.tree_at(lambda n: n.weights, node, jnp.array(weights))
        assert np.allclose(weighed(X), node.base(X) + weights[0] * one + weights[1] * two, atol=1e-5)
        assert close(merge(weighed)(X), weighed(X), 1e-6)
    off = set_adapters(model, ())
    assert np.array_equal(run(off, IDS), run(small(stacked), IDS))


def test_a_negative_zero_of_the_base_survives_a_merge():
    node = of(eqx.tree_at(lambda b: b.weight, layer(), replace_fn=lambda w: w.at[2, 3].set(-0.0)))
    assert bits(merge(node), node.base) and np.signbit(merge(node).weight[2, 3])


def test_an_adapter_on_an_adapted_layer_is_drawn_for_the_same_base():
    first = of(layer(), init="random")
    second = LoRA.adapter(2, name="other", dora=True)(first, key=KEY)
    assert second.names == ("default", "other") and isinstance(second.base, nn.Linear)
    assert equal(second.adapters[0], first.adapters[0]) and second.weights.shape == (2,)
    assert np.allclose(second.adapters[1].magnitude, jnp.linalg.norm(layer().weight, axis=1), rtol=1e-6)
    assert close(second(X), first(X), 1e-6)


# ---- transformations and skeletons


def described(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)) if hasattr(x, "shape") else x, tree)


@every_case
def test_a_skeleton_is_adapted_to_a_skeleton(case):
    bare = eqx.filter_eval_shape(lambda model: model, small(stacked=True))
    assert equal(described(CASES[case].adapt(bare)), described(adapted(case, stacked=True)))


def test_under_remat_and_vmap_of_grad():
    model = trained(added(FUSED, dora=True)(small(stacked=True)))
    learned, rest = eqx.partition(model, adapter_mask(model))
    again = eqx.tree_at(lambda m: m.stack.remat, rest, True)
    gradient = jax.grad(lambda learned, rest, ids: (eqx.combine(learned, rest)(ids) ** 2).sum())
    batch = jnp.stack([IDS, IDS[::-1]])
    both = jax.tree.leaves(eqx.filter_jit(jax.vmap(gradient, (None, None, 0)))(learned, again, batch))
    first = jax.tree.leaves(eqx.filter_jit(gradient)(learned, rest, IDS))
    assert len(first) == 3 and all(close(b[0], a, 1e-5) for a, b in zip(first, both, strict=True))


# ---- errors

BAD = {
    "rank": ({"rank": 0}, "rank and parts are whole numbers, at least 1; they are 0 and 1"),
    "init": ({"init": "loftq"}, "init must be one of kaiming, gaussian, pissa, olora, random; it is 'loftq'"),
    "dropout": ({"dropout": 1.0}, "dropout must be at least 0 and less than 1; it is 1.0"),
    "alpha": ({"init": "pissa", "alpha": -1.0}, "init='pissa' needs an alpha above 0; it is -1.0"),
    "nothing": ({"alpha": 0.0}, "alpha must be a number, and with 0 nothing ever changes; it is 0.0"),
    "dora": ({"dora": True, "use_bias": True}, "take dora or use_bias"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_make_no_sense(name, unchecked):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        LoRA.adapter(**{"rank": 2} | options)


NORM = nn.LayerNorm(7)
WRONG = {
    "neither": (NORM, {}, "a LayerNorm is neither linear (in_features, out_features) nor an embedding"),
    "rank": (layer(), {"rank": 6}, "the rank is 6, but a matrix 5 by 7 has at most 5."),
    "rank of parts": (layer(), {"rank": 2, "parts": 5}, "a matrix 5 by 7 has at most 1 in each of 5 parts"),
    "parts": (layer(), {"parts": 2}, "5 outputs are not 2 equal parts"),
    "table": (table(), {"parts": 7}, "parts and use_bias are for linear layers, and this is an Embedding"),
    "stacked": (small(True).stack.blocks.fused, {}, "the weight of this Linear is [2, 15, 7], not a matrix"),
    "same name": (of(layer()), {}, "there is an adapter named 'default' here already (default)"),
    "second": (of(layer()), {"name": "b", "init": "olora"}, "init='olora' changes the base, on which default stands"),
}


@pytest.mark.parametrize("name", WRONG)
def test_nodes_that_do_not_fit(name, unchecked):
    node, options, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        LoRA.adapter(**{"rank": 2} | options)(node, key=KEY)


def test_a_key_is_needed_and_names_differ():
    with pytest.raises(ValueError, match=re.escape("needs a key: where.each(model, make, key=key)")):
        LINEAR.each(small(), LoRA.adapter(2))
    with pytest.raises(ValueError, match="1 adapters need as many different names"):
        LoRA(layer(), of(layer()).adapters, ("a", "b"))
