"""Beam search against transformers', token for token and score for score."""

import itertools

import numpy as np
import pytest
import torch

from eqx_transformers import Beams, beam_search, generate

from ..full import FULL
from .twins import ENDS, PAD, ROOM, VOCAB, padded, prompts, reference, twins

NEW = 13
ROWS = 3
LENGTH_PENALTIES = (-1.0, 0.0, 1.0, 2.5)
STOPPING = (False, True, "never")


def both(name, ids, mask, beams, ends, length_penalty, early_stopping, **more):
    """Our tokens and transformers'."""
    theirs = {"no_repeat_ngram_size" if k == "no_repeat_ngram" else k: v for k, v in more.items()}
    rule = {"length_penalty": length_penalty, "early_stopping": early_stopping} if beams > 1 else {}
    twin = twins(name)
    options = {"max_new_tokens": NEW, "padding_id": PAD, "end_ids": ends}
    found = generate(twin.ours, ids, attention_mask=mask, beams=beams, **options, **rule, **more)
    wanted = reference(twin.torch, ids, mask, ends=ends, num_beams=beams, max_new_tokens=NEW, **rule, **theirs)
    return np.asarray(found), wanted


@pytest.mark.parametrize("ends", [2, ENDS], ids=["one end", "three ends"])
@pytest.mark.parametrize("beams", [1, 2, 3, 4])
def test_beam_search_is_transformers_token_for_token(beams, ends):
    every = list(itertools.product(STOPPING, enumerate(LENGTH_PENALTIES)))
    for early_stopping, (seed, length_penalty) in every if FULL else every[beams % 6 :: 6]:
        ids, mask = padded(ROWS, 11, seed)
        found, wanted = both("gpt2", ids, mask, beams, ends, length_penalty, early_stopping)
        np.testing.assert_array_equal(found, wanted, f"{length_penalty=} {early_stopping=}")


def test_the_options_change_what_is_found():
    """Otherwise the test above would say little."""
    ids, mask = padded(ROWS, 11)
    search = lambda **rule: np.asarray(
        generate(twins("gpt2").ours, ids, attention_mask=mask, max_new_tokens=NEW, end_ids=ENDS, padding_id=PAD, **rule)
    ).tobytes()
    found = [search()] + [search(beams=b, length_penalty=p) for b in (2, 4) for p in LENGTH_PENALTIES]
    found += [search(beams=4, early_stopping=e) for e in STOPPING]
    assert len(set(found)) >= 6


@pytest.mark.parametrize("name", ["mistral", "roberta", "t5", "umt5"])
def test_other_families_and_no_end(name):
    ids, mask = padded(ROWS, 11)
    np.testing.assert_array_equal(*both(name, ids, mask, 3, None, 1.0, False))


def test_processors_act_on_log_probabilities():
    ids = prompts(ROWS, 11)
    more = {"repetition_penalty": 1.3, "no_repeat_ngram": 2, "min_new_tokens": 5}
    np.testing.assert_array_equal(*both("gpt2", ids, None, 3, ENDS, 1.0, False, **more))


@pytest.mark.parametrize("length_penalty", [0.0, 1.7])
def test_all_sequences_and_their_scores(length_penalty):
    ids, mask = padded(ROWS, 11)
    rule = {"length_penalty": length_penalty, "early_stopping": True}
    found = beam_search(
        twins("gpt2").ours, ids, attention_mask=mask, max_new_tokens=NEW, beams=3, end_ids=ENDS, padding_id=PAD, **rule
    )
    model = twins("gpt2").torch
    with torch.inference_mode():
        wanted = model.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=NEW,
            num_beams=3,
            num_return_sequences=3,
            eos_token_id=ENDS,
            pad_token_id=PAD,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **rule,
        )
    tokens = wanted.sequences[:, ids.shape[1] :].numpy().reshape(ROWS, 3, -1)
    tokens = np.pad(tokens, ((0, 0), (0, 0), (0, NEW - tokens.shape[-1])), constant_values=PAD)
    assert isinstance(found, Beams) and found.tokens.dtype == np.int32
    np.testing.assert_array_equal(np.asarray(found.tokens), tokens)
    np.testing.assert_allclose(np.asarray(found.scores).ravel(), wanted.sequences_scores.numpy(), rtol=2e-5)


def test_one_beam_is_greedy():
    ids, mask = padded(ROWS, 11)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "end_ids": ENDS, "padding_id": PAD}
    model = twins("gpt2").ours
    found = beam_search(model, ids, beams=1, early_stopping=True, **options).tokens[:, 0]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(generate(model, ids, **options)))


def test_rows_alone_find_the_same():
    ids, mask = padded(ROWS, 11)
    options = {"max_new_tokens": NEW, "end_ids": ENDS, "beams": 3, "padding_id": PAD}
    together = np.asarray(generate(twins("gpt2").ours, ids, attention_mask=mask, **options))
    for row, m, found in zip(ids, mask, together, strict=True):
        np.testing.assert_array_equal(np.asarray(generate(twins("gpt2").ours, row[m == 1][None], **options))[0], found)


def test_full_prompts_and_rows_of_padding_alone_are_finite():
    ids, mask = prompts(ROWS, ROOM - NEW + 1), np.ones((ROWS, ROOM - NEW + 1), bool)
    mask[1] = False
    options = {"attention_mask": mask, "max_new_tokens": NEW, "end_ids": ENDS, "padding_id": PAD}
    found = beam_search(twins("gpt2").ours, ids, beams=3, **options)
    assert np.isfinite(found.scores).all() and (np.asarray(found.tokens) < VOCAB).all()


def test_too_many_ends_for_the_vocabulary():
    with pytest.raises(ValueError, match="61 end tokens leave no other one to go on with, of a vocabulary of 61"):
        generate(twins("gpt2").ours, prompts(1, 3), max_new_tokens=2, beams=2, end_ids=list(range(VOCAB)))
