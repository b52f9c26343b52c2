"""Plans of epochs: every text once, few shapes, the same number of batches, and an order that the seed decides."""

import re

import numpy as np
import pytest

from eqx_transformers.encode import bucket_lengths
from eqx_transformers.training.batching import Buckets
from eqx_transformers.training.packing import Packed, Windows, pack

LENGTHS = np.random.default_rng(0).gamma(3.0, 6.0, 500).astype(int) + 1
generator = lambda epoch: np.random.default_rng([7, epoch])


def texts_of(epoch):
    return np.concatenate([planned.texts[planned.sizes > 0] for planned in epoch])


def same(one, other):
    return all(np.array_equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True))


LAYOUTS = {
    "buckets": Buckets(batch_size=16),
    "one bucket": Buckets(batch_size=7, max_shapes=1),
    "lengths": Buckets(batch_size=16, lengths=(8, 32, 200)),
    "tokens": Buckets(batch_tokens=512),
    "packed": Packed(8, 128),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_text_is_there_once_an_epoch(name):
    layout = LAYOUTS[name]
    arranged = layout.arranged(LENGTHS)
    epochs = [arranged.epoch(generator(epoch)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(texts_of(epoch).tolist()) == list(range(len(LENGTHS)))
        assert len(epoch) == arranged.per_epoch
        assert {(len(planned.texts), planned.length) for planned in epoch} == set(arranged.shapes)
        starts = np.cumsum([0, *LENGTHS])
        for planned in epoch:
            real = planned.sizes > 0
            assert (planned.sizes.sum(1) <= planned.length).all() and (planned.texts[~real] == -1).all()
            assert (planned.starts[real] == starts[planned.texts[real]]).all()
            assert (planned.sizes[real] == LENGTHS[planned.texts[real]]).all()
    assert len(arranged.shapes) <= 8 and len(set(arranged.shapes)) == len(arranged.shapes)
    assert same(epochs[0], layout.arranged(LENGTHS).epoch(generator(0)))
    assert not same(epochs[0], epochs[1])
    assert same(arranged.epoch(None), arranged.epoch(None))


def test_texts_and_batches_are_both_shuffled():
    arranged = Buckets(batch_size=16).arranged(LENGTHS)
    lengths = [[planned.length for planned in arranged.epoch(generator(epoch))] for epoch in range(2)]
    assert lengths[0] != lengths[1] and lengths[0] != sorted(lengths[0])
    together = lambda epoch: {frozenset(planned.texts.ravel().tolist()) for planned in arranged.epoch(generator(epoch))}
    assert len(together(0) & together(1)) <= 1
    planned = arranged.epoch(None)
    assert [x.length for x in planned] == sorted((x.length for x in planned), reverse=True)


def test_buckets_compute_fewer_tokens_than_one_length_and_count_what_fills():
    cost = lambda layout: sum(p.texts.size * p.length for p in layout.arranged(LENGTHS).epoch(None))
    costs = [cost(Buckets(batch_size=16, max_shapes=most)) for most in (1, 2, 4, 8)]
    assert costs == sorted(costs, reverse=True) and costs[-1] < 1.3 * LENGTHS.sum() < costs[0] / 2
    few = Buckets(batch_size=16).arranged(LENGTHS[:10])  # one batch: more buckets would only add rows that fill
    assert few.shapes == [(16, LENGTHS[:10].max())]
    chosen = [length for _, length in Buckets(batch_size=4).arranged(LENGTHS).shapes]
    assert chosen == bucket_lengths(LENGTHS, len(chosen))[::-1]


def test_short_texts_come_in_batches_of_more_rows():
    arranged = Buckets(batch_tokens=512, lengths=(8, 32, 200)).arranged(LENGTHS, processes=2)
    assert arranged.shapes == [(2, 200), (16, 32), (64, 8)]
    assert Buckets(batch_tokens=100, lengths=(200,)).arranged(LENGTHS, processes=2).shapes == [(2, 200)]


def test_what_remains_is_filled_or_dropped():
    filled, dropped = (Buckets(batch_size=16, lengths=(20, 200), remainder=x) for x in ("fill", "drop"))
    assert (filled.arranged(LENGTHS).per_epoch, dropped.arranged(LENGTHS).per_epoch) == (32, 31)  # of 500 texts
    epoch = dropped.arranged(LENGTHS).epoch(generator(0))
    assert all((planned.sizes > 0).all() for planned in epoch) and len(np.unique(texts_of(epoch))) == 16 * len(epoch)
    rows = [(planned.length, (planned.sizes > 0).sum()) for planned in filled.arranged(LENGTHS).epoch(generator(0))]
    assert [row for row in rows if row[1] < 16] == [(200, 500 % 16)]
    long = [texts_of([x for x in filled.arranged(LENGTHS).epoch(generator(e)) if x.length == 200]) for e in range(2)]
    up = [set(texts[LENGTHS[texts] <= 20].tolist()) for texts in long]  # what did not fill a batch of short ones
    assert len(up[0]) == len(up[1]) == (LENGTHS <= 20).sum() % 16 and up[0] != up[1]


# ---- packing


def first_fit(lengths, room):
    """As the textbook has it."""
    rows = []
    for text, n in enumerate(lengths):
        row = next((row for row in rows if sum(lengths[i] for i in row) + n <= room), None)
        rows.append([text]) if row is None else row.append(text)
    return rows


@pytest.mark.parametrize("room", [40, 128])
def test_packing_is_first_fit_decreasing(room):
    lengths = np.sort(np.minimum(LENGTHS, 40))[::-1]
    found = pack(lengths, room)
    assert [row[row >= 0].tolist() for row in found] == first_fit(lengths.tolist(), room)
    assert len(found) <= 1.05 * lengths.sum() / room + 1
    assert pack(np.array([5]), 5).tolist() == [[0]] and pack(np.array([3, 3]), 5).tolist() == [[0], [1]]


def test_segments_and_positions_of_packed_rows():
    lengths = np.array([3, 2, 4])
    arranged = Packed(2, 7, first_position=2).arranged(lengths)
    (planned,) = arranged.epoch(None)
    assert planned.texts.tolist() == [[2, 0], [1, -1]]
    marks = arranged.marks(planned)
    assert marks["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0, 0]]
    assert marks["position_ids"].tolist() == [[2, 3, 4, 5, 2, 3, 4], [2, 3, 0, 0, 0, 0, 0]]
    assert {x.dtype.name for x in marks.values()} == {"int32"}
    assert set(Packed(2, 7).arranged(lengths).marks(planned)) == {"segment_ids"}


# ---- windows


def starts_of(layout, total, epoch=None):
    planned = layout.arranged(np.array([total - 5, 5])).epoch(None if epoch is None else generator(epoch))
    starts, sizes = (np.concatenate([getattr(x, name)[:, 0] for x in planned]) for name in ("starts", "sizes"))
    return starts[sizes > 0].tolist(), sizes[sizes > 0].tolist(), len(planned)


def test_windows_cut_the_stream_as_it_is_said():
    assert starts_of(Windows(2, 10), 39) == ([0, 10, 20], [10] * 3, 2)
    assert starts_of(Windows(2, 10), 40) == ([0, 10, 20, 30], [10] * 4, 2)
    assert starts_of(Windows(2, 10, pad=True), 39) == ([0, 10, 20, 30], [10, 10, 10, 9], 2)
    assert starts_of(Windows(2, 10, pad=True), 40) == ([0, 10, 20, 30], [10] * 4, 2)
    assert starts_of(Windows(1, 10, pad=True), 7) == ([0], [7], 1)
    assert starts_of(Windows(2, 10, stride=9), 39) == ([0, 9, 18, 27], [10] * 4, 2)  # each token predicted once
    assert starts_of(Windows(2, 10, remainder="drop"), 39) == ([0, 10], [10] * 2, 1)
    assert sorted(starts_of(Windows(2, 10), 39, epoch=3)[0]) == [0, 10, 20]


def test_windows_that_begin_elsewhere_each_epoch():
    offset = [starts_of(Windows(2, 10, starts="offset"), 59, epoch) for epoch in range(40)]
    assert all(count == 3 and np.diff(sorted(starts)).tolist() == [10] * 4 for starts, _, count in offset)
    assert {min(starts) for starts, _, _ in offset} == set(range(10))
    drawn = [starts_of(Windows(2, 10, starts="random"), 59, epoch) for epoch in range(60)]
    assert all(len(starts) == 5 and max(starts) <= 49 and set(sizes) == {10} for starts, sizes, _ in drawn)
    assert {start for starts, _, _ in drawn for start in starts} >= {0, 49}


# ---- what cannot be

WRONG = {
    "neither": (lambda: Buckets(), "give either batch_size"),
    "both": (lambda: Buckets(batch_size=2, batch_tokens=8), "give either batch_size"),
    "no rows": (lambda: Buckets(batch_size=0), "batch_size = 0 must be at least 1"),
    "no length": (lambda: Buckets(batch_size=2, lengths=(8, 0)), "lengths[1] = 0 must be at least 1"),
    "no lengths": (lambda: Buckets(batch_size=2, lengths=()), "lengths = 0 must be at least 1"),
    "remainder": (lambda: Packed(2, 8, remainder="keep"), "remainder = 'keep' must be 'fill' or 'drop'"),
    "too long": (
        lambda: Buckets(batch_size=2, lengths=(8, 16)).arranged(np.array([3, 17])),
        "Text 1 has 17 tokens, more than the last of lengths, 16",
    ),
    "too long to pack": (
        lambda: Packed(2, 8).arranged(np.array([3, 9])),
        "Text 1 has 9 tokens, more than the rows of 8",
    ),
    "uneven": (lambda: Packed(3, 8).arranged(np.array([3]), 2), "batch_size = 3 rows cannot be shared evenly by 2"),
    "no batch": (
        lambda: Buckets(batch_size=9, remainder="drop").arranged(np.array([3, 3])),
        "2 rows do not fill one batch, and remainder = 'drop'",
    ),
    "no texts": (lambda: Buckets(batch_size=9).arranged(np.zeros(0, int)), "There are no texts"),
    "starts": (lambda: Windows(2, 8, starts="anywhere"), "starts = 'anywhere' must be"),
    "padded offset": (lambda: Windows(2, 8, starts="offset", pad=True), "pad = True needs starts = 'fixed'"),
    "short": (lambda: Windows(2, 8).arranged(np.array([3, 4])), "have 7 tokens in all, too few for one row of 8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_clear_error(case, unchecked):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
