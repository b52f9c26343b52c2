"""T5: a cache changes nothing, padding neither, nobody sees what follows; its halves, layouts, and wrong calls."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import T5, T5_V1, T5_V1_1, UMT5, Memory, T5Config, T5Encoder, T5Model, stack
from eqx_transformers.skeletons import skeleton

from ..full import FULL
from .ours import KEY, filled

NEAR = {"rtol": 0, "atol": 3e-5}
# 8 buckets up to a distance of 7: sequences reach beyond the last one on either side.
SIZES = {"vocab_size": 61, "embed_dim": 21, "num_heads": 3, "head_dim": 5, "mlp_dim": 37, "num_layers": 2}
SIZES |= {"num_buckets": 8, "max_distance": 7}
CONFIGS = {
    "t5": replace(T5_V1, **SIZES, num_decoder_layers=3),
    "t5-1.1": replace(T5_V1_1, **SIZES),
    "umt5": replace(UMT5, **SIZES, num_decoder_layers=1),
    "tied, unscaled": replace(T5_V1_1, **(SIZES | {"num_layers": 1}), num_decoder_layers=2, tied=True),
}
every = pytest.mark.parametrize(
    "name", CONFIGS if FULL else ["t5", "umt5"]
)  # the others differ in their MLPs and outputs
SEQ, TARGET = 13, 10
call = eqx.filter_jit(lambda model, *ids, key=None, **inputs: model(*ids, key=key, **inputs))


@functools.cache
def make(kind, name, stacked=False, **facts):
    """A model with random numbers in every array; scores of attention stay so small that all keys count."""
    model = filled(skeleton(kind, replace(CONFIGS[name], **facts)))
    model = jax.tree.map(lambda x: 0.6 * x if eqx.is_array(x) and x.ndim == 2 else x, model)
    return stack(model) if stacked else model


def tokens(seed=0, length=SEQ):
    return np.random.default_rng(seed).integers(3, 61, length).astype(np.int32)


def half_of(model):
    """The encoder of a model as a model."""
    there = skeleton(T5Encoder, model.config)
    return eqx.tree_at(lambda m: (m.embedding, m.encoder), there, (model.embedding, model.encoder))


# ---- a cache

SLOTS = 12
PAD = 4
# What is looked at: whole, padded on the right, on the left. What is read: whole, padded on the left, padding alone.
SEEN = np.stack([np.ones(SEQ, bool), np.arange(SEQ) < 8, np.arange(SEQ) >= 5])
THERE = np.stack([np.arange(TARGET) >= n for n in (0, PAD, TARGET)])
SOURCE = np.where(SEEN, [tokens(0), tokens(1), tokens(2)], 0).astype(np.int32)
ROWS = np.where(THERE, [tokens(3, TARGET), tokens(4, TARGET), tokens(5, TARGET)], 0).astype(np.int32)
SPLITS = [(TARGET,), (1,) * TARGET, (4, 1, 1, 4)]


@eqx.filter_jit
def empty(model, source, seen):
    """Memories and empty caches of a batch of rows."""
    memory = jax.vmap(lambda ids, mask: model.encode(ids, attention_mask=mask))(source, seen)
    axes = eqx.filter_eval_shape(model.init_cache, jax.tree.map(lambda x: x[0], memory), SLOTS).axes
    return memory, jax.vmap(lambda memory: model.init_cache(memory, SLOTS), out_axes=axes)(memory)


@eqx.filter_jit
def step(model, ids, cache, there):
    one = lambda ids, cache, there: model.step(ids, cache, attention_mask=there)
    return jax.vmap(one, in_axes=(0, cache.axes, 0), out_axes=(0, cache.axes))(ids, cache, there)


@eqx.filter_jit
def batched(model, source, rows, seen, there):
    masks = lambda seen, there: {"attention_mask": seen, "decoder_attention_mask": there}
    return jax.vmap(lambda s, r, a, b: model(s, r, **masks(a, b)))(source, rows, seen, there)


@every
def test_a_cache_changes_nothing_in_any_split_with_masks_on_both_sides(name):
    model = make(T5, name)
    whole = np.asarray(batched(model, SOURCE, ROWS, SEEN, THERE))
    short = call(model, SOURCE[1, :8], ROWS[1, PAD:])
    memory, cache = empty(model, SOURCE, SEEN)
    assert memory.states.shape == (3, SEQ, 21) and (memory.real == SEEN).all()
    for splits in SPLITS:
        held, at, out = cache, 0, []
        for n in splits:
            y, held = step(model, ROWS[:, at : at + n], held, THERE[:, at : at + n])
            out, at = [*out, y], at + n
        got = np.concatenate(out, axis=1)
        np.testing.assert_allclose(got[THERE], whole[THERE], **NEAR)
        np.testing.assert_allclose(got[1, PAD:], short, **NEAR)
        assert np.isfinite(got).all() and int(held.index) == TARGET
        assert held.real.sum(-1).tolist() == [TARGET, TARGET - PAD, 0]
    assert np.abs(whole[0] - whole[1])[PAD:].max() > 1e-2


def test_a_cache_is_of_the_decoders_dtype_whatever_the_memorys():
    model = make(T5, "t5")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, model)
    cache = half.init_cache(model.encode(tokens()), SLOTS)
    assert {x.dtype for layer in cache.layers for x in (layer.own.keys, layer.own.values)} == {jnp.dtype("bfloat16")}
    assert half.step(tokens(1, 3), cache)[0].dtype == jnp.bfloat16


def test_a_cache_holds_what_each_layer_needs_and_the_memory_never_changes():
    model = make(T5Model, "umt5")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, model)
    memory = half.encode(tokens())
    cache = half.init_cache(memory, SLOTS)
    assert cache.length == SLOTS and len(cache.layers) == model.config.decoder_layers
    for layer in cache.layers:
        for held, length in ((layer.own, SLOTS), (layer.memory, SEQ)):
            assert (held.keys.shape, held.values.shape) == ((3, 5, length), (3, length, 5))
        assert {x.dtype for x in jax.tree.leaves((layer.own, layer.memory.keys))} == {jnp.dtype("bfloat16")}
    hidden, after = half.step(tokens(1, 3), cache)
    assert hidden.dtype == jnp.bfloat16
    assert all(eqx.tree_equal(a.memory, b.memory) for a, b in zip(cache.layers, after.layers, strict=True))


def test_the_last_scores_alone_and_an_overfull_cache():
    model, ids = make(T5, "t5"), tokens(1, TARGET)
    expected = np.asarray(call(model, tokens(), ids))

    @eqx.filter_jit
    def run(model):
        cache = model.init_cache(model.encode(tokens()), TARGET)
        first, cache = model.step(ids[:6], cache, last=True)
        last, cache = model.step(ids[6:], cache, last=True)
        return first, last, model.step(ids[:1], cache)[0]

    first, last, over = run(model)
    np.testing.assert_allclose(np.concatenate([first, last]), expected[[5, 9]], **NEAR)
    assert np.isnan(over).all()  # where nobody could say so


# ---- layouts


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_stacked_is_the_tuple_and_has_no_cache(name, unchecked):
    flat, deep = (make(T5, name, stacked) for stacked in (False, True))
    given = tokens(), tokens(1, TARGET)
    assert deep.encoder.stack.is_stacked and deep.decoder.stack.is_stacked
    np.testing.assert_allclose(call(deep, *given), call(flat, *given), **NEAR)
    dropped = call(flat, *given, key=KEY)
    np.testing.assert_allclose(call(deep, *given, key=KEY), dropped, **NEAR)
    assert np.abs(dropped - call(flat, *given)).max() > 1e-2
    memory = flat.encode(tokens())
    with pytest.raises(ValueError, match=r"The blocks are stacked, but a cache .* unstack\(model\)"):
        deep.init_cache(memory, 5)
    with pytest.raises(ValueError, match="The blocks are stacked, but a cache"):
        deep.step(tokens(1, 3), flat.init_cache(memory, 5))


# ---- who sees what


@every
def test_padding_of_what_is_looked_at_changes_nothing_on_either_side(name):
    model, ids, target = make(T5, name), tokens(0, 8), tokens(1, TARGET)
    plain = call(model, ids, target)
    for pads in ((5, 0), (0, 5), (2, 3)):
        there = np.pad(np.ones(8, int), pads)
        for fill in (0, 7):
            padded = np.pad(ids, pads, constant_values=fill)
            np.testing.assert_allclose(call(model, padded, target, attention_mask=there), plain, **NEAR)
    # Without the mask, padding is a token as any other.
    assert np.abs(call(model, np.pad(ids, (0, 5)), target) - plain).max() > 1e-2


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_what_follows_is_seen_by_nobody_and_what_stands_before_by_all(name):
    model, ids, target = make(T5, name), tokens(), tokens(1, TARGET)
    other = target.copy()
    other[6] = 3 + (target[6] - 2) % 58
    assert other[6] != target[6]
    mine, theirs = (np.asarray(call(model, ids, x)) for x in (target, other))
    np.testing.assert_array_equal(mine[:6], theirs[:6])
    assert (np.abs(mine[6:] - theirs[6:]).max(-1) > 1e-4).all()
    # An encoder's tokens all see each other, and the decoder's see all of them.
    changed = ids.copy()
    changed[12] = 3 + (ids[12] - 2) % 58
    hidden = [np.asarray(call(half_of(model), x)) for x in (ids, changed)]
    assert (np.abs(hidden[0] - hidden[1]).max(-1) > 1e-4).all()
    assert (np.abs(mine - call(model, changed, target)).max(-1) > 1e-4).all()


def test_a_table_of_who_sees_whom_is_joined_with_nobody_sees_what_follows():
    model, ids, target = make(T5, "t5"), tokens(), tokens(1, TARGET)
    plain, table = np.asarray(call(model, ids, target)), np.ones((TARGET, TARGET), bool)
    np.testing.assert_array_equal(call(model, ids, target, decoder_attention_mask=table), plain)
    table[:, 2] = np.arange(TARGET) == 2  # nobody but itself sees the third
    got = np.asarray(call(model, ids, target, decoder_attention_mask=table))
    np.testing.assert_array_equal(got[:3], plain[:3])
    assert (np.abs(got[3:] - plain[3:]).max(-1) > 1e-4).all()
    encoder = half_of(model)
    apart = np.eye(SEQ, dtype=bool)
    alone = [call(encoder, ids[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(call(encoder, ids, attention_mask=apart)[:3], alone, **NEAR)


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_where_a_text_stands_is_nothing_and_distances_are_something(name):
    """The same tokens further on, behind padding, mean the same; in another order they do not."""
    encoder, ids = half_of(make(T5, name)), tokens(0, 6)
    plain, there = call(encoder, ids), np.pad(np.ones(6, int), (4, 0))
    np.testing.assert_allclose(call(encoder, np.pad(ids, (4, 0)), attention_mask=there)[4:], plain, **NEAR)
    assert np.abs(call(encoder, ids[::-1])[::-1] - plain).max() > 1e-2
    blind = eqx.tree_at(lambda m: [x.weight for x in biases(m)], encoder, replace_fn=jnp.zeros_like)
    np.testing.assert_allclose(call(blind, ids[::-1])[::-1], call(blind, ids), **NEAR)


def biases(encoder):
    """Those that all blocks share, or each block's own."""
    half = encoder.encoder
    return [block.bias for block in half.stack.blocks] if half.bias is None else [half.bias]


def test_a_row_where_nothing_exists_is_finite_and_so_is_its_gradient():
    model, nothing = make(T5, "t5"), np.zeros(SEQ, int)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model):
        y = model(tokens(), tokens(1, TARGET), attention_mask=nothing, decoder_attention_mask=nothing[:TARGET])
        return jnp.square(y).sum()

    value, gradient = loss(model)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


# ---- halves


@every
def test_encode_then_decode_is_the_call_and_the_encoder_alone_its_half(name):
    model, ids, target, there = make(T5, name), tokens(), tokens(1, TARGET), np.arange(SEQ) < 9
    masks = {"attention_mask": there, "decoder_attention_mask": np.arange(TARGET) != 3}

    @eqx.filter_jit
    def run(model, encoder):
        memory = model.encode(ids, attention_mask=there)
        other = Memory(2 * memory.states, memory.real)
        decode = lambda memory: model.decode(memory, target, decoder_attention_mask=masks["decoder_attention_mask"])
        return memory, decode(memory), decode(other), encoder(ids, attention_mask=there)

    memory, got, other, hidden = run(model, half_of(model))
    np.testing.assert_allclose(got, call(model, ids, target, **masks), **NEAR)
    np.testing.assert_allclose(hidden, memory.states, **NEAR)
    np.testing.assert_array_equal(memory.real, there)
    assert np.abs(other - got).max() > 1e-2
    keyed = eqx.filter_jit(lambda m: m.encode(ids, key=KEY).states)(model)
    assert np.abs(keyed - memory.states).max() > 1e-2


def test_a_model_without_an_output_reads_the_same_tokens_one_place_on():
    for start in (0, 5):
        model, ids = make(T5Model, "t5", start_id=start), tokens()
        given = np.concatenate([[start], ids[:-1]]).astype(np.int32)
        np.testing.assert_array_equal(call(model, ids), call(model, ids, given))
    assert call(model, ids).shape == (SEQ, 21) and call(model, ids, given[:4]).shape == (4, 21)


def test_scores_are_those_against_the_table_where_it_is_tied_and_scaled_where_the_config_says():
    parts = lambda m: (m.embedding, m.encoder, m.decoder)
    for name, tied, scaled in (("t5", True, True), ("t5-1.1", False, False), ("tied, unscaled", True, False)):
        model, config = make(T5, name), CONFIGS[name]
        body = eqx.tree_at(parts, skeleton(T5Model, config), parts(model))
        hidden = np.float64(call(body, tokens(), tokens(1, TARGET)))
        assert (model.head is None, config.tied, config.scaled) == (tied, tied, scaled)
        weight = np.float64((model.embedding if config.tied else model.head).weight)
        expected = hidden * (21**-0.5 if config.scaled else 1) @ weight.T
        np.testing.assert_allclose(call(model, tokens(), tokens(1, TARGET)), expected, rtol=1e-4, atol=1e-4)


# ---- wrong calls

BATCH = np.stack([tokens(0), tokens(1)])
FLOATS = tokens().astype(np.float32)
NO_START, NO_END = {"start_id": None}, {"end_id": None}
tiny = lambda kind=T5, **facts: make(kind, "t5", **facts)
steps = lambda ids, **inputs: tiny().step(ids, tiny().init_cache(tiny().encode(tokens()), 5), **inputs)
WRONG = {
    "a batch": (lambda: tiny()(BATCH, tokens()), r"token_ids must be 'seq', but it is \(2, 13\).*jax\.vmap it"),
    "a batch read": (lambda: tiny()(tokens(), BATCH), r"decoder_token_ids must be 'seq', but it is \(2, 13\)"),
    "floats": (lambda: make(T5Encoder, "t5")(FLOATS), "token_ids must be integers, but it is float32"),
    "floats read": (lambda: tiny()(tokens(), FLOATS), "decoder_token_ids must be integers, but it is float32"),
    "floats in a step": (lambda: steps(FLOATS), "decoder_token_ids must be integers, but it is float32"),
    "nothing": (lambda: tiny()(tokens(), tokens()[:0]), "decoder_token_ids is empty"),
    "a short mask": (
        lambda: tiny()(tokens(), tokens(), attention_mask=np.ones(3, int)),
        r"attention_mask must be \(13,\).* but it is \(3,\)",
    ),
    "a short mask of what is read": (
        lambda: tiny()(tokens(), tokens(0, 4), decoder_attention_mask=np.ones(SEQ, int)),
        r"attention_mask must be \(4,\).* but it is \(13,\)",
    ),
    "an additive mask": (
        lambda: tiny()(tokens(), tokens(), attention_mask=np.zeros(SEQ, np.float32)),
        "1 where to attend, but it is float32",
    ),
    "who sees whom": (
        lambda: tiny().encode(tokens(), attention_mask=np.ones((SEQ, SEQ), int)),
        "attention_mask must be 'seq' here: which tokens exist",
    ),
    "who sees whom in a step": (
        lambda: steps(tokens(0, 3), attention_mask=np.ones((3, 3), int)),
        "attention_mask must be 'seq' here: which tokens exist",
    ),
    "a short cache": (lambda: steps(tokens(0, 6)), "5 slots, of which 0 are filled: there is no room for 6 more"),
    "a batch of memories": (
        lambda: tiny().decode(Memory(*(np.stack([x, x]) for x in tiny().encode(tokens()))), tokens()),
        r"A memory is what encode gave for one text.*\(2, 13, 21\) and \(2, 13\).*jax\.vmap",
    ),
    "a memory the other way round": (
        lambda: tiny().init_cache(Memory(*tiny().encode(tokens())[::-1]), 5),
        r"states 'memory embed_dim' and real 'memory', but these are \(13,\) and \(13, 21\)",
    ),
    "no start": (lambda: tiny(T5Model, **NO_START)(tokens()), "names no start_id, with which .*T5's own is 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_told_what_is_wrong(unchecked, case):
    wrong, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        wrong()


def test_what_the_decoder_reads_needs_no_start_where_it_is_given():
    assert call(tiny(T5Model, **NO_START), tokens(), tokens(1, 4)).shape == (4, 21)
    assert call(tiny(**NO_START), tokens(), tokens(1, 4)).shape == (4, 61)


PARTS = {
    "encoder.stack.blocks.1.mlp.down_proj": (21, 36),
    "decoder.stack.blocks.2.cross_attention.key_proj": (15, 20),
    "decoder.stack.blocks.0.attention.output_proj": (21, 14),
}


@pytest.mark.parametrize("path", PARTS)
def test_an_error_inside_carries_the_modules_path(unchecked, path):
    at = lambda m: functools.reduce(lambda x, n: x[int(n)] if n.isdigit() else getattr(x, n), path.split("."), m).weight
    wrong = eqx.tree_at(at, tiny(), jnp.ones(PARTS[path]))
    with pytest.raises(ValueError, match=f"in_features = {PARTS[path][1]}") as raised:
        eqx.filter_eval_shape(lambda m: m(tokens(), tokens()), wrong)
    assert raised.value.__notes__[0] == f"at {path}"


WRONG_FACTS = [
    ({"family": "t6"}, "family = 't6' is not one of t5, mt5, umt5"),
    ({"activation": "swish"}, "activation = 'swish' is not one of"),
    ({"dropout": 1.5}, "dropout = 1.5 is not a probability"),
    ({"num_heads": 0}, "num_heads = 0 must be at least 1"),
    ({"num_decoder_layers": -1}, "num_decoder_layers = -1 must not be negative"),
    ({"start_id": 61}, "start_id = 61 is not one of the 61 tokens"),
    ({"end_id": -1}, "end_id = -1 is not one of the 61 tokens"),
]


@pytest.mark.parametrize(("facts", "said"), WRONG_FACTS)
def test_facts_that_make_no_model_are_refused(unchecked, facts, said):
    with pytest.raises(ValueError, match=said):
        replace(CONFIGS["t5"], **facts)


def test_halves_of_no_depth_are_norms_alone():
    bare = make(T5, "t5", num_layers=0, num_decoder_layers=0)
    assert bare.encoder.stack.num_layers == bare.decoder.stack.num_layers == 0
    assert call(bare, tokens(), tokens(1, 4)).shape == (4, 61)
    assert CONFIGS["t5-1.1"].decoder_layers == 2 and CONFIGS["umt5"].decoder_layers == 1


def test_a_config_that_says_nothing_is_the_first_t5s():
    assert T5Config(family="t5") == T5_V1
    assert T5Config(family="t5", num_layers=3).decoder_layers == 3
    assert T5Config(family="t5", num_layers=3, num_decoder_layers=5).decoder_layers == 5
