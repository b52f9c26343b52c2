"""Laws of `generate`: transformers' tokens, every row as if it were alone, few programs, clear errors."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import generate, stack
from eqx_transformers.generation import loop

from .twins import ENDS, PAD, ROOM, VOCAB, padded, prompts, reference, twins

NEW = 17
ROWS = 3
MODELS = ["gpt2", "mistral", "roberta"]


def ours(name, ids, mask=None, **options):
    options = {"max_new_tokens": NEW, "padding_id": PAD} | options
    return np.asarray(generate(twins(name).ours, ids, attention_mask=mask, **options))


def theirs(name, ids, mask=None, **options):
    return reference(twins(name).torch, ids, mask, **{"max_new_tokens": NEW} | options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 2, 13])
def test_greedy_is_transformers_token_for_token(name, length):
    for seed in range(3):
        ids = prompts(ROWS, length, seed)
        np.testing.assert_array_equal(ours(name, ids, end_ids=ENDS), theirs(name, ids, ends=ENDS))


def test_ends_are_met_early_late_and_not_at_all():
    """Otherwise the test above would say little."""
    found = np.concatenate([ours("gpt2", prompts(ROWS, n, s), end_ids=ENDS) for n in (1, 2, 13) for s in range(3)])
    ended = np.isin(found, ENDS)
    lengths = np.where(ended.any(1), ended.argmax(1) + 1, NEW)
    assert lengths.min() < NEW < lengths.sum() and len(set(lengths)) > 3 and (lengths == NEW).any()
    assert len(np.unique(found)) > VOCAB / 3


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_is_transformers_token_for_token(name):
    for seed in range(3):
        ids, mask = padded(ROWS, 13, seed)
        found = ours(name, ids, mask, end_ids=ENDS)
        np.testing.assert_array_equal(found, theirs(name, ids, mask, ends=ENDS))


PENALTIES = {"repetition_penalty": 1.4, "min_new_tokens": 6}


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_penalties_and_minimum_length_are_transformers(name):
    for seed in range(3):
        ids = prompts(ROWS, 13, seed)
        found = ours(name, ids, end_ids=ENDS, no_repeat_ngram=2, **PENALTIES)
        wanted = theirs(name, ids, ends=ENDS, no_repeat_ngram_size=2, **PENALTIES)
        np.testing.assert_array_equal(found, wanted)
        assert not np.isin(found[:, :6], ENDS).any()


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_what_it_is_alone_wherever_its_padding_stands(name):
    ids, mask = padded(ROWS, 13)
    scattered = np.random.default_rng(0).permuted(mask, axis=1)
    apart = np.full_like(ids, PAD)
    for i in range(ROWS):
        apart[i, scattered[i] == 1] = ids[i, mask[i] == 1]
    options = {"end_ids": ENDS, "no_repeat_ngram": 2, **PENALTIES}
    alone = np.concatenate([ours(name, row[m == 1][None], **options) for row, m in zip(ids, mask, strict=True)])
    for given in ((ids, mask), (apart, scattered), (ids[:, ::-1], mask[:, ::-1])):
        if given[0] is not ids and given[0] is not apart:  # padding on the right
            given = (np.stack([np.roll(row, -2 * i) for i, row in enumerate(ids)]), mask[:, ::-1].astype(bool))
        np.testing.assert_array_equal(ours(name, *given, **options), alone)


SAMPLED = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.02}


def test_a_sampled_row_is_drawn_from_its_own_key():
    """The first row of a batch is what it is alone; the same prompt in another row is another sample."""
    ids, draw = (
        np.repeat(prompts(1, 5), ROWS, axis=0),
        functools.partial(ours, "gpt2", key=jax.random.key(3), **SAMPLED),
    )
    found = draw(ids)
    np.testing.assert_array_equal(found, draw(ids))
    np.testing.assert_array_equal(found[:1], draw(ids[:1]))
    assert (found[0] != found[1]).any() and (found[1] != found[2]).any()


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["all", "filtered"])
def test_samples_have_the_frequencies_of_the_processed_distribution(options):
    """Of the first token and of the second one, over many rows with the same prompt, by chi-square."""
    import torch
    from transformers import GenerationConfig

    rows, name = 4096, "gpt2"
    prompt = prompts(1, 5)
    found = ours(name, np.repeat(prompt, rows, axis=0), key=jax.random.key(0), max_new_tokens=2, **options)
    model = twins(name).torch
    config = GenerationConfig(do_sample=True, **({"top_k": 0} | options))
    process = model._get_logits_processor(config, input_ids_seq_length=5)
    first = np.bincount(found[:, 0], minlength=VOCAB)
    likeliest = first.argmax()
    for before, tokens in (
        (prompt, found[:, 0]),
        (np.append(prompt, [[likeliest]], 1), found[found[:, 0] == likeliest, 1]),
    ):
        given = torch.from_numpy(before)
        with torch.inference_mode():
            wanted = process(given, model(given).logits[:, -1])[0].softmax(-1).numpy()
        counts, expected = np.bincount(tokens, minlength=VOCAB), wanted * len(tokens)
        assert counts[wanted == 0].sum() == 0
        often = expected >= 5
        statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
        degrees = often.sum() - 1
        assert degrees >= 1 and statistic < degrees + 4 * np.sqrt(2 * degrees)  # four standard deviations


def test_a_prompt_may_fill_the_table_of_positions():
    """The last new token is not read any more, so that it needs no position."""
    ids = prompts(ROWS, ROOM)
    np.testing.assert_array_equal(ours("gpt2", ids, max_new_tokens=1), theirs("gpt2", ids, max_new_tokens=1))
    ids = ids[:, :-6]
    np.testing.assert_array_equal(ours("gpt2", ids, max_new_tokens=7), theirs("gpt2", ids, max_new_tokens=7))


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_padding_alone_are_finite_and_change_no_other(name):
    ids, mask = padded(ROWS, 13)
    mask[1] = 0
    found = ours(name, ids, mask)
    assert ((found >= 0) & (found < VOCAB)).all()
    np.testing.assert_array_equal(found[2], ours(name, ids[2:], mask[2:])[0])


def test_bfloat16_is_finite_and_its_scores_are_chosen_from_in_float32():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, twins("gpt2").ours)
    found = generate(half, prompts(ROWS, 13), max_new_tokens=NEW, repetition_penalty=1.1)
    assert found.dtype == jnp.int32 and len(np.unique(found)) > 5


# ---- streaming


@pytest.mark.parametrize(
    "options", [{"end_ids": ENDS}, {"key": jax.random.key(1)} | SAMPLED], ids=["greedy", "sampled"]
)
def test_a_stream_is_the_columns_of_the_result(options):
    ids, columns = prompts(ROWS, 13), []
    whole = ours("gpt2", ids, **options)
    streamed = ours("gpt2", ids, stream=columns.append, **options)
    np.testing.assert_array_equal(streamed, whole)
    assert all(isinstance(c, np.ndarray) and c.shape == (ROWS,) for c in columns)
    rest = np.full((ROWS, NEW - len(columns)), PAD)
    np.testing.assert_array_equal(np.concatenate([np.stack(columns, 1), rest], axis=1), whole)


def test_a_stream_stops_when_told_and_when_all_rows_have_ended():
    ids, seen = prompts(ROWS, 13), []

    def stop(tokens):
        seen.append(tokens)
        return len(seen) == 4

    whole = ours("gpt2", ids)
    np.testing.assert_array_equal(ours("gpt2", ids, stream=stop), np.where(np.arange(NEW) < 4, whole, PAD))
    assert len(seen) == 4
    seen.clear()
    ours("gpt2", ids[:1], end_ids=int(whole[0, 2]), stream=lambda tokens: seen.append(tokens))
    assert len(seen) == 1 + list(whole[0]).index(whole[0, 2])


# ---- programs


@pytest.fixture
def traced(monkeypatch):
    """How often a model was traced: twice a program, for the prompt and in the loop."""
    calls, step = [], type(twins("gpt2").ours).step

    def counted(self, *args, **kwargs):
        calls.append(args[0].shape)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(type(twins("gpt2").ours), "step", counted)
    return calls


def test_one_program_serves_all_lengths_of_a_bucket_and_all_numbers(traced):
    jax.clear_caches()
    model = twins("mistral").ours
    run = functools.partial(generate, model, max_new_tokens=3, repetition_penalty=1.1, end_ids=[5])
    run(prompts(2, 5))
    count = len(traced)
    assert count >= 2
    for length in (1, 8, 40, 64):
        run(prompts(2, length))
    run(prompts(2, 8), max_new_tokens=9)
    run(prompts(2, 8), end_ids=[6], repetition_penalty=1.7, padding_id=3)
    other = jax.tree.map(lambda x: x * 1.5 if eqx.is_inexact_array(x) else x, model)
    generate(other, prompts(2, 8), max_new_tokens=3, repetition_penalty=1.1, end_ids=[5])
    assert len(traced) == count
    run(prompts(2, 65))
    assert len(traced) == 2 * count


def test_a_cache_of_a_given_length_serves_all_that_fit(traced):
    jax.clear_caches()
    model = twins("mistral").ours
    free = [np.asarray(generate(model, prompts(2, n), max_new_tokens=20)) for n in (9, 30)]
    count = len(traced)
    fixed = [np.asarray(generate(model, prompts(2, n), max_new_tokens=20, cache_length=50)) for n in (9, 30)]
    np.testing.assert_array_equal(fixed, free)
    assert len(traced) == 2 * count


def test_the_cache_is_written_in_place():
    """The compiled loop holds no copy of a whole layer's keys, which would cost as much as reading them all again."""
    model = twins("gpt2").ours
    heads, width = 3, 7
    ids, real = jnp.zeros((ROWS, 64), jnp.int32), jnp.ones((ROWS, 64), bool)
    from eqx_transformers.generation.request import ends_of, number

    given = (model, ids, real, 128, number(9, np.int32), (), ends_of(None, None), None)
    text = loop.run.lower(*given).compile().compiled.as_text()
    layer = f"f32[{ROWS},{heads},128,{width}]"
    computations = text.split("\n\n")
    body = [c for c in computations if "dynamic-update-slice" in c and layer in c and "while/body" in c]
    copies = [line for c in body for line in c.splitlines() if f"= {layer}" in line and " copy(" in line]
    assert body and not [line for line in copies if "while/body" in line]


# ---- errors


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"token_ids": np.zeros(3, np.int32)},
            r"token_ids must be 'batch seq', but it is \(3,\): give token_ids\[None\]",
        ),
        ({"token_ids": np.zeros((1, 2, 3), np.int32)}, r"must be 'batch seq', but it is \(1, 2, 3\)"),
        ({"token_ids": np.zeros((2, 0), np.int32)}, r"token_ids is empty, \(2, 0\)"),
        ({"token_ids": np.zeros((2, 3), np.float32)}, "token_ids must be integers, but it is float32"),
        (
            {"attention_mask": np.ones((2, 2), bool)},
            r"attention_mask must be as token_ids, \(2, 3\), but it is \(2, 2\)",
        ),
        ({"attention_mask": np.ones((2, 3))}, "attention_mask must hold 0 and 1"),
        ({"attention_mask": np.full((2, 3), 2)}, "attention_mask must hold 0 and 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1, but it is 0"),
        (
            {"max_new_tokens": ROOM},
            r"The longest prompt has 3 tokens and max_new_tokens = 41.*takes 43 positions, but the",
        ),
        (
            {"cache_length": 9, "max_new_tokens": 7},
            "cache_length = 9 is too short: .* 3 tokens and .* 7, which takes 10",
        ),
        ({"end_ids": [3, -1]}, "end_ids must be token ids, whole numbers from 0, but there is -1"),
        ({"end_ids": 2.5}, "end_ids must be token ids, whole numbers from 0, but there is 2.5"),
        ({"padding_id": -100}, "padding_id must be token ids"),
        ({"min_new_tokens": -1}, "min_new_tokens must be a whole number, at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be more than 0, but it is 0.0"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram must be a whole number, at least 1"),
        ({"temperature": 0.0, "key": jax.random.key(0)}, r"temperature must be more than 0 \(without a key, the best"),
        ({"top_k": 0, "key": jax.random.key(0)}, "top_k must be a whole number, at least 1"),
        ({"top_p": 0.0, "key": jax.random.key(0)}, "top_p must be more than 0 and at most 1"),
        ({"top_p": 1.1, "key": jax.random.key(0)}, "top_p must be more than 0 and at most 1, but it is 1.1"),
        ({"min_p": 2, "key": jax.random.key(0)}, "min_p must be from 0 to 1"),
        ({"temperature": 0.5, "top_k": 3}, "temperature, top_k: no effect here, for without a key the best token"),
        ({"length_penalty": 2.0}, "length_penalty: no effect here, for beams = 1"),
        ({"beams": 0}, "beams must be a whole number, at least 1"),
        ({"beams": 2, "key": jax.random.key(0)}, "key: no effect here, for beams = 2 search"),
        ({"beams": 2, "early_stopping": "soon"}, "early_stopping must be True, False or 'never', but it is 'soon'"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_error(given, said, traced):
    given = {"token_ids": np.full((2, 3), 5), "max_new_tokens": 4} | given
    with pytest.raises(ValueError, match=said):
        generate(twins("gpt2").ours, given.pop("token_ids"), **given)
    assert not traced


@pytest.mark.usefixtures("unchecked")
def test_under_jit_the_error_says_where_to_call_it():
    with pytest.raises(ValueError, match=r"token_ids is being traced.*call it outside of jit"):
        jax.jit(lambda ids: generate(twins("gpt2").ours, ids, max_new_tokens=2))(prompts(1, 3))


def test_stacked_blocks_are_refused():
    with pytest.raises(ValueError, match=r"The blocks are stacked.*unstack"):
        generate(stack(twins("gpt2").ours), prompts(1, 3), max_new_tokens=2)


@pytest.mark.parametrize(
    "options", [{}, {"beams": 2}, {"stream": lambda tokens: None}], ids=["greedy", "beams", "stream"]
)
def test_scores_that_are_not_numbers_are_an_error(options):
    ids = prompts(2, 3)
    ids[1, 1] = VOCAB + 4
    with pytest.raises(ValueError, match="scores are NaN: a token id outside"):
        ours("gpt2", ids, **options)
