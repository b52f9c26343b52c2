"""Decoders: a cache changes nothing, padding and packing neither; dropout, dtypes, gradients, wrong calls."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import GPT2, CausalLM, Encoder, Llama, stack
from eqx_transformers.models.backbones import BACKBONES
from eqx_transformers.nn import Cache
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery import leaves_by_path

from .ours import DECODERS, KEY, LENGTH, SIZES, call, make, tokens, train

NEAR = {"rtol": 0, "atol": 3e-5}
# The same laws over an encoder that is used as a decoder; `CausalLM` makes it causal.
CAUSAL = {"roberta": {"causal": True}, "bert": {"causal": True}}
# These count padding as positions when they are called, and so padding on the left moves them.
INDEXED = ("haiku", "functional", "roberta", "bert")
backbone = lambda family: BACKBONES[type(DECODERS[family])] if family in DECODERS else Encoder
body = lambda family, stacked=False, **facts: make(
    backbone(family), family, stacked, **(CAUSAL.get(family, {}) | facts)
)
arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))


# ---- a cache

SLOTS = 17
PAD = 5
# A whole row, one that is padded on the left, and one of padding alone.
THERE = np.stack([np.arange(LENGTH) >= n for n in (0, PAD, LENGTH)])
ROWS = np.where(THERE, [tokens(0), tokens(1), tokens(2)], 1).astype(np.int32)
SPLITS = [(LENGTH,), (1,) * LENGTH, (4, 1, 4, 4)]

batched = eqx.filter_jit(
    lambda model, ids, there: jax.vmap(lambda ids, there: model(ids, attention_mask=there))(ids, there)
)


@eqx.filter_jit
def step(model, ids, cache, there):
    axes = model.init_cache(SLOTS).axes
    one = lambda ids, cache, there: model.step(ids, cache, attention_mask=there)
    return jax.vmap(one, in_axes=(0, axes, 0), out_axes=(0, axes))(ids, cache, there)


def fresh(model, rows):
    """Empty caches of a batch of rows."""
    cache = model.init_cache(SLOTS)
    wide = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), cache)
    return eqx.tree_at(lambda c: c.index, wide, cache.index)


def stepped(model, splits):
    cache, at, out = fresh(model, len(ROWS)), 0, []
    for n in splits:
        y, cache = step(model, ROWS[:, at : at + n], cache, THERE[:, at : at + n])
        out, at = [*out, y], at + n
    return np.concatenate(out, axis=1), cache


# This law is of every family. Those of one class differ little in what follows, and one of them stands for all.
@pytest.mark.parametrize("family", [*DECODERS, *CAUSAL])
def test_a_cache_changes_nothing_in_any_split_with_padding_on_the_left_too(family):
    model = body(family)
    whole, short = call(model, ROWS[0]), call(model, ROWS[1, PAD:])
    for splits in SPLITS:
        got, cache = stepped(model, splits)
        np.testing.assert_allclose(got[0], whole, **NEAR)
        np.testing.assert_allclose(got[1, PAD:], short, **NEAR)
        assert np.isfinite(got).all()
        assert int(cache.index) == LENGTH and cache.real.sum(-1).tolist() == [LENGTH, LENGTH - PAD, 0]
    assert np.abs(got[0] - got[1])[PAD:].max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama", "haiku"])
def test_padding_on_the_left_moves_nothing_and_a_row_of_padding_alone_is_finite(family):
    got = batched(body(family), ROWS, THERE)
    np.testing.assert_allclose(got[0], call(body(family), ROWS[0]), **NEAR)
    near = np.allclose(got[1, PAD:], call(body(family), ROWS[1, PAD:]), **NEAR)
    assert near == (family not in INDEXED)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_language_model_steps_as_it_is_called_and_gives_the_last_scores_alone(family):
    model, ids = make(CausalLM, family), tokens()
    expected = np.asarray(call(model, ids))

    @eqx.filter_jit
    def run(model, last):
        first, cache = model.step(ids[:8], model.init_cache(LENGTH), last=last)
        return first, model.step(ids[8:], cache, last=last)[0]

    np.testing.assert_allclose(np.concatenate(run(model, False)), expected, **NEAR)
    np.testing.assert_allclose(np.concatenate(run(model, True)), expected[[7, 12]], **NEAR)


def test_a_cache_holds_a_pair_of_arrays_a_layer_in_the_streams_dtype():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, body("llama"))
    cache = half.init_cache(SLOTS)
    assert isinstance(cache, Cache) and cache.length == SLOTS and len(cache.layers) == 2
    assert {x.dtype for x in arrays(cache.layers)} == {jnp.dtype("bfloat16")}
    held = cache.layers[0]
    assert (held.keys.shape, held.values.shape, held.length) == ((2, 6, SLOTS), (2, SLOTS, 6), SLOTS)


def test_an_overfull_cache_gives_nan_where_nobody_could_say_so():
    model, ids = body("gpt2"), tokens()
    run = eqx.filter_jit(lambda model, ids, cache: model.step(ids, cache))
    hidden, cache = run(model, ids, model.init_cache(LENGTH))
    assert np.isfinite(hidden).all()
    hidden, _ = run(model, ids[:1], cache)
    assert np.isnan(hidden).all()


# ---- windows, positions, packing


@pytest.mark.parametrize(("family", "reach"), [("mistral", 2 * 3), ("qwen2", LENGTH), ("gpt2", LENGTH)])
def test_a_token_is_seen_as_far_as_the_windows_of_all_layers_reach(family, reach):
    ids, other = tokens(), tokens()
    other[0] = ids[0] + 1 if ids[0] < 60 else 3
    changed = np.abs(call(body(family), ids) - call(body(family), other)).max(-1) > 1e-6
    assert changed.tolist() == [i <= reach for i in range(LENGTH)]


def test_a_layer_without_its_window_sees_everything():
    first = lambda windowed: body("qwen2", num_layers=1, windowed=(windowed,))
    assert [first(w).stack.blocks[0].attention.window for w in (True, False)] == [5, None]
    assert [block.attention.window for block in body("mistral").stack.blocks] == [4, 4]


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "haiku"])
def test_packed_texts_are_the_texts_apart(family):
    parts = [tokens(seed, n) for seed, n in enumerate((6, 2, 5))]
    segments = np.repeat([3, 7, 4], [6, 2, 5])
    together = call(body(family), np.concatenate(parts), segment_ids=segments)
    apart = eqx.filter_jit(lambda model: [model(part) for part in parts])(body(family))
    np.testing.assert_allclose(together, np.concatenate(apart), **NEAR)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_positions_given_are_those_of_the_tokens(family):
    model, ids, usual = body(family), tokens(), np.arange(LENGTH)
    plain = call(model, ids)
    np.testing.assert_allclose(call(model, ids, position_ids=usual), plain, **NEAR)
    moved = call(model, ids, position_ids=usual + 9)
    if model.rotary is not None:  # distances alone count
        np.testing.assert_allclose(moved, plain, rtol=0, atol=2e-4)
        assert not np.allclose(call(model, ids, position_ids=2 * usual), plain, atol=1e-2)
    else:
        rolled = eqx.tree_at(lambda m: m.embedding.positions.weight, model, replace_fn=lambda w: jnp.roll(w, 9, 0))
        np.testing.assert_array_equal(call(rolled, ids, position_ids=usual + 9), plain)
        assert not np.allclose(moved, plain, atol=1e-2)


def test_a_table_of_positions_ends_and_a_rotary_models_context_does_not():
    assert {family: body(family).room for family in DECODERS} == {
        family: None if body(family).rotary is not None else 31 for family in DECODERS
    }
    ids = lambda n: jax.ShapeDtypeStruct((n,), jnp.int32)
    run = lambda family, n, **inputs: eqx.filter_eval_shape(
        lambda m, ids, inputs: m(ids, **inputs), body(family), ids(n), inputs
    )
    assert run("llama", 50).shape == (50, 21) and run("gpt2", 31).shape == (31, 21)
    with pytest.raises(ValueError, match=r"GPT2: a sequence of 32 tokens is longer than .* which is 31. Truncate it"):
        run("gpt2", 32)
    for inputs in ({"position_ids": ids(50)}, {"segment_ids": ids(50)}, {"attention_mask": ids(50)}):
        assert run("gpt2", 50, **inputs).shape == (50, 21)
    # Known only when it runs: a position that the table does not have is NaN.
    assert np.isnan(call(body("gpt2"), tokens(), position_ids=np.full(LENGTH, 31))).all()


# ---- depth, dropout, dtypes, gradients

# Layers that differ in their windows cannot be stacked.
ALIKE = {"gpt2": {}, "qwen2": {"windowed": None}, "functional": {}}


@pytest.mark.parametrize("family", ALIKE)
def test_a_key_switches_dropout_on_the_same_in_a_tuple_and_stacked(family):
    flat, deep = (body(family, stacked, **ALIKE[family]) for stacked in (False, True))
    ids, plain = tokens(), call(flat, tokens())
    np.testing.assert_allclose(call(deep, ids), plain, **NEAR)
    dropped = call(flat, ids, KEY)
    np.testing.assert_array_equal(call(flat, ids, KEY), dropped)
    np.testing.assert_allclose(call(deep, ids, KEY), dropped, **NEAR)
    np.testing.assert_allclose(call(eqx.nn.inference_mode(flat), ids, KEY), plain, **NEAR)
    other = call(flat, ids, jax.random.key(1))
    drops = family != "functional"  # which has no dropout at all
    assert (np.abs(dropped - plain).max() > 1e-2, np.abs(dropped - other).max() > 1e-2) == (drops, drops)


def test_layers_that_differ_are_not_stacked(unchecked):
    with pytest.raises(ValueError, match=r"blocks\.1\.attention.* but blocks\.0\.attention"):
        stack(body("qwen2"))


RATES = {"dropout": 0.3, "embedding_dropout": 0.2, "attention_dropout": 0.4}
SITES = {
    "gpt2": {
        "embedding.dropout": 0.2,
        "stack.blocks.0.attention.dropout": 0.4,
        "stack.blocks.0.attention_output_dropout": 0.3,
        "stack.blocks.0.mlp_output_dropout": 0.3,
    },
    "llama": {
        "embedding.dropout": 0.0,
        "stack.blocks.0.attention.dropout": 0.4,
        "stack.blocks.0.attention_output_dropout": 0.0,
        "stack.blocks.0.mlp_output_dropout": 0.0,
    },
}


def rate_of(model, path):
    step = lambda node, name: node[int(name)] if name.isdigit() else getattr(node, name)
    return functools.reduce(step, path.split("."), model).p


@pytest.mark.parametrize("family", SITES)
def test_every_site_drops_at_the_configs_rate_and_nowhere_else(family):
    facts = {name: rate for name, rate in RATES.items() if hasattr(DECODERS[family], name)}
    model, paths = body(family, num_layers=1, **facts), SITES[family]
    rates = {path.removesuffix(".p"): leaf for path, leaf in leaves_by_path(model).items() if path.endswith(".p")}
    assert rates.pop("stack.blocks.0.mlp.dropout") == 0.0  # which is T5's alone
    assert rates == paths
    # Rates as arrays: one program for all of them. With every rate zero, a key changes nothing.
    where = lambda m: [rate_of(m, path) for path in paths]
    set_to = lambda rates: eqx.tree_at(where, model, [jnp.asarray(rate) for rate in rates])
    plain = call(model, tokens())
    np.testing.assert_allclose(call(set_to([0.0] * 4), tokens(), KEY), plain, **NEAR)
    for i in range(4):
        only = call(set_to([0.5 * (i == j) for j in range(4)]), tokens(), KEY)
        assert np.abs(only - plain).max() > 1e-2, list(paths)[i]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "haiku"])
def test_gradients_are_finite_where_nothing_is_seen(family):
    nothing = {"attention_mask": np.zeros(LENGTH, int)}
    y, gradient = train(body(family), tokens(), nothing)
    assert np.isfinite(y).all() and all(np.isfinite(x).all() for x in arrays(gradient))
    assert np.abs(gradient.embedding.tokens.weight).max() > 0


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "functional"])
def test_the_token_tables_dtype_is_the_streams(family):
    model = body(family)
    mixed = eqx.tree_at(lambda m: m.embedding.tokens.weight, model, replace_fn=lambda w: w.astype(jnp.bfloat16))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, model)
    for changed in (mixed, half):
        hidden = call(changed, tokens())
        assert hidden.dtype == jnp.bfloat16
        assert np.abs(np.asarray(hidden, np.float32) - call(model, tokens())).max() < 0.15


def test_what_padding_holds_and_what_follows_is_seen_by_nobody():
    model, keep = body("llama"), np.arange(LENGTH) % 4 != 2
    other = np.where(keep, tokens(), (tokens() + 1) % 61).astype(np.int32)
    mine, theirs = (call(model, ids, attention_mask=keep) for ids in (tokens(), other))
    np.testing.assert_array_equal(mine[keep], theirs[keep])
    later = tokens()
    later[8] = later[8] + 1 if later[8] < 60 else 3
    before, after = (call(model, ids) for ids in (tokens(), later))
    np.testing.assert_array_equal(before[:8], after[:8])
    assert (np.abs(before[8:] - after[8:]).max(-1) > 1e-4).all()
    # A table of who sees whom is joined with "nobody sees what follows".
    table = np.ones((LENGTH, LENGTH), bool)
    np.testing.assert_array_equal(call(model, tokens(), attention_mask=table), before)


def test_the_padding_row_gets_no_gradient_where_the_reference_has_a_padding_row():
    ids = tokens()
    ids[:4] = 1
    gradients = {family: train(body(family), ids, {})[1].embedding.tokens.weight[1] for family in ("llama", "gpt2")}
    assert not gradients["llama"].any() and gradients["gpt2"].any()


# ---- wrong calls

CACHE = lambda n=LENGTH: body("gpt2").init_cache(n)
BATCH = np.stack([tokens(0), tokens(1)])
WRONG = {
    "a batch": (lambda: body("gpt2")(BATCH), r"token_ids must be 'seq', but it is \(2, 13\).*jax\.vmap it"),
    "a batch of steps": (lambda: body("gpt2").step(BATCH, CACHE()), r"token_ids must be 'seq', but it is \(2, 13\)"),
    "floats": (lambda: body("llama")(tokens().astype(np.float32)), "token_ids must be integers, but it is float32"),
    "floats in a step": (
        lambda: body("llama").step(tokens().astype(np.float32), CACHE()),
        "token_ids must be integers, but it is float32",
    ),
    "stacked": (lambda: body("gpt2", True).init_cache(9), "The blocks are stacked, but a cache .* unstack"),
    "stacked later": (lambda: body("gpt2", True).step(tokens(), CACHE()), "The blocks are stacked, but a cache"),
    "a short cache": (lambda: body("gpt2").step(tokens(), CACHE(12)), "12 slots, of which 0 .* no room for 13 more"),
    "who sees whom": (
        lambda: body("gpt2").step(tokens(), CACHE(), attention_mask=np.ones((LENGTH, LENGTH), int)),
        "attention_mask must be 'seq' here: which tokens exist",
    ),
    "a short mask": (
        lambda: body("gpt2").step(tokens(), CACHE(), attention_mask=np.ones(3, int)),
        r"attention_mask must be \(13,\).* but it is \(3,\)",
    ),
    "an additive mask": (
        lambda: body("llama")(tokens(), attention_mask=np.zeros(LENGTH, np.float32)),
        "1 where to attend, but it is float32",
    ),
    "an encoder's steps": (
        lambda: make(Encoder, "bert").step(tokens(), CACHE()),
        "every token sees those that follow it, so nothing can be kept in a cache",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_told_what_is_wrong(unchecked, case):
    wrong, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        wrong()


def test_an_error_inside_a_step_carries_the_modules_path(unchecked):
    where = lambda m: m.backbone.stack.blocks[1].attention.key_proj
    model = make(CausalLM, "llama")
    wrong = eqx.tree_at(where, model, eqx.tree_at(lambda p: p.weight, where(model), jnp.ones((12, 20))))
    with pytest.raises(ValueError, match="in_features = 20") as raised:
        eqx.filter_eval_shape(lambda m: m.step(tokens(), m.init_cache(LENGTH)), wrong)
    assert raised.value.__notes__[0] == "at backbone.stack.blocks.1.attention.key_proj"


def test_facts_make_the_backbones_of_their_names():
    assert type(body("gpt2")) is GPT2 and {type(body(f)) for f in ("llama", "mistral", "qwen2", "qwen3")} == {Llama}
    assert eqx.filter_eval_shape(Llama, replace(DECODERS["llama"], num_layers=0), key=KEY).stack.num_layers == 0
    assert skeleton(GPT2, DECODERS["gpt2"]).embedding.tokens.vocab_size == SIZES["vocab_size"]
