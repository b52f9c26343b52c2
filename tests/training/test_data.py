"""Batches: what is in them, that a position is exact, and that the losses do not depend on how rows are filled."""

import json
import re
import threading

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import CausalLM, MaskedLM
from eqx_transformers.training.batching import Buckets
from eqx_transformers.training.data import Batches, BatchIterator
from eqx_transformers.training.objectives import language_model_loss, masked_lm_loss
from eqx_transformers.training.packing import Packed, Windows
from eqx_transformers.training.tokens import TokenizedTexts

from ..full import FULL
from ..models.ours import CONFIGS, DECODERS, filled, skeleton

PAD, MASK = 1, 3
rng = np.random.default_rng(0)
TEXTS = [rng.integers(4, 61, n).tolist() for n in rng.integers(1, 24, 103)]
OTHERS = [rng.integers(4, 61, n).tolist() for n in rng.integers(1, 30, 103)]
LABELS = rng.integers(0, 3, 103)
LAYOUTS = {"buckets": Buckets(batch_size=8), "packed": Packed(4, 32), "windows": Windows(4, 16, starts="random")}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def told(batch, name, i):
    """Row i of an array without its padding."""
    return batch[name][i][batch[name.replace("token_ids", "attention_mask")][i] != 0].tolist()


def noisy(batch, rng):
    return {**batch, "noise": rng.random(len(batch["weights"]))}


# ---- what is in them


def test_rows_have_their_texts_and_all_that_goes_with_these():
    index = np.arange(len(TEXTS))
    columns = {"labels": LABELS, "index": index, "score": index / 8, "wide": np.stack([index, -index], 1)}
    more = {"positive": OTHERS, "decoder": OTHERS, "targets": OTHERS}
    batches = Batches(TEXTS, Buckets(batch_size=8), padding_id=PAD, columns=columns, more=more, epochs=1)
    seen, shapes = [], set()
    for batch in batches:
        shapes.add(tuple(x.shape for x in batch.values()))
        assert {len(x) for x in batch.values()} == {8}
        assert {name: x.dtype.name for name, x in batch.items() if x.dtype != np.int32} == {
            "weights": "float32",
            "score": "float32",
        }
        assert (batch["token_ids"][batch["attention_mask"] == 0] == PAD).all()
        for i in np.flatnonzero(batch["weights"]):
            at = batch["index"][i]
            seen.append(at)
            assert told(batch, "token_ids", i) == TEXTS[at] and batch["labels"][i] == LABELS[at]
            assert told(batch, "positive_token_ids", i) == told(batch, "decoder_token_ids", i) == OTHERS[at]
            assert batch["targets"][i][batch["targets"][i] >= 0].tolist() == OTHERS[at]
            assert batch["score"][i] == at / 8 and batch["wide"][i].tolist() == [at, -at]
        for i in np.flatnonzero(batch["weights"] == 0):
            assert batch["attention_mask"][i].sum() == 1 and (batch["token_ids"][i] == PAD).all()
            assert batch["labels"][i] == batch["index"][i] == 0 and (batch["targets"][i] == -100).all()
    assert sorted(seen) == index.tolist() and len(shapes) == len(batches.shapes) <= 8


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_of_an_epoch_are_those_of_its_batches(name):
    def counted(process):
        batches = Batches(TEXTS, LAYOUTS[name], padding_id=PAD, process=process)
        found = [batches[i] for i in range(batches.per_epoch)]
        # A row that only fills the shape shows one token, which is none.
        real = [batch["attention_mask"][batch["weights"] > 0].sum() for batch in found]
        return batches.tokens_per_epoch, (sum(batch["token_ids"].size for batch in found), sum(real))

    told, found = counted((0, 1))
    assert told == found and found[1] > 0.9 * sum(map(len, TEXTS))
    (told, first), (_, second) = counted((0, 2)), counted((1, 2))
    assert told == (first[0] + second[0], first[1] + second[1])


def test_types_of_pairs_come_along():
    types = np.arange(6, dtype=np.int32) % 2
    texts = TokenizedTexts(np.arange(10, 16), np.array([0, 4, 6]), types=types)
    batch = Batches(texts, Buckets(batch_size=2), padding_id=PAD, shuffle=False)[0]
    assert batch["token_type_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]


def test_rows_of_several_texts_say_where_each_stands():
    batches = Batches(TEXTS, Packed(4, 32, first_position=0), padding_id=PAD)
    found = []
    for i in range(batches.per_epoch):
        batch = batches[i]
        assert set(batch) == {"token_ids", "attention_mask", "weights", "segment_ids", "position_ids"}
        for ids, segments, places in zip(
            *(batch[x] for x in ("token_ids", "segment_ids", "position_ids")), strict=True
        ):
            for segment in range(1, segments.max() + 1):
                found.append(ids[segments == segment].tolist())
                assert places[segments == segment].tolist() == list(range(len(found[-1])))
            assert (ids[segments == 0] == PAD).all()
    assert sorted(found) == sorted(TEXTS)


def test_windows_are_the_stream():
    stream = np.concatenate([np.array(text) for text in TEXTS])
    batches = Batches(TEXTS, Windows(4, 32, stride=31, pad=True), padding_id=PAD, shuffle=False)
    rows = [row for i in range(batches.per_epoch) for row, w in zip(*(batches[i][x] for x in SEEN), strict=True) if w]
    assert [row.tolist() for row in rows[:-1]] == [stream[i * 31 :][:32].tolist() for i in range(len(rows) - 1)]
    rest = stream[(len(rows) - 1) * 31 :]
    assert rows[-1].tolist() == [*rest.tolist(), *[PAD] * (32 - len(rest))]


SEEN = ("token_ids", "weights")


def test_processes_share_every_batch():
    make = lambda process: Batches(
        TEXTS, Buckets(batch_size=8), padding_id=PAD, columns={"labels": LABELS}, transform=noisy, process=process
    )
    whole, parts = make((0, 1)), [make((i, 2)) for i in range(2)]
    for i in range(whole.per_epoch + 2):
        both = [part[i] for part in parts]
        assert same(whole[i], {name: np.concatenate([x[name] for x in both]) for name in both[0]})


# ---- the order, and positions in it


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_after_a_position_is_set_the_same_batches_follow(name, threads):
    make = lambda: Batches(TEXTS, LAYOUTS[name], padding_id=PAD, transform=noisy, epochs=3, threads=threads)
    batches = make()
    with iter(batches) as reader:
        assert isinstance(reader, BatchIterator)
        states, given = [reader.get_state()], []
        for batch in reader:
            given.append(batch)
            states.append(reader.get_state())
    per_epoch = batches.per_epoch
    assert len(given) == len(batches) == 3 * per_epoch
    for at in {0, 1, per_epoch - 1, per_epoch, per_epoch + 2, 2 * per_epoch, 3 * per_epoch - 1, 3 * per_epoch}:
        again = iter(make())
        next(again)  # a position may be set of an iterator that was used
        again.set_state(json.loads(json.dumps(states[at])))
        rest = list(again)
        assert len(rest) == len(given) - at and all(same(a, b) for a, b in zip(rest, given[at:], strict=True))
    assert not same(given[0], given[per_epoch]) and not any(same(given[0], x) for x in given[1:])


def test_the_seed_is_the_order_and_the_noise():
    make = lambda seed, **options: Batches(
        TEXTS, Buckets(batch_size=8), padding_id=PAD, transform=noisy, seed=seed, **options
    )
    assert all(same(make(3)[i], make(3)[i]) for i in (0, 20, 10**6))
    assert not same(make(3)[0], make(4)[0])
    plain = make(3, shuffle=False)
    first, later = plain[0], plain[plain.per_epoch]
    assert np.array_equal(first["token_ids"], later["token_ids"]) and not np.array_equal(first["noise"], later["noise"])


def test_a_position_of_other_batches_is_refused():
    make = lambda texts=TEXTS, seed=0, size=8, **more: Batches(
        texts, Buckets(batch_size=size), padding_id=PAD, seed=seed, **more
    )
    state = iter(make()).get_state()
    changed = [*TEXTS[:-1], [5] * len(TEXTS[-1])]
    for other in (make(seed=1), make(size=9), make(changed), make(shuffle=False), make(columns={"labels": LABELS})):
        with pytest.raises(ValueError, match="The position is one of other batches"):
            iter(other).set_state(state)
    iter(make(process=(1, 2), threads=0)).set_state(state)
    with pytest.raises(ValueError, match=re.escape("The position {'next_index': 3} has no batches.")):
        iter(make()).set_state({"next_index": 3})


def test_batches_have_no_end_unless_it_is_asked_for_and_threads_do():
    before = threading.active_count()
    batches = Batches(TEXTS[:9], Buckets(batch_size=4), padding_id=PAD)
    reader = iter(batches)
    assert [next(reader) is not None for _ in range(10 * batches.per_epoch)].count(True) == 10 * batches.per_epoch
    assert threading.active_count() > before
    reader.close()
    for _ in Batches(TEXTS[:9], Buckets(batch_size=4), padding_id=PAD, epochs=2):
        pass
    [thread.join(10) for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(reader)


def test_after_its_end_an_iterator_has_ended_until_a_position_is_set():
    reader = iter(Batches(TEXTS, Buckets(batch_size=8), padding_id=PAD, epochs=1))
    state, first = reader.get_state(), next(reader)
    assert len(list(reader)) == 12 and list(reader) == [] and reader.get_state()["next_index"] == 13
    reader.set_state(state)
    assert same(next(reader), first) and len(list(reader)) == 12


def test_an_error_in_a_transform_is_the_callers():
    def broken(batch, rng):
        raise ArithmeticError("no noise")

    with (
        iter(Batches(TEXTS, Buckets(batch_size=4), padding_id=PAD, transform=broken)) as reader,
        pytest.raises(ArithmeticError, match="no noise"),
    ):
        next(reader)


# ---- losses


def mean_loss(loss, model, layout, transform=None):
    """Over all that counts in an epoch."""
    total = weight = 0.0
    for batch in Batches(TEXTS, layout, padding_id=PAD, epochs=1, transform=transform):
        value, aux = CALL(loss, model, {name: jnp.asarray(x) for name, x in batch.items()})
        total, weight = total + float(value) * float(aux["weight"]), weight + float(aux["weight"])
    return total / weight, weight


MORE = [Buckets(batch_size=1), Packed(8, 29)] if FULL else []
CALL = eqx.filter_jit(lambda loss, model, batch: loss(model, batch))


def hidden(batch, rng):
    """Every fifth token of the vocabulary is masked: whichever row it stands in."""
    ids = batch["token_ids"]
    chosen = (ids % 5 == 0) & (batch["attention_mask"] != 0)
    targets = np.where(chosen, ids, -100)
    return {**batch, "token_ids": np.where(chosen, MASK, ids).astype(np.int32), "targets": targets.astype(np.int32)}


@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_buckets_and_packing_give_the_losses_of_padding(family):
    if family == "roberta":
        loss, model, transform = masked_lm_loss, filled(skeleton(MaskedLM, CONFIGS[family])), hidden
    else:
        loss, model, transform = language_model_loss, filled(skeleton(CausalLM, DECODERS[family])), None
    expected, weight = mean_loss(loss, model, Buckets(batch_size=16, lengths=(29,)), transform)
    layouts = [Buckets(batch_tokens=256, max_shapes=2), Packed(4, 60)]  # longer than the table of positions
    for layout in (*layouts, *MORE):
        found = mean_loss(loss, model, layout, transform)
        assert found[1] == weight > 100
        np.testing.assert_allclose(found[0], expected, rtol=1e-5)


# ---- what cannot be

WRONG = {
    "column": ({"columns": {"labels": LABELS[1:]}}, "There are 103 texts, but 'labels' has 102 entries."),
    "more": ({"more": {"positive": OTHERS[1:]}}, "There are 103 texts, but 'positive' has 102 entries."),
    "names": ({"columns": {"labels": ["good"] * 103}}, "A column must hold numbers, but its first entry is"),
    "packed": ({"layout": Packed(4, 32), "columns": {"labels": LABELS}}, "Packed puts several texts into a row, which"),
    "process": ({"process": (2, 2)}, "process = (2, 2) must be (number, of how many)"),
    "epochs": ({"epochs": 0}, "epochs = 0 must be at least 1, or None"),
    "threads": ({"threads": -1}, "threads = -1 must be at least 0"),
    "rows": ({"process": (0, 3)}, "batch_size = 8 rows cannot be shared evenly by 3 processes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_clear_error(case, unchecked):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        Batches(TEXTS, **{"layout": Buckets(batch_size=8), "padding_id": PAD} | options)


def test_batches_have_numbers(unchecked):
    with pytest.raises(IndexError, match="There are 26 batches, numbered from 0: 26 is none of them"):
        Batches(TEXTS, Buckets(batch_size=8), padding_id=PAD, epochs=2)[26]
