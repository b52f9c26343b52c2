"""Losses: against torch, against loops, and what the chunked one holds in memory."""

import functools
import math
import re
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import CausalLM, GPT2Config
from eqx_transformers.nn import Embedding, Linear
from eqx_transformers.training import (
    chunked_cross_entropy,
    cross_entropy,
    lm_loss,
    next_token_loss,
    next_tokens,
)

from ..models.ours import CONFIGS, KEY, filled, skeleton

pytestmark = pytest.mark.usefixtures("strict_promotion")
BATCH, SEQ, EMBED, VOCAB = 2, 13, 7, 61
NEAR = {"rtol": 2e-5, "atol": 2e-6}
rng = np.random.default_rng(0)
f32 = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
LOGITS = 3 * f32(BATCH, SEQ, VOCAB)
TARGETS = rng.integers(0, VOCAB, (BATCH, SEQ)).astype(np.int32)
MASK = rng.random((BATCH, SEQ)) < 0.6
HIDDEN, WEIGHT, BIAS = f32(BATCH, SEQ, EMBED), f32(VOCAB, EMBED), f32(VOCAB)
scores = lambda hidden, weight, bias: jnp.einsum("...d,vd->...v", hidden, weight) + bias[None, None]


# ---- the formula


def in_torch(logits, targets, mask, z_loss):
    """Value and gradient, with torch's own cross-entropy and `ignore_index`."""
    import torch

    x = torch.tensor(np.array(logits), requires_grad=True)
    y = torch.tensor(np.where(mask, targets, -100), dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(x.reshape(-1, VOCAB), y.reshape(-1), ignore_index=-100)
    loss = loss + z_loss * (torch.logsumexp(x, -1)[torch.tensor(mask)] ** 2).mean()
    loss.backward()
    return loss.item(), x.grad.numpy()


@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("mask", [np.ones_like(MASK), MASK], ids=["all", "some"])
def test_values_and_gradients_are_torchs(mask, z_loss):
    value, gradient = jax.value_and_grad(cross_entropy)(LOGITS, TARGETS, mask, z_loss=z_loss)
    expected, slopes = in_torch(LOGITS, TARGETS, mask, z_loss)
    np.testing.assert_allclose(value, expected, **NEAR)
    np.testing.assert_allclose(gradient, slopes, **NEAR)


def test_a_mask_may_be_weights_and_none_is_all():
    weights = rng.random((BATCH, SEQ)).astype(np.float32)
    table = np.log(np.exp(np.float64(LOGITS)).sum(-1))
    each = table - np.take_along_axis(np.float64(LOGITS), TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy(LOGITS, TARGETS, weights), (weights * each).sum() / weights.sum(), **NEAR)
    np.testing.assert_allclose(cross_entropy(LOGITS, TARGETS), each.mean(), **NEAR)
    assert cross_entropy(LOGITS, TARGETS, MASK.astype(np.int32)) == cross_entropy(LOGITS, TARGETS, MASK)


def test_half_precision_is_widened_before_anything_is_summed():
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    loss = cross_entropy(half, TARGETS)
    assert loss.dtype == jnp.float32
    assert loss == cross_entropy(half.astype(jnp.float32), TARGETS)
    assert jax.grad(cross_entropy)(half, TARGETS).dtype == jnp.bfloat16


LOSSES = {
    "plain": lambda hidden, targets, mask: cross_entropy(scores(hidden, WEIGHT, BIAS), targets, mask, z_loss=0.1),
    "chunked": lambda hidden, targets, mask: chunked_cross_entropy(
        hidden, WEIGHT, targets, mask, bias=BIAS, chunk=17, z_loss=0.1
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_count_has_no_effect_and_where_nothing_counts_the_loss_is_zero(name):
    both = jax.value_and_grad(LOSSES[name])
    value, gradient = both(HIDDEN, TARGETS, MASK)
    assert 0 < value < np.inf and (np.abs(gradient[MASK]).max(-1) > 0).all() and not gradient[~MASK].any()
    for junk, target in ((np.nan, -100), (np.inf, VOCAB), (1e30, 2**31 - 1)):
        same = both(np.where(MASK[..., None], HIDDEN, junk), np.where(MASK, TARGETS, target), MASK)
        np.testing.assert_array_equal(same[0], value)
        np.testing.assert_array_equal(same[1], gradient)
    nothing = both(HIDDEN, np.full_like(TARGETS, -100), np.zeros_like(MASK))
    assert nothing[0] == 0 and not nothing[1].any()


@pytest.mark.parametrize("bad", [VOCAB, -1])
@pytest.mark.parametrize("name", LOSSES)
def test_a_target_outside_that_counts_is_an_error_or_nan(name, bad, monkeypatch):
    targets = TARGETS.copy()
    targets[1, 3] = bad
    said = rf"Targets must be 0 to 60 \(a vocabulary of 61\) wherever the mask is not 0, but 1 .* the first is {bad}"
    with pytest.raises(ValueError, match=said):
        LOSSES[name](HIDDEN, targets, None)
    value, gradient = jax.jit(jax.value_and_grad(LOSSES[name]))(HIDDEN, targets, jnp.ones((BATCH, SEQ)))
    assert np.isnan(value) and np.isnan(gradient).all()
    monkeypatch.setenv("EQX_TRANSFORMERS_CHECK", "1")
    checked = eqx.filter_jit(lambda *args: LOSSES[name](*args))
    assert np.isfinite(checked(HIDDEN, TARGETS, None))
    with pytest.raises(Exception, match="Targets must be 0 to 60"):
        jax.block_until_ready(checked(HIDDEN, targets, None))


# ---- which tokens are predicted, and which count

IDS = np.array([[5, 9, 4, 0, 0, 0], [0, 0, 7, 3, 2, 6], [8, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 2, 2], [1, 2, 2, 2, 3, 3], [0, 0, 0, 0, 0, 0]], np.int32)
RULES = {
    "target": lambda real, t: real[t + 1],
    "input": lambda real, t: real[t],
    "both": lambda real, t: real[t] and real[t + 1],
}
SHIFTED = 3 * f32(*IDS.shape, VOCAB)


@pytest.mark.parametrize("packed", [False, True], ids=["one text a row", "packed"])
@pytest.mark.parametrize("masked_by", RULES)
def test_next_tokens_are_those_of_a_literal_loop(masked_by, packed):
    total, count = 0.0, 0
    for row, (ids, segments) in enumerate(zip(IDS, SEGMENTS, strict=True)):
        for t in range(len(ids) - 1):
            if RULES[masked_by](ids != 0, t) and not (packed and segments[t] != segments[t + 1]):
                x = np.float64(SHIFTED[row, t])
                total, count = total + math.log(np.exp(x).sum()) - x[ids[t + 1]], count + 1
    given = {"segment_ids": SEGMENTS} if packed else {}
    for real in ({"padding_id": 0}, {"attention_mask": IDS != 0}, {"attention_mask": (IDS != 0).astype(np.int64)}):
        got = next_token_loss(SHIFTED, IDS, masked_by=masked_by, **real, **given)
        np.testing.assert_allclose(got, total / count, **NEAR)
    targets, mask = next_tokens(IDS, padding_id=0, masked_by=masked_by, **given)
    assert mask.sum() == count and (targets == IDS[:, 1:]).all()


def test_by_input_the_first_padding_is_predicted_and_by_target_it_is_not():
    assert next_tokens(IDS[0], padding_id=0, masked_by="input")[1].tolist() == [True, True, True, False, False]
    assert next_tokens(IDS[0], padding_id=0)[1].tolist() == [True, True, False, False, False]
    assert next_tokens(IDS[1], padding_id=0)[1].tolist() == [False, True, True, True, True]
    assert next_tokens(IDS[1], padding_id=0, masked_by="both")[1].tolist() == [False, False, True, True, True]
    assert next_tokens(IDS)[1].all()


def test_one_token_predicts_nothing():
    assert next_token_loss(SHIFTED[:, :1], IDS[:, :1]) == 0


REFUSED = {
    "both": ({"attention_mask": IDS != 0, "padding_id": 0}, "both say which tokens are real: give one"),
    "a word": ({"masked_by": "targets"}, "masked_by = 'targets' is not one of target, input, both"),
    "a float mask": ({"attention_mask": np.ones(IDS.shape, np.float32)}, "1 for a real token, but it is float32"),
    "a mask of one row": ({"attention_mask": np.ones(6, int)}, r"the shape of token_ids, \(4, 6\), but it is \(6,\)"),
    "segments": ({"segment_ids": SEGMENTS[:, 1:]}, r"segment_ids must have the shape of token_ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_says_nothing_or_two_things_is_refused(unchecked, case):
    given, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        next_token_loss(SHIFTED, IDS, **given)


def test_shapes_that_would_broadcast_are_refused(unchecked):
    for call in (functools.partial(cross_entropy, LOGITS), functools.partial(chunked_cross_entropy, HIDDEN, WEIGHT)):
        with pytest.raises(ValueError, match=r"targets must have the shape \(2, 13\), one entry a token.* \(13,\)"):
            call(TARGETS[0])
        with pytest.raises(ValueError, match=r"mask must have the shape \(2, 13\), one entry a token.* \(2, 1\)"):
            call(TARGETS, MASK[:, :1])
    with pytest.raises(ValueError, match="their last axes must be the same"):
        chunked_cross_entropy(HIDDEN, WEIGHT[:, 1:], TARGETS)
    with pytest.raises(ValueError, match="chunk = 0 must be a whole number, at least 1"):
        chunked_cross_entropy(HIDDEN, WEIGHT, TARGETS, chunk=0)


# ---- chunk by chunk


def plain(hidden, weight, bias, targets, mask):
    return cross_entropy(scores(hidden, weight, bias), targets, mask, z_loss=0.02)


def chunked(hidden, weight, bias, targets, mask, chunk):
    return chunked_cross_entropy(hidden, weight, targets, mask, bias=bias, chunk=chunk, z_loss=0.02)


@pytest.mark.parametrize(("vocab", "chunk"), [(61, 1), (61, 16), (61, 60), (61, 1000), (60, 16), (60, 30)])
def test_chunks_are_the_plain_loss_in_value_and_gradients(vocab, chunk):
    weight, bias, targets = WEIGHT[:vocab], BIAS[:vocab], np.minimum(TARGETS, vocab - 1)
    both = lambda f, *rest: jax.value_and_grad(lambda *x: f(*x, targets, MASK, *rest), (0, 1, 2))(HIDDEN, weight, bias)
    got, expected = jax.jit(lambda: (both(chunked, chunk), both(plain)))()
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, **NEAR)


def test_scores_far_apart_do_not_overflow():
    # Chunk after chunk, the largest score is far above the last one's, or far below.
    steep = jnp.linspace(-3e4, 3e4, VOCAB)
    for bias in (steep, steep[::-1]):
        slope = lambda f, *rest: jax.grad(f, 2)(HIDDEN, WEIGHT, bias, TARGETS, MASK, *rest)  # noqa: B023
        expected = slope(plain)
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(slope(chunked, 9), expected, rtol=1e-4, atol=1e-3)


def rows(f, *rest):
    """`f` of every row of the batch apart."""
    one = lambda h, w, b, t, m: f(h, w, b, t, m, *rest)
    each = jax.vmap(one, (0, None, None, 0, 0))
    return lambda h, w, b: each(h[:, None], w, b, TARGETS[:, None], MASK[:, None])


def whole(f, *rest):
    return lambda h, w, b: f(h, w, b, TARGETS, MASK, *rest)


ORDERS = {
    "gradient of the mean of rows": lambda *f: jax.grad(lambda *x: rows(*f)(*x).mean(), (0, 1, 2)),
    "gradient of each row": lambda *f: jax.jacrev(rows(*f), (0, 1, 2)),
    "forward mode": lambda *f: lambda *x: jax.jvp(whole(*f), x, jax.tree.map(jnp.cos, x)),
    "second order": lambda *f: jax.grad(lambda *x: jnp.square(jax.grad(whole(*f), 2)(*x)).sum(), (0, 1, 2)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_every_transformation_goes_through(order):
    run = lambda *f: jax.jit(ORDERS[order](*f))(HIDDEN, WEIGHT, BIAS)
    got, expected = run(chunked, 16), run(plain)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, **NEAR)


def test_bfloat16_is_summed_in_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in (HIDDEN, WEIGHT, BIAS)]
    wide = [x.astype(jnp.float32) for x in half]
    both = lambda f, x, *rest: jax.value_and_grad(f, (0, 1, 2))(*x, TARGETS, MASK, *rest)
    (value, got), (expected, gradients) = both(chunked, half, 7), both(plain, wide)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(got, gradients, strict=True):
        assert a.dtype == jnp.bfloat16  # and so rounded once: 8 bits of mantissa
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-7, atol=2**-8 * np.abs(b).max())


# ---- what exists at once

LONG, MANY, NARROW, ROWS = 32, 1024, 8, 3


@functools.cache
def compiled(chunk, batch):
    """The compiled value and gradients of a loss: its largest buffer, in elements, and its room for temporary ones."""
    shape = (ROWS,) if batch else ()
    h, t = jnp.zeros((*shape, LONG, NARROW)), jnp.zeros((*shape, LONG), int)

    def one(h, w, t):
        if chunk is None:
            return cross_entropy(jnp.einsum("sd,vd->sv", h, w), t, z_loss=0.1)
        return chunked_cross_entropy(h, w, t, chunk=chunk, z_loss=0.1)

    loss = (lambda h, w, t: jax.vmap(one, (0, None, 0))(h, w, t).mean()) if batch else one
    done = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(h, jnp.zeros((MANY, NARROW)), t).compile()
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred)\[([\d,]+)\]", done.as_text())
    return max(math.prod(map(int, s.split(","))) for s in shapes), done.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("batch", [False, True], ids=["one sequence", "under vmap"])
def test_neither_pass_holds_the_logits(batch):
    rows = ROWS if batch else 1
    logits, held = rows * LONG * MANY, max(rows * LONG * 64, MANY * NARROW)
    assert compiled(None, batch)[0] >= logits and compiled(None, batch)[1] >= 4 * logits  # so that this can fail
    # 1,024 are 16 chunks of 64, and 15 of 65 with a smaller one. The weight, which is no temporary, is the largest.
    assert compiled(64, batch)[0] == held
    assert compiled(64, batch)[1] < logits  # bytes: a quarter of the logits'
    assert compiled(65, batch)[0] < logits


# ---- models

# No blocks: what stands on the hidden states is asked here, and compiling is what costs time.
TINY = GPT2Config(vocab_size=61, embed_dim=6, num_layers=0, num_heads=2, max_positions=19, embedding_dropout=0.4)


def untied_with_bias(model):
    output = filled(Linear(6, 61, key=KEY), seed=3)
    return eqx.tree_at(lambda m: m.head.decoder, model, output, is_leaf=lambda x: x is None)


@functools.cache
def lm(name):
    made = {
        "tied": lambda: filled(skeleton(CausalLM, TINY)),
        "untied": lambda: filled(skeleton(CausalLM, replace(TINY, tied=False))),
        "untied with a bias": lambda: untied_with_bias(lm("tied")),
        "an encoder's head": lambda: filled(skeleton(CausalLM, replace(CONFIGS["roberta"], causal=True, num_layers=0))),
        "an encoder's head, untied": lambda: filled(
            skeleton(CausalLM, replace(CONFIGS["bert"], causal=True, num_layers=0, tied=False))
        ),
    }
    return made[name]()


LMS = ["tied", "untied", "untied with a bias", "an encoder's head", "an encoder's head, untied"]
TEXTS = rng.integers(3, 61, (3, 11)).astype(np.int32)
THERE = np.arange(11) >= np.array([[0], [4], [10]])


@eqx.filter_jit
def in_all_ways(model):
    """The loss of a batch from its logits, and (value, gradients) without chunks and with them."""
    logits = jax.vmap(lambda ids, there: model(ids, attention_mask=there))(TEXTS, THERE)
    given = {"attention_mask": THERE, "z_loss": 0.01}
    both = lambda chunk: eqx.filter_value_and_grad(lambda m: lm_loss(m, TEXTS, chunk=chunk, **given))(model)
    return next_token_loss(logits, TEXTS, **given), both(None), both(16)


@pytest.mark.parametrize("name", LMS)
def test_a_models_loss_is_that_of_its_logits_with_chunks_and_without(name):
    expected, (plain, slopes), (chunked, chunked_slopes) = in_all_ways(lm(name))
    np.testing.assert_allclose(plain, expected, **NEAR)
    np.testing.assert_allclose(chunked, expected, **NEAR)
    for a, b in zip(*map(jax.tree.leaves, (slopes, chunked_slopes)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_sequence_is_a_batch_of_one_and_a_key_switches_dropout_on_in_every_row_apart(chunk):
    model, same = lm("tied"), np.stack([TEXTS[0]] * 2)

    @eqx.filter_jit
    def losses(model):
        loss = lambda ids, key=None: lm_loss(model, ids, key=key, chunk=chunk)
        return loss(TEXTS[0]), loss(same), loss(same, KEY), [loss(TEXTS[0], key) for key in jax.random.split(KEY, 2)]

    one, batch, dropped, apart = losses(model)
    np.testing.assert_allclose(batch, one, **NEAR)
    np.testing.assert_allclose(dropped, np.mean(apart), **NEAR)
    assert len({round(float(x), 4) for x in (one, *apart)}) == 3


def test_packed_texts_predict_nothing_of_each_other():
    model, segments = lm("tied"), np.repeat([1, 2], [5, 6]).astype(np.int32)
    apart = TEXTS[0, :5], TEXTS[0, 5:]
    run = eqx.filter_jit(
        lambda m: (lm_loss(m, TEXTS[0], segment_ids=segments, chunk=16), [lm_loss(m, x) for x in apart])
    )
    together, (first, second) = run(model)
    np.testing.assert_allclose(together, (4 * first + 5 * second) / 9, **NEAR)


def test_where_a_model_hides_tokens_by_their_id_they_do_not_count():
    facts = {"positions": "index", "hides_padding": True, "causal": True, "num_layers": 0}
    model = filled(skeleton(CausalLM, replace(CONFIGS["bert"], **facts)))
    ids = np.where(np.arange(11) < 6, TEXTS[0], 0).astype(np.int32)
    losses = eqx.filter_jit(lambda m: (lm_loss(m, ids), lm_loss(m, TEXTS[0, :6]), lm_loss(m, TEXTS[0])))(model)
    np.testing.assert_allclose(losses[0], losses[1], **NEAR)
    assert abs(losses[1] - losses[2]) > 1e-3


class Wrapped(eqx.Module):
    """A layer that is no matrix any more: twice what it holds."""

    inner: eqx.Module

    def __call__(self, *args):
        return 2 * self.inner(*args)

    def attend(self, x):
        return 2 * self.inner.attend(x)


WRAPPED = {
    "a tied embedding": ("tied", lambda m: m.backbone.embedding.tokens, Embedding),
    "an output": ("untied", lambda m: m.head.decoder, Linear),
    "an encoder's output": ("an encoder's head, untied", lambda m: m.head.decoder, Linear),
    "a head": ("tied", lambda m: m.head, object),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapped_output_is_not_read_past(case):
    name, where, kind = WRAPPED[case]
    assert isinstance(where(lm(name)), kind)
    model = eqx.tree_at(where, lm(name), replace_fn=Wrapped)
    losses = eqx.filter_jit(lambda *models: [lm_loss(m, TEXTS[0]) for m in models])(model, lm(name))
    assert abs(losses[0] - losses[1]) > 1e-3
    with pytest.raises(ValueError, match=r"Wrapped.*chunk=None") as raised:
        lm_loss(model, TEXTS[0], chunk=16)
    assert raised.value.__notes__[0] == "at head"


def test_only_a_causal_lm_has_chunks_and_anything_that_is_called_so_a_loss(unchecked):
    model = lm("tied")
    function = lambda ids, *, key=None, **inputs: model(ids, key=key, **inputs)
    np.testing.assert_array_equal(lm_loss(function, TEXTS[0]), lm_loss(model, TEXTS[0]))
    with pytest.raises(ValueError, match="needs a CausalLM, but the model is a function: chunk=None takes any"):
        lm_loss(function, TEXTS[0], chunk=16)
    with pytest.raises(ValueError, match="attention_mask must have the shape of token_ids"):
        lm_loss(model, TEXTS, attention_mask=np.ones((3, 11, 11), int))
