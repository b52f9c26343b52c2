"""Laws of `encode`: what it gives is what the model makes of each text alone, however the texts are put together."""

import itertools
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing

from converters import load
from converters.demo import source
from eqx_transformers import T5_V1, Encoder, MaskedLM, SentenceEmbedder, SequenceClassifier
from eqx_transformers.encode import bucket_lengths, encode, plan

from ..full import FULL
from .ours import SIZES, call, make

WORDS = {"<s>": 0, "<pad>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, SIZES["vocab_size"])}
TOLERANCE = 2e-5
SNIPPETS = Path(__file__).parents[2] / "benchmarks" / "data" / "snippets.txt"
MANY = 2000 if FULL else 64


def tokenizer(**more):
    made = Tokenizer(WordLevel(WORDS | more, unk_token="</s>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = BertProcessing(("</s>", 2), ("<s>", 0))
    return made


def text(words, seed=0):
    return " ".join(f"w{i}" for i in np.random.default_rng([seed, words]).integers(3, SIZES["vocab_size"], words))


def corpus(*words):
    return [text(n, seed) for seed, n in enumerate(words)]


TEXTS = corpus(4, 0, 25, 9, 9, 0, 4, 25, 9)


def alone(model, texts, types=False):
    """The model's word on each text, one at a time."""
    found = [tokenizer().encode(*([t] if isinstance(t, str) else t)) for t in texts]
    more = lambda e: {"token_type_ids": np.array(e.type_ids)} if types else {}
    return [np.asarray(call(model, np.array(e.ids), **more(e))) for e in found]


def small(head, family):
    """For what is about texts and not about models: less to compile."""
    return make(head, family, num_layers=1)


def expect_close(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("head", "family", "stacked", "way"),
    [
        (SentenceEmbedder, "bert", False, {"batch_tokens": 60, "max_shapes": 3}),
        (SentenceEmbedder, "roberta", True, {"lengths": (40, 8), "batch_tokens": 40}),
        (SequenceClassifier, "roberta", False, {}),
        (Encoder, "roberta", False, {"batch_tokens": 60, "max_shapes": 2}),
        (MaskedLM, "bert", True, {"max_length": 29, "truncate": True}),
    ],
)
def test_is_the_model_on_each_text_alone_in_the_order_of_the_texts(head, family, stacked, way):
    model = make(head, family, stacked)
    found = encode(model, tokenizer(), TEXTS, **way)
    expect_close(found, alone(model, TEXTS))
    assert isinstance(found, np.ndarray) == (head in (SentenceEmbedder, SequenceClassifier))


TRACED = []


class Counting(eqx.Module):
    """The sum of its table's rows; notes the lengths that it is traced for."""

    table: Array

    def __call__(self, token_ids, *, attention_mask):
        TRACED.append(token_ids.shape[0])
        return jnp.where(attention_mask[:, None] == 1, self.table[token_ids], 0).sum(0)


def counting():
    return Counting(jnp.asarray(np.random.default_rng(0).normal(size=(61, 7)), jnp.float32))


def sums(model, texts):
    return np.stack([np.asarray(model.table)[tokenizer().encode(t).ids].sum(0) for t in texts])


WAYS = [
    {},
    {"batch_tokens": 1},
    {"batch_tokens": 64, "max_shapes": 1},
    {"batch_tokens": 90, "max_shapes": 4},
    {"lengths": (5, 52)},
    {"lengths": (60, 8), "batch_tokens": 40},
    {"max_length": 51},
    {"max_length": 60, "truncate": True},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_how_texts_are_put_together_changes_nothing(way):
    model, many = counting(), corpus(*np.random.default_rng(1).integers(0, 50, 40))
    expect_close(encode(model, tokenizer(), many, **way), sums(model, many))


def test_pairs_are_one_text_whose_second_part_has_its_own_type():
    model = small(SequenceClassifier, "bert")
    pairs = [(text(n), text(m, 1)) for n, m in ((3, 5), (6, 2), (0, 8))]
    expect_close(encode(model, tokenizer(), pairs), alone(model, pairs, types=True))
    expect_close(encode(model, tokenizer(), [list(p) for p in pairs]), alone(model, pairs, types=True))
    assert np.abs(np.stack(alone(model, pairs)) - encode(model, tokenizer(), pairs)).max() > 1e-2
    untyped = small(SequenceClassifier, "roberta")  # one type: the tokenizer's second does not exist
    expect_close(encode(untyped, tokenizer(), pairs), alone(untyped, pairs))


def test_an_edited_model_gives_its_own_numbers():
    model = small(SentenceEmbedder, "bert")
    edited = eqx.tree_at(lambda m: m.backbone.stack.blocks[0].mlp.activation, model, jnp.tanh)
    found = encode(edited, tokenizer(), TEXTS)
    expect_close(found, alone(edited, TEXTS))
    assert np.abs(found - encode(model, tokenizer(), TEXTS)).max() > 1e-2


def test_the_dtype_is_the_models():
    model = small(SentenceEmbedder, "bert")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model)
    found = encode(low, tokenizer(), TEXTS[:3])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), encode(model, tokenizer(), TEXTS[:3]), atol=0.05)


def test_an_empty_corpus_is_an_empty_result():
    found = encode(small(SentenceEmbedder, "bert"), tokenizer(), [])
    assert (found.shape, found.dtype) == ((0, SIZES["embed_dim"]), np.float32)
    assert encode(small(SequenceClassifier, "roberta"), tokenizer(), (), lengths=(8,)).shape == (0, 3)
    assert encode(small(Encoder, "bert"), tokenizer(), []) == []


def test_progress_counts_texts():
    seen = []
    encode(
        small(SentenceEmbedder, "bert"), tokenizer(), TEXTS, batch_tokens=60, progress=lambda *done: seen.append(done)
    )
    assert seen == sorted(seen) and seen[-1] == (len(TEXTS), len(TEXTS)) and len(seen) > 2


def test_as_many_programs_are_made_as_there_are_shapes_and_they_are_shared():
    rng = np.random.default_rng(0)
    model, many = counting(), corpus(*rng.integers(0, 50, 120))
    wanted = sums(model, many)
    batches = plan(np.array([len(tokenizer().encode(t).ids) for t in many]), batch_tokens=200, max_shapes=5)
    TRACED.clear()
    for _ in range(2):
        expect_close(encode(model, tokenizer(), many, batch_tokens=200, max_shapes=5), wanted)
    other = Counting(-model.table)  # other numbers, the same programs
    expect_close(encode(other, tokenizer(), many, batch_tokens=200, max_shapes=5), -wanted)
    assert len(TRACED) == 5 and set(TRACED) == {b.length for b in batches}
    assert len({(b.rows, b.length) for b in batches}) == 5


def test_a_few_texts_are_one_shape_and_given_lengths_are_met_again():
    model = Counting(jnp.ones((61, 5)))
    TRACED.clear()
    encode(model, tokenizer(), corpus(3, 9, 20))
    assert len(TRACED) == 2 and 22 in TRACED  # and one that nothing is compiled for, to see which axes grow
    TRACED.clear()
    for words in ((3, 9, 30), (2, 19, 33, 11), (1, 17), (5,) * 40):
        encode(model, tokenizer(), corpus(*words), lengths=(16, 40), batch_tokens=160)
    assert sorted(set(TRACED)) in ([16, 40], [15, 16, 40]) and len(TRACED) == len(set(TRACED))


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_the_lengths_are_the_best_there_are(most):
    sizes = np.random.default_rng(most).integers(2, 12, 30)
    values = np.unique(sizes)
    waste = lambda chosen: sum(min(c for c in chosen if c >= n) for n in sizes)
    options = itertools.combinations(values[:-1], min(most, len(values)) - 1)
    assert waste(bucket_lengths(sizes, most)) == min(waste((*some, values[-1])) for some in options)
    assert len(bucket_lengths(sizes, most)) <= most


def test_very_different_lengths_are_still_covered():
    sizes = np.arange(1, 5000)
    assert bucket_lengths(sizes, 4)[-1] == 4999
    assert sum(len(b.texts) for b in plan(sizes)) == 4999


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizers_own_padding_and_truncation_are_put_aside_and_left_as_they_were(side):
    mine = tokenizer()
    mine.enable_padding(length=30, direction=side, pad_id=1, pad_token="<pad>")
    mine.enable_truncation(5, direction=side)
    before = mine.to_str()
    model = small(SentenceEmbedder, "roberta")
    expect_close(encode(model, mine, TEXTS), alone(model, TEXTS))
    kept = encode(model, mine, [text(25)], max_length=9, truncate=True)
    words = text(25).split()
    part = words[:7] if side == "right" else words[-7:]
    expect_close(kept, alone(model, [" ".join(part)]))
    assert mine.to_str() == before


def test_a_tokenizer_of_transformers_gives_the_same():
    from transformers import PreTrainedTokenizerFast

    names = ["input_ids", "token_type_ids", "attention_mask"]
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), pad_token="<pad>", model_max_length=12, model_input_names=names
    )
    theirs.backend_tokenizer.enable_truncation(4)
    before = theirs.backend_tokenizer.to_str()
    for head, family in ((SequenceClassifier, "bert"), (Encoder, "roberta")):
        model = small(head, family)
        for texts in (TEXTS, [(text(4), text(7, 1)), (text(2), text(1, 1))]):
            expect_close(encode(model, theirs, texts), list(encode(model, tokenizer(), texts)))
        cut = encode(model, theirs, TEXTS, max_length=6, truncate=True)
        expect_close(cut, list(encode(model, tokenizer(), TEXTS, max_length=6, truncate=True)))
    assert theirs.backend_tokenizer.to_str() == before


def test_cutting_keeps_the_special_tokens():
    model = small(Encoder, "roberta")
    found = encode(model, tokenizer(), [text(50), text(3)], truncate=True)
    assert [len(x) for x in found] == [29, 5]  # 31 rows of positions, the first two are not for tokens
    expect_close(found, alone(model, [" ".join(text(50).split()[:27]), text(3)]))


def expect_error(kind, match, texts=TEXTS, model=None, using=None, **how):
    with pytest.raises(kind, match=match):
        encode(small(SentenceEmbedder, "roberta") if model is None else model, using or tokenizer(), texts, **how)


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_was_found():
    expect_error(TypeError, "one str: give", texts="a text")
    expect_error(TypeError, r"texts\[1\] must be a str or a pair of them, but it is int 7", texts=["a", 7])
    expect_error(TypeError, r"texts\[0\] must be .* NoneType None", texts=[None])
    expect_error(TypeError, r"texts\[0\] must be .* tuple", texts=[("a", "b", "c")])
    expect_error(TypeError, r"texts\[0\] is a str, but texts\[2\] is a pair", texts=["a", "b", ("c", "d")])
    expect_error(ValueError, "max_length = 30 is more than the model has positions for, which is 29", max_length=30)
    expect_error(ValueError, "max_length = 0 must be", max_length=0)
    expect_error(ValueError, "batch_tokens = 0 and", batch_tokens=0)
    expect_error(ValueError, "max_shapes = 0 must", max_shapes=0)
    expect_error(ValueError, "lengths = ", lengths=())
    expect_error(ValueError, "more than the last of lengths, 8", lengths=(4, 8), max_length=9)
    expect_error(ValueError, "special tokens alone", max_length=1, truncate=True)
    bare = Tokenizer(WordLevel(WORDS, unk_token="</s>"))
    expect_error(ValueError, r"texts\[1\], str '', has no tokens", using=bare, texts=["w3", ""])


def test_a_text_that_is_too_long_is_an_error_that_counts_them():
    long = [*TEXTS, text(40), text(55)]
    expect_error(ValueError, r"2 of 11 texts have more than 29 tokens.*texts\[10\], has 57.*truncate=True", texts=long)
    expect_error(ValueError, "2 of 9 texts have more than 12 tokens", max_length=12)
    expect_error(ValueError, "2 of 9 texts have more than 12 tokens", lengths=(12, 5))


def test_nan_is_never_handed_on():
    other = tokenizer(**{"elsewhere": 70})
    expect_error(
        ValueError, r"NaN for texts\[2\].*token 70, .*61.*another", using=other, texts=["w3", "w4", "elsewhere"]
    )
    model = small(Encoder, "bert")
    broken = eqx.tree_at(lambda m: m.embedding.norm.bias, model, jnp.full(SIZES["embed_dim"], jnp.nan))
    expect_error(ValueError, r"NaN for texts\[.*weights", model=broken)


def test_a_model_must_give_one_array_whose_axes_can_be_told():
    class Several(eqx.Module):
        def __call__(self, token_ids, *, attention_mask):
            return token_ids, attention_mask

    class Half(eqx.Module):
        def __call__(self, token_ids, *, attention_mask):
            return attention_mask[::2]

    class Square(eqx.Module):
        def __call__(self, token_ids, *, attention_mask):
            return token_ids[:, None] * token_ids[None, :] * jnp.ones((1, 1), jnp.int32)

    expect_error(TypeError, "one array, but it gives tuple", model=Several())
    expect_error(ValueError, "not one entry a token", model=Half())
    found = encode(Square(), tokenizer(), TEXTS)
    assert [x.shape for x in found] == [(n, n) for n in (len(t.split()) + 2 for t in TEXTS)]


def test_minilm_gives_sentence_transformers_embeddings():
    from sentence_transformers import SentenceTransformer

    sentences = SNIPPETS.read_text(encoding="utf-8").splitlines()[:MANY]
    reference = SentenceTransformer(str(source()), device="cpu")
    model, _ = load(source())
    mine = Tokenizer.from_file(str(source() / "tokenizer.json"))
    before = mine.to_str()
    found = encode(model, mine, sentences, max_shapes=2)
    np.testing.assert_allclose(found, reference.encode(sentences), atol=1e-4, rtol=0)
    np.testing.assert_allclose(encode(model, reference.tokenizer, sentences, max_shapes=2), found, atol=1e-6)
    assert mine.to_str() == before


def test_rows_that_are_no_text_are_no_edge_for_a_model_that_wants_a_token_in_every_row(monkeypatch):
    """A T5's classifier reads its end token, and checking makes it an error that there is none: of dummies, too."""
    monkeypatch.setenv("EQX_TRANSFORMERS_CHECK", "1")
    facts = {"vocab_size": SIZES["vocab_size"], "embed_dim": 12, "num_heads": 2, "head_dim": 6, "mlp_dim": 10}
    config = replace(T5_V1, **facts, num_layers=1, num_buckets=8, max_distance=7, end_id=2)
    model, texts = SequenceClassifier(config, key=jax.random.key(0)), corpus(4, 3, 4)
    found = encode(model, tokenizer(), texts, lengths=(16,), batch_tokens=32)
    for got, expected in zip(found, alone(model, texts), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
