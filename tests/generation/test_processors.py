"""Each processor against transformers' own class, on one row of random scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from eqx_transformers.generation.processors import (
    MinNewTokens,
    MinP,
    NoRepeatNgram,
    RepetitionPenalty,
    SoFar,
    Temperature,
    TopK,
    TopP,
    highest,
    processed,
)
from eqx_transformers.generation.request import changing, ends_of, filtering

VOCAB, NEW, SLOTS = 97, 5, 43
ENDS = [7, 31]
NUMBER = lambda x: jnp.asarray(x, jnp.float32)

CASES = {
    "penalty 1.3": (RepetitionPenalty(NUMBER(1.3)), theirs.RepetitionPenaltyLogitsProcessor(1.3)),
    "penalty 0.7": (RepetitionPenalty(NUMBER(0.7)), theirs.RepetitionPenaltyLogitsProcessor(0.7)),
    **{f"{n}-grams": (NoRepeatNgram(n), theirs.NoRepeatNGramLogitsProcessor(n)) for n in (1, 2, 3, 4)},
    **{
        f"at least {n}": (
            MinNewTokens(jnp.asarray(ENDS), jnp.asarray(n)),
            theirs.MinNewTokensLengthLogitsProcessor(29 - NEW, n, ENDS),
        )
        for n in (NEW, NEW + 1)
    },
    "temperature": (Temperature(NUMBER(0.7)), theirs.TemperatureLogitsWarper(0.7)),
    **{f"top {k}": (TopK(k), theirs.TopKLogitsWarper(k)) for k in (1, 13, 200)},
    **{f"top p {p}": (TopP(NUMBER(1 - p)), theirs.TopPLogitsWarper(p)) for p in (1e-6, 0.3, 0.9, 0.999)},
    **{f"min p {p}": (MinP(NUMBER(p)), theirs.MinPLogitsWarper(p)) for p in (0.0, 0.1, 0.9, 1.0)},
}


def scores(seed=0, vocab=VOCAB):
    return np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)


def tokens(count=29, seed=1):
    """Few different ones, so that n-grams repeat."""
    return np.random.default_rng(seed).integers(20, 23, count)


def so_far(ids, padding=9, filler=0):
    """The same in slots, after padding and before slots that are not filled yet, both of which hold `filler`."""
    slots = np.full(SLOTS, filler)
    slots[padding : padding + len(ids)] = ids
    real = (np.arange(SLOTS) >= padding) & (np.arange(SLOTS) < padding + len(ids))
    as_array = lambda x: jnp.asarray(np.asarray(x, np.int32))
    return SoFar(as_array(slots), jnp.asarray(real), as_array(padding + len(ids)), as_array(NEW))


def reference(process, ids, row):
    return process(torch.from_numpy(np.asarray(ids))[None], torch.from_numpy(row.copy())[None])[0].numpy()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("filler", [0, 21])
def test_a_processor_is_transformers_own(name, filler):
    ours, other = CASES[name]
    for seed in range(4):
        row, ids = scores(seed), tokens(seed=seed)
        found = np.asarray(ours(jnp.asarray(row), so_far(ids, filler=filler)))
        np.testing.assert_array_equal(found, reference(other, ids, row))


def test_the_cases_change_something():
    row = jnp.asarray(scores())
    untouched = {name for name, (ours, _) in CASES.items() if jnp.array_equal(ours(row, so_far(tokens())), row)}
    assert untouched == {f"at least {NEW}", "top 200", "min p 0.0"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_ngram_is_complete_in_fewer_tokens(count):
    row, ids = scores(), np.full(count, 21)
    for n in (2, 3, 4):
        found = np.asarray(NoRepeatNgram(n)(jnp.asarray(row), so_far(ids, padding=0, filler=21)))
        np.testing.assert_array_equal(found, reference(theirs.NoRepeatNGramLogitsProcessor(n), ids, row))


OPTIONS = {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.07}
ALL = {"repetition_penalty": 1.3, "no_repeat_ngram": 2, "min_new_tokens": NEW + 1}


def test_all_together_in_their_order():
    """Each of transformers' in the order in which its `generate` puts them."""
    ends = ends_of(ENDS, None)
    ours = changing(ends, **ALL) + filtering(**OPTIONS)
    others = [
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.NoRepeatNGramLogitsProcessor(2),
        theirs.MinNewTokensLengthLogitsProcessor(29 - NEW, NEW + 1, ENDS),
        theirs.TemperatureLogitsWarper(1.7),
        theirs.TopKLogitsWarper(40),
        theirs.TopPLogitsWarper(0.8),
        theirs.MinPLogitsWarper(0.07),
    ]
    run = jax.jit(processed)
    for seed in range(8):
        row, ids = scores(seed), tokens(seed=seed)
        found, wanted = np.asarray(run(ours, jnp.asarray(row), so_far(ids))), row
        for other in others:
            wanted = reference(other, ids, wanted)
        np.testing.assert_array_equal(found, wanted)
        assert 1 < np.isfinite(wanted).sum() < 40


def test_half_of_all_tokens_at_a_real_vocabulary():
    """Sums over 50,000 probabilities in another order keep the same tokens."""
    row = scores(vocab=50257)
    for p in (0.5, 0.95):
        found = np.asarray(TopP(NUMBER(1 - p))(jnp.asarray(row), so_far(tokens())))
        wanted = reference(theirs.TopPLogitsWarper(p), tokens(), row)
        likely = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        differ = np.isinf(found) != np.isinf(wanted)
        # One at the edge may fall on the other side: float32 sums of so many are no better than this.
        assert likely[differ].sum() < 1e-6 and differ.sum() <= 1


def test_a_scores_nan_stays_one():
    """So that `generate` sees it."""
    row = jnp.full(VOCAB, jnp.nan)
    run = jax.jit(processed)
    processors = changing(ends_of(ENDS, None), **ALL) + filtering(**OPTIONS)
    assert np.isnan(np.asarray(run(processors, row, so_far(tokens())))).any()


@pytest.mark.parametrize("width", [128 * 300, 128 * 300 + 1, 64], ids=["blocks", "no blocks", "narrow"])
def test_the_highest_are_in_order_and_of_equal_ones_the_first(width):
    """Many equal numbers, minus infinity, and rows of one number alone."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, (5, width)).astype(np.float32)
    x[1], x[2, 7:], x[3, ::3] = 4.0, -np.inf, rng.normal(size=x[3, ::3].shape)
    for count in (1, 8, 20):
        found, places = highest(jnp.asarray(x), count)
        wanted = np.argsort(-x, axis=-1, kind="stable")[:, :count]
        np.testing.assert_array_equal(places, wanted)
        np.testing.assert_array_equal(found, np.take_along_axis(x, wanted, axis=-1))
