"""What is hidden, how much of it, and that nothing else is touched."""

import functools

import numpy as np
import pytest

from eqx_transformers.training.batching import Buckets
from eqx_transformers.training.corruption import corrupt_batch, corrupt_spans, corrupted_lengths, mask_tokens
from eqx_transformers.training.data import Batches
from eqx_transformers.training.packing import Packed

from ..full import FULL

PAD, BEGIN, END, MASK, VOCAB = 0, 1, 2, 3, 61
SPECIAL = (PAD, BEGIN, END)
COUNT = 4001 if FULL else 2001  # the last batch is not full
rng = np.random.default_rng(0)
TEXTS = [[BEGIN, *rng.integers(4, VOCAB, n).tolist(), END] for n in rng.integers(3, 40, COUNT)]
# Every second token begins a word.
STARTS = np.arange(VOCAB) % 2 == 0
mask = functools.partial(mask_tokens, vocab_size=VOCAB, mask_id=MASK, special_ids=SPECIAL)
SENTINELS = range(99, 79, -1)


def pairs(**options):
    """All batches of an epoch, before and after."""
    layout = options.pop("layout", Buckets(batch_size=32))
    plain = Batches(TEXTS, layout, padding_id=PAD, epochs=1)
    hidden = Batches(TEXTS, layout, padding_id=PAD, epochs=1, transform=functools.partial(mask, **options))
    return [(plain[i], hidden[i]) for i in range(len(plain))]


def flat(given, name):
    return np.concatenate([x[name].ravel() for x in given])


def near(count, total, share, tokens_together=1.0):
    """Within 5 sigma of a binomial; of words of several tokens, which are drawn together, it is wider."""
    sigma = np.sqrt(total * share * (1 - share) * tokens_together)
    assert abs(count - total * share) < 5 * sigma, (count / total, share)


# ---- single tokens


@pytest.mark.parametrize("words", [None, STARTS], ids=["tokens", "words"])
@pytest.mark.parametrize("options", [{}, {"rate": 0.4, "split": (0.5, 0.3, 0.2)}], ids=["default", "other"])
def test_shares_of_what_is_hidden(words, options):
    found = pairs(words=words, **options)
    rate, split = options.get("rate", 0.15), options.get("split", (0.8, 0.1, 0.1))
    before, after, targets = (flat([pair[i] for pair in found], name) for i, name in PARTS)
    ordinary = ~np.isin(before, SPECIAL)
    chosen = targets != -100
    assert not (chosen & ~ordinary).any() and (targets[chosen] == before[chosen]).all()
    assert (before[~chosen] == after[~chosen]).all() and not np.isin(after[chosen], SPECIAL).any()
    near(chosen.sum(), ordinary.sum(), rate, 1 if words is None else 3)  # of words, E(length²) / E(length) is 3
    masked, kept = after[chosen] == MASK, after[chosen] == before[chosen]
    near(masked.sum(), chosen.sum(), split[0])
    # What is drawn may be what was there.
    same = split[1] / (VOCAB - 4)
    near(kept.sum(), chosen.sum(), split[2] + same)
    drawn = after[chosen][~masked & ~kept]
    assert set(drawn.tolist()) == set(range(4, VOCAB))
    counts = np.bincount(drawn, minlength=VOCAB)[4:]
    assert (np.abs(counts - counts.mean()) < 5.5 * np.sqrt(counts.mean())).all()


PARTS = [(0, "token_ids"), (1, "token_ids"), (1, "targets")]


@pytest.mark.parametrize("layout", [Buckets(batch_size=32), Packed(16, 64)], ids=["buckets", "packed"])
def test_words_are_hidden_whole_or_not_at_all(layout):
    for before, after in pairs(words=STARTS, rate=0.3, layout=layout):
        chosen, ids = after["targets"] != -100, before["token_ids"]
        segments = before.get("segment_ids", np.ones_like(ids))
        begins = STARTS[ids] | np.isin(ids, SPECIAL)
        for row in range(len(ids)):
            for i in range(1, ids.shape[1]):
                inside = not begins[row, i] and ids[row, i - 1] not in SPECIAL
                if inside and segments[row, i] == segments[row, i - 1]:
                    assert chosen[row, i] == chosen[row, i - 1]


def test_words_that_follow_each_other_are_drawn_apart():
    ids = np.tile(np.array([[BEGIN, 5, 6, 8, 7, END]], np.int32), (400, 1))  # 5 | 6 | 8 7
    batch = {"token_ids": ids, "attention_mask": np.ones_like(ids), "weights": np.ones(400, np.float32)}
    chosen = mask(batch, np.random.default_rng(0), words=STARTS, rate=0.5)["targets"] != -100
    assert not chosen[:, [0, 5]].any() and (chosen[:, 3] == chosen[:, 4]).all()
    for one, other in ((1, 2), (2, 3)):
        near((chosen[:, one] == chosen[:, other]).sum(), 400, 0.5)


def test_rows_that_fill_are_never_touched_and_the_generator_decides_all():
    found = pairs()
    filled = [after for before, after in found if (before["weights"] == 0).any()]
    assert filled and all((after["targets"][after["weights"] == 0] == -100).all() for after in filled)
    before = found[0][0]
    kept = {name: x.copy() for name, x in before.items()}
    one, same, other = (mask(before, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all((before[name] == kept[name]).all() for name in kept)
    assert (one["token_ids"] == same["token_ids"]).all() and (one["targets"] != other["targets"]).any()
    assert one["token_ids"].dtype == one["targets"].dtype == np.int32


def test_shares_that_cannot_be(unchecked):
    batch = pairs()[0][0]
    with pytest.raises(ValueError, match="rate = 0 must be above 0"):
        mask(batch, rng, rate=0)
    with pytest.raises(ValueError, match="whose sum is 1"):
        mask(batch, rng, split=(0.8, 0.1, 0.2))
    with pytest.raises(ValueError, match="words has 5 entries, one a token of the vocabulary, but there is a token"):
        mask(batch, rng, words=np.ones(5, bool))


# ---- spans


def restored(inputs, targets):
    """The text that inputs and targets are made of, and the lengths of its spans."""
    spans, out, sizes = {}, [], []
    for x in targets[:-1]:
        if x in SENTINELS:
            spans[current := x] = []
        else:
            spans[current].append(x)
    for x in inputs[:-1]:
        out += spans[x] if x in SENTINELS else [x]
        sizes += [len(spans[x])] if x in SENTINELS else []
    return out, sizes


@pytest.mark.parametrize("rate, mean", [(0.15, 3.0), (0.5, 2.0), (0.15, 1.0)])
def test_spans_go_into_sentinels_in_order(rate, mean):
    for n in range(1, 60 if mean > 1 else 40):
        ids = rng.integers(4, VOCAB, n).astype(np.int32)
        inputs, targets = corrupt_spans(ids, rng, sentinels=SENTINELS, eos=END, rate=rate, mean_length=mean)
        text, sizes = restored(inputs, targets)
        assert text == ids.tolist() and inputs[-1] == targets[-1] == END
        assert (len(inputs), len(targets)) == corrupted_lengths(n, rate, mean)
        hidden = min(max(round(n * rate), 1), n - 1)
        assert sum(sizes) == hidden and len(sizes) == min(max(round(hidden / mean), 1), hidden, n - hidden)
        assert [x for x in inputs if x in SENTINELS] == list(SENTINELS[: len(sizes)])
        assert [x for x in targets if x in SENTINELS] == list(SENTINELS[: len(sizes)])


def test_span_lengths_are_all_partitions_alike():
    ids = np.arange(4, 44)  # 6 tokens are hidden, in 2 spans: of 1 and 5, 2 and 4, ... alike
    draw = lambda: restored(*corrupt_spans(ids, rng, sentinels=SENTINELS, eos=END))[1]
    count = 2000 if FULL else 500
    first = np.bincount([draw()[0] for _ in range(count)], minlength=6)
    assert first[0] == 0 and first.sum() == count
    for size in range(1, 6):
        near(first[size], count, 0.2)


def test_a_text_begins_with_what_stays_and_ends_in_a_span():
    ids = np.array([10, 11, 12, 13, 14, 15, 16])
    inputs, targets = corrupt_spans(ids, rng, sentinels=[99, 98], eos=END, rate=0.45, mean_length=1.5)
    assert inputs[0] == 10 and inputs[-2:].tolist() == [98, END]
    assert targets[0] == 99 and targets[-2:].tolist() == [16, END]


def test_batches_of_spans_have_few_shapes_and_what_the_decoder_reads():
    texts = [text[1:] for text in TEXTS[:200]]  # as T5's tokenizer gives them: with an end token
    corrupt = functools.partial(corrupt_batch, sentinels=SENTINELS, eos=END, start_id=PAD, padding_id=PAD)
    columns = {"labels": np.arange(len(texts))}
    found = Batches(texts, Buckets(batch_size=16), padding_id=PAD, columns=columns, transform=corrupt, epochs=1)
    shapes = set()
    for batch in found:
        shapes.add((batch["token_ids"].shape, batch["targets"].shape))
        assert {x.dtype.name for x in batch.values()} == {"int32", "float32"}
        read, targets = batch["decoder_token_ids"], batch["targets"]
        assert (read[:, 0] == PAD).all() and (read[:, 1:] == np.where(targets[:, :-1] < 0, PAD, targets[:, :-1])).all()
        assert (batch["attention_mask"] == (np.cumsum(batch["token_ids"][:, ::-1] == END, 1)[:, ::-1] > 0)).all()
        for row in np.flatnonzero(batch["weights"]):
            inputs = batch["token_ids"][row][batch["attention_mask"][row] != 0].tolist()
            assert restored(inputs, targets[row][targets[row] >= 0].tolist())[0] == texts[batch["labels"][row]][:-1]
    assert len(shapes) <= len(found.shapes)
    again = found[0]
    assert all((again[name] == found[0][name]).all() for name in again)


def test_spans_that_cannot_be(unchecked):
    spans = functools.partial(corrupt_spans, rng=rng, eos=END)
    with pytest.raises(ValueError, match="40 tokens have 2 spans, but there are 1 sentinels: cut the text"):
        spans(np.arange(40), sentinels=[99])
    with pytest.raises(ValueError, match=r"rate = 1\.5 must be between 0 and 1"):
        spans(np.arange(40), sentinels=SENTINELS, rate=1.5)
    with pytest.raises(ValueError, match="at least one token"):
        spans(np.arange(0), sentinels=SENTINELS)
    packed = Batches(TEXTS[:50], Packed(8, 64), padding_id=PAD)[0]
    with pytest.raises(ValueError, match="rows are packed, and spans would reach from text to text"):
        corrupt_batch(packed, rng, sentinels=SENTINELS, eos=END, start_id=PAD, padding_id=PAD)
