"""Laws of `generate`: transformers' tokens, every row as if it were alone, few programs, clear errors."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import CausalLM, generate, stack
from eqx_transformers.generation import loop
from eqx_transformers.generation.request import ends_of, number
from eqx_transformers.generation.turned import FusedAttention, TurnedEmbedding, TurnedLinear, for_rows

from ..full import FULL
from ..models.ours import call, make
from .twins import ENDS, PAD, ROOM, VOCAB, padded, prompts, reference, twins

NEW = 17
ROWS = 3
MODELS = ["gpt2", "mistral", "roberta", "t5", "umt5"]


def ours(name, ids, mask=None, **options):
    options = {"max_new_tokens": NEW, "padding_id": PAD} | options
    return np.asarray(generate(twins(name).ours, ids, attention_mask=mask, **options))


def theirs(name, ids, mask=None, **options):
    return reference(twins(name).torch, ids, mask, **{"max_new_tokens": NEW} | options)


# One program serves all lengths: of models whose encoder reads the prompt, one of them says enough.
LENGTHS = [(name, n) for name in MODELS for n in (1, 2, 13) if FULL or n == 13 or name in ("gpt2", "mistral")]


@pytest.mark.parametrize(("name", "length"), LENGTHS)
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


@pytest.mark.parametrize("name", ["gpt2", "mistral", "t5"])
def test_penalties_and_minimum_length_are_transformers(name):
    for seed in range(3):
        ids = prompts(ROWS, 13, seed)
        found = ours(name, ids, end_ids=ENDS, no_repeat_ngram=2, **PENALTIES)
        wanted = theirs(name, ids, ends=ENDS, no_repeat_ngram_size=2, **PENALTIES)
        np.testing.assert_array_equal(found, wanted)
        assert not np.isin(found[:, :6], ENDS).any()


def elsewhere(ids, mask):
    """The same rows with their padding on the right, and with it in between."""
    scattered = np.random.default_rng(0).permuted(mask, axis=1)
    apart = np.full_like(ids, PAD)
    apart[scattered == 1] = ids[mask == 1]
    right = np.stack([np.roll(row, m.sum()) for row, m in zip(ids, mask, strict=True)])
    return (right, mask[:, ::-1].astype(bool)), (apart, scattered)


@pytest.mark.parametrize("name", MODELS if FULL else MODELS[:-1])
def test_a_row_is_what_it_is_alone_wherever_its_padding_stands(name):
    ids, mask = padded(ROWS, 13)
    options = {"end_ids": ENDS, "no_repeat_ngram": 2, **PENALTIES}
    alone = np.concatenate([ours(name, row[m == 1][None], **options) for row, m in zip(ids, mask, strict=True)])
    for given in ((ids, mask), *elsewhere(ids, mask)):
        np.testing.assert_array_equal(ours(name, *given, **options), alone)


@pytest.mark.parametrize("family", ["haiku", "functional"])
def test_each_token_is_the_best_of_the_plain_model(family):
    """Of families that transformers does not have: a call of prompt and new tokens at once says the same."""
    model, prompt = make(CausalLM, family), prompts(1, 5)
    found = np.asarray(generate(model, prompt, max_new_tokens=NEW))
    scores = np.asarray(call(model, np.append(prompt, found, axis=1)[0, :-1]))
    np.testing.assert_array_equal(found[0], scores[4:].argmax(-1))
    assert len(np.unique(found)) > 3


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

    rows, name = 1024, "gpt2"
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


@pytest.mark.parametrize("name", MODELS if FULL else ["gpt2", "t5"])
def test_rows_of_padding_alone_are_finite_and_change_no_other(name):
    ids, mask = padded(ROWS, 13)
    whole = ours(name, ids, mask, end_ids=ENDS)
    mask[1] = 0
    found = ours(name, ids, mask, end_ids=ENDS)
    assert ((found >= 0) & (found < VOCAB)).all()
    np.testing.assert_array_equal(found[[0, 2]], whole[[0, 2]])


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
    model = twins("gpt2").ours
    fixed = {"max_new_tokens": 3, "repetition_penalty": 1.1, "end_ids": [5], "no_repeat_ngram": 9}  # unlike any other
    run = lambda length, model=model, **more: generate(model, prompts(2, length), **(fixed | more))
    run(5)
    count = len(traced)
    assert count >= 2
    for length in (1, 8, ROOM - 2):
        run(length)
    run(8, max_new_tokens=9)
    run(8, end_ids=[6], repetition_penalty=1.7, padding_id=3)
    run(8, jax.tree.map(lambda x: x * 1.5 if eqx.is_inexact_array(x) else x, model))
    assert len(traced) == count
    mistral = functools.partial(run, model=twins("mistral").ours)  # it has no table of positions to end
    for length in (64, 65, 100):
        mistral(length)
    assert len(traced) == 3 * count


def test_a_cache_of_a_given_length_serves_all_that_fit(traced):
    ids, model = prompts(ROWS, 30), twins("gpt2").ours
    given = [(9, 11), (30, 11), (17, 12), (3, 13)]
    free = [np.asarray(generate(model, ids[:, :n], max_new_tokens=new, end_ids=ENDS)) for n, new in given]
    traced.clear()
    for (n, new), wanted in zip(given, free, strict=True):
        found = generate(model, ids[:, :n], max_new_tokens=new, end_ids=ENDS, cache_length=63)
        np.testing.assert_array_equal(found, wanted)
    assert len(traced) == 2
    assert generate(model, ids[:, :30], max_new_tokens=11, cache_length=41).shape == (ROWS, 11)  # just enough


def test_a_few_rows_run_on_turned_matrices():
    """On a CPU, where they are turned: what the batches above have run on, and single rows have not."""
    model = twins("mistral").ours
    is_turned = lambda node: isinstance(node, TurnedLinear | TurnedEmbedding)
    turned = lambda rows: sum(map(is_turned, jax.tree.leaves(for_rows(model, rows), is_leaf=is_turned)))
    few = 2 * 8 + 2 if jax.default_backend() == "cpu" else 0  # of both blocks, and one of three; tokens and output
    assert [turned(rows) for rows in (1, 2, 32, 33)] == [0, few, few, 0]
    for part in (lambda m: m.backbone.stack.blocks[0].mlp.down_proj, lambda m: m.head.decoder):
        old, new = part(model), part(for_rows(model, 3))
        x = jax.random.normal(jax.random.key(0), (3, 5, old.in_features))
        np.testing.assert_allclose(new(x), old(x), rtol=0, atol=1e-5)
        assert new.weight.shape == (new.out_features, new.in_features) == old.weight.shape
        np.testing.assert_array_equal(new.weight, old.weight)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "t5"])
def test_queries_keys_and_values_of_a_step_are_one_product(name):
    """With biases, shared heads and rotations, and the same cache and memory afterwards."""
    model, ids = twins(name).ours, prompts(1, 5)[0]
    cache = model.init_cache(*((model.encode(ids),) if name == "t5" else ()), 9)
    is_fused = lambda node: isinstance(node, FusedAttention)
    turned = for_rows(model, 3)
    fused = sum(map(is_fused, jax.tree.leaves(turned, is_leaf=is_fused)))
    assert fused == (0 if jax.default_backend() != "cpu" else {"t5": 6}.get(name, 2))
    for (a, b), (c, d) in (
        (model.step(ids, cache), turned.step(ids, cache)),
        (model.step(ids[:1], cache), turned.step(ids[:1], cache)),
    ):
        np.testing.assert_allclose(c, a, rtol=0, atol=2e-5 * max(1, np.abs(a).max()))
        for x, y in zip(jax.tree.leaves(d), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(1, np.abs(y).max()))


class Wrapped(eqx.Module):
    inner: eqx.Module

    @property
    def out_features(self):
        return self.inner.out_features

    def __call__(self, x):
        return self.inner(x)


def test_what_is_no_plain_matrix_is_not_fused():
    """An adapter, say: it keeps its own call."""
    model = twins("mistral").ours
    first = lambda m: m.backbone.stack.blocks[0].attention.key_proj
    edited = eqx.tree_at(first, model, Wrapped(first(model)))
    is_fused = lambda node: isinstance(node, FusedAttention)
    fused = lambda m: sum(map(is_fused, jax.tree.leaves(for_rows(m, 3), is_leaf=is_fused)))
    assert (fused(model), fused(edited)) == ((2, 1) if jax.default_backend() == "cpu" else (0, 0))
    np.testing.assert_array_equal(
        generate(edited, prompts(2, 5), max_new_tokens=4), generate(model, prompts(2, 5), max_new_tokens=4)
    )


def test_a_tied_table_is_turned_for_its_scores_alone(unchecked):
    model = twins("gpt2").ours
    old, new = model.backbone.embedding.tokens, for_rows(model, 3).backbone.embedding.tokens
    assert (new.vocab_size, new.embed_dim) == (old.vocab_size, old.embed_dim) and new.weight is old.weight
    ids = prompts(2, 5)
    np.testing.assert_array_equal(new(jnp.asarray(ids)), old(jnp.asarray(ids)))
    x = jax.random.normal(jax.random.key(0), (3, 5, old.embed_dim))
    np.testing.assert_allclose(new.attend(x), old.attend(x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="embed_dim"):
        new.attend(x[..., :-1])


def moved(text, shape):
    """Lines of a compiled program, but for its entry, that copy or turn an array of this shape."""
    bodies = [part for part in text.split("\n\n") if not part.lstrip().startswith("ENTRY")]
    lines = [line for part in bodies for line in part.splitlines() if f"= {shape}" in line]
    assert any("dynamic-update-slice(" in line for line in lines)
    return [line for line in lines if " copy(" in line or " transpose(" in line]


def test_the_cache_is_written_in_place():
    """A copy of a layer's keys a token would cost as much as reading all of them once more."""
    ids, real = jnp.zeros((ROWS, 64), jnp.int32), jnp.ones((ROWS, 64), bool)
    given = (loop.Prompt(ids, real, None, 64, 128), number(9, np.int32), (), ends_of(None, None), None)
    program = loop.run.lower(twins("gpt2").ours, *given).compile().compiled.as_text()
    assert moved(program, f"f32[{ROWS},3,128,7]") == []


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
        (
            {"token_ids": np.full((2, 3), 2**32 + 5)},
            "token_ids must be numbers of tokens, from 0, but there is 4294967301",
        ),
        ({"token_ids": np.zeros((2, 3), np.float32)}, "token_ids must be integers, but it is float32"),
        (
            {"attention_mask": np.ones((2, 2), bool)},
            r"attention_mask must be as token_ids, \(2, 3\), but it is \(2, 2\)",
        ),
        ({"attention_mask": np.ones((2, 3))}, "attention_mask must be bool or integers.*float64"),
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
        ({"cache_length": "100"}, "cache_length must be a whole number, at least 1, but it is '100'"),
        ({"temperature": 1e-40, "key": jax.random.key(0)}, "temperature must be more than 0"),
        ({"temperature": None, "key": jax.random.key(0)}, "temperature must be more than 0.*None"),
        ({"repetition_penalty": None}, "repetition_penalty must be more than 0, but it is None"),
        ({"top_p": ".9", "key": jax.random.key(0)}, "top_p must be more than 0 and at most 1, but it is '.9'"),
        ({"key": 0}, r"key must be one random key, jax.random.key\(…\), but it is int"),
        ({"stream": 3}, "stream must be a function of the next tokens, but it is 3"),
        ({"end_ids": 2**40}, "end_ids must be token ids, whole numbers from 0, but there is 1099511627776"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty must be a number, but it is nan"),
        ({"beams": 2, "early_stopping": 1}, "early_stopping must be True, False or 'never', but it is 1"),
        ({"end_ids": [3, -1]}, "end_ids must be token ids, whole numbers from 0, but there is -1"),
        ({"end_ids": 2.5}, "end_ids must be token ids, whole numbers from 0, but there is 2.5"),
        ({"padding_id": -100}, "padding_id must be token ids"),
        ({"min_new_tokens": -1}, "min_new_tokens must be a whole number, at least 0"),
        ({"min_new_tokens": 2}, "min_new_tokens = 2: no effect here, for nothing ends a row: give end_ids"),
        ({"end_ids": [3, VOCAB]}, "end_ids: there is 61, but the model has 61 tokens, from 0 on"),
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
    with pytest.raises(ValueError, match=r"model is being traced.*call it outside of jit"):
        eqx.filter_jit(lambda model: generate(model, prompts(1, 3), max_new_tokens=2))(twins("gpt2").ours)


@pytest.mark.parametrize("model", [None, twins("gpt2").ours.backbone], ids=["none", "backbone"])
def test_what_has_no_scores_is_refused(model):
    with pytest.raises(ValueError, match=r"generate needs a model with scores of the next token.*CausalLM\.of"):
        generate(model, prompts(1, 3), max_new_tokens=2)


@pytest.mark.parametrize("options", [{}, {"beams": 2}], ids=["greedy", "beams"])
def test_where_every_token_is_forbidden_nothing_is_made_up(options):
    """No token twice, and more new tokens than there are others: transformers repeats token 0."""
    with pytest.raises(ValueError, match="no_repeat_ngram forbids every token that is left"):
        generate(twins("mistral").ours, prompts(1, 3), max_new_tokens=VOCAB, no_repeat_ngram=1, **options)


def test_stacked_blocks_are_refused():
    with pytest.raises(ValueError, match=r"The blocks are stacked.*unstack"):
        generate(stack(twins("gpt2").ours), prompts(1, 3), max_new_tokens=2)


@pytest.mark.parametrize(
    "options", [{}, {"beams": 2}, {"stream": lambda tokens: None}], ids=["greedy", "beams", "stream"]
)
def test_scores_that_are_not_numbers_are_an_error(options):
    ids = prompts(2, 3)
    ids[1, 1] = VOCAB + 4
    with pytest.raises(ValueError, match=r"scores are NaN \(a token id outside"):
        ours("gpt2", ids, **options)
