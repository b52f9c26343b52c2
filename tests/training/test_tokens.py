"""Texts to ids: what tokenizers give, what is cut or left out, the cache, and tokenizers made here."""

import functools
import re

import numpy as np
import pytest
import tokenizers

from eqx_transformers.training.text import read_texts
from eqx_transformers.training.tokens import TokenizedTexts, tokenize
from eqx_transformers.training.vocabularies import load_tokenizer, train_tokenizer, word_starts

from .test_text import SNIPPETS

TEXTS = read_texts(SNIPPETS / "test.tsv").texts[:120]
KINDS = ("bpe", "unigram", "char", "wordlevel")


@functools.cache
def trained(kind="bpe", **options):
    return train_tokenizer(TEXTS, kind, vocab_size=400, **options)


def bert():
    tokenizer = trained("bpe")
    made = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def plain(found):
    return [text.tolist() for text in found]


# ---- tokenizing


def test_ids_are_the_tokenizers_in_one_array():
    found = tokenize(TEXTS, bert())
    assert plain(found) == [bert().encode(text).ids for text in TEXTS] and len(found) == len(TEXTS)
    assert found.ids.dtype == np.int32 and found.lengths.tolist() == [len(text) for text in plain(found)]
    assert not found.types.any() and (found.skipped, found.truncated) == (0, 0)
    with pytest.raises(IndexError, match=f"There are {len(TEXTS)} texts"):
        found[len(TEXTS)]


def test_a_tokenizer_of_transformers_gives_the_same_and_pairs_have_types():
    import transformers

    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=bert(), pad_token="<pad>")
    pairs = [(a, b) for a, b in zip(TEXTS[::2], TEXTS[1::2], strict=True)]
    ours = tokenize(pairs, bert(), max_length=24)
    found = tokenize(pairs, theirs, max_length=24)
    np.testing.assert_array_equal(found.ids, ours.ids)
    expected = bert().encode(*pairs[0])
    assert ours.types[: ours.lengths[0]].sum() > 0 and plain(tokenize(pairs[:1], bert())) == [expected.ids]
    assert ours.lengths.max() == 24 and ours.truncated > 0


def test_padding_and_truncation_that_are_set_are_put_aside():
    tokenizer = bert()
    tokenizer.enable_padding()
    tokenizer.enable_truncation(9, direction="left")
    assert plain(tokenize(TEXTS, tokenizer)) == plain(tokenize(TEXTS, bert()))
    cut = tokenize(TEXTS, tokenizer, max_length=12)
    whole = tokenize(TEXTS, bert())
    at = int(np.argmax(whole.lengths))
    assert cut[at].tolist() == [1, *whole[at][-11:].tolist()]  # the left is cut, special tokens stay
    assert tokenizer.truncation["max_length"] == 9 and tokenizer.padding is not None


def test_longer_texts_are_cut_left_out_or_an_error():
    whole = tokenize(TEXTS, bert())
    limit = int(np.median(whole.lengths))
    long = whole.lengths > limit
    cut, skipped = (tokenize(TEXTS, bert(), max_length=limit, longer=x) for x in ("truncate", "skip"))
    assert cut.truncated == skipped.skipped == long.sum() > 0
    assert cut.lengths.tolist() == np.minimum(whole.lengths, limit).tolist() and cut.ids[cut.offsets[1] - 1] == 2
    assert skipped.indices.tolist() == np.flatnonzero(~long).tolist()
    assert plain(skipped) == [text for text, out in zip(plain(whole), long, strict=True) if not out]
    records = read_texts(SNIPPETS / "test.tsv")
    first = int(np.flatnonzero(long)[0])
    said = f"test.tsv, line {first + 2}: {whole.lengths[first]} tokens are more than max_length = {limit}; so are"
    with pytest.raises(ValueError, match=re.escape(f"{said} {long.sum() - 1} more texts of {len(TEXTS)}. Cut them")):
        tokenize(TEXTS, bert(), max_length=limit, longer="error", place=records.place)


def test_many_texts_go_by_chunks(monkeypatch):
    monkeypatch.setattr("eqx_transformers.training.tokens.AT_ONCE", 50)
    seen = []
    found = tokenize(TEXTS, bert(), progress=lambda *done: seen.append(done))
    assert seen == [(50, 120), (100, 120), (120, 120)] and plain(found) == [bert().encode(text).ids for text in TEXTS]


def test_what_cannot_be_tokenized(unchecked):
    with pytest.raises(ValueError, match=r"texts\[1\]: '' has no tokens"):
        tokenize(["a", ""], trained())
    with pytest.raises(ValueError, match="All 2 texts are skipped: each has more than max_length = 1"):
        tokenize(["abc", "def"], bert(), max_length=1, longer="skip")
    with pytest.raises(ValueError, match="cut to 1 tokens: the special tokens alone"):
        tokenize(["abc"], bert(), max_length=1)
    with pytest.raises(TypeError, match="give \\['one'\\]"):
        tokenize("one", bert())
    for options in ({"longer": "cut"}, {"max_length": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} = .* must be"):
            tokenize(["a"], bert(), **options)


def test_lists_of_ids_are_tokenized_texts():
    found = TokenizedTexts.of([[3, 1], np.array([2])])
    assert plain(found) == [[3, 1], [2]] and TokenizedTexts.of(found) is found and found[-1].tolist() == [2]
    with pytest.raises(ValueError, match="Text 1 has no tokens"):
        TokenizedTexts.of([[1], []])
    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of ids, 3"):
        TokenizedTexts(np.arange(3), np.array([0, 2]))


# ---- the cache


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_what_is_cached_is_read_and_nothing_else(tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("tokenized again")

    options = {"max_length": 20, "longer": "skip", "cache": tmp_path / "new"}
    made = tokenize(TEXTS, bert(), **options)
    assert len(list((tmp_path / "new").iterdir())) == 1
    monkeypatch.setattr("eqx_transformers.training.tokens._tokenize", never)
    found = tokenize(TEXTS, bert(), **options)
    assert same(made, found) and made.skipped > 0
    left = bert()
    left.enable_truncation(5, direction="left")
    others = [
        ([*TEXTS[:-1], "x"], bert(), options),
        (["".join(TEXTS[:2]), *TEXTS[2:]], bert(), options),
        (TEXTS, trained(), options),
        (TEXTS, left, options),
        (TEXTS, bert(), options | {"max_length": 21}),
        (TEXTS, bert(), options | {"longer": "truncate"}),
    ]
    for texts, tokenizer, changed in others:
        with pytest.raises(AssertionError, match="tokenized again"):
            tokenize(texts, tokenizer, **changed)


def test_a_damaged_cache_is_made_anew_and_said(tmp_path):
    made = tokenize(TEXTS, bert(), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    at = int(rng.integers(len(whole) // 4, len(whole) // 2))
    for damaged in (b"", whole[: len(whole) // 2], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="are damaged and made anew"):
            assert same(tokenize(TEXTS, bert(), cache=tmp_path), made)
        assert [x.name for x in tmp_path.iterdir()] == [file.name] and same(
            tokenize(TEXTS, bert(), cache=tmp_path), made
        )


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("eqx_transformers._files.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        tokenize(TEXTS, bert(), cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_json_has_no_cache(tmp_path):
    class Words:
        def __call__(self, texts, **options):
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    assert plain(tokenize(["a bc"], Words())) == [[1, 2]]
    with pytest.raises(ValueError, match="Words cannot: give a fast tokenizer, or cache=None"):
        tokenize(["a bc"], Words(), cache=tmp_path)


# ---- tokenizers


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_tokenizer_is_saved_and_loaded(kind, tmp_path):
    tokenizer = trained(kind, begin="<s>", end="</s>")
    assert [tokenizer.token_to_id(x) for x in ("<pad>", "<s>", "</s>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() <= 400
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = TEXTS[0]
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1 and ids[-1] == 2 and len(ids) > 4
    assert tokenizer.encode("a", "b").type_ids[-1] == 1
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).encode(text).ids == ids
    if kind in ("bpe", "char"):
        assert tokenizer.decode(ids) == text
    if kind != "unigram":
        again = train_tokenizer(TEXTS, kind, vocab_size=400, begin="<s>", end="</s>")
        assert again.to_str() == tokenizer.to_str()


def test_any_text_comes_back_of_bytes_and_characters_are_one_token_each():
    strange = "a\n\t é 漢 \U0001f600 <s"
    assert trained("bpe").decode(trained("bpe").encode(strange).ids) == strange
    tokenizer = train_tokenizer([strange], "char", special_tokens=("<unk>",))
    assert tokenizer.encode(strange).tokens == list(strange) and tokenizer.encode("z").ids == [0]
    few = train_tokenizer(["aaabbc"], "char", vocab_size=3, special_tokens=("<unk>",))
    assert few.get_vocab() == {"<unk>": 0, "a": 1, "b": 2}


def test_which_tokens_begin_a_word():
    for kind, mark in (("bpe", "Ġ"), ("unigram", "▁")):
        starts, tokens = word_starts(trained(kind)), trained(kind).get_vocab()
        assert all(starts[i] == (token.startswith(mark) or token in ("Ċ", "ĉ")) for token, i in tokens.items())
        assert 0 < starts.sum() < len(starts)
    assert word_starts(trained("wordlevel")).all()
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "##": 3}))
    assert word_starts(pieces).tolist() == [True, True, False, False]


def test_tokenizers_that_cannot_be(tmp_path, unchecked):
    with pytest.raises(ValueError, match="kind = 'words' is none of bpe, unigram, char, wordlevel"):
        train_tokenizer(TEXTS, "words")
    with pytest.raises(ValueError, match="<eos>, <unk> must be among special_tokens, which are <pad>"):
        train_tokenizer(TEXTS, "char", special_tokens=["<pad>"], end="<eos>")
    with pytest.raises(ValueError, match="vocab_size = 5 leaves no room beside 5 special tokens"):
        train_tokenizer(TEXTS, vocab_size=5)
    with pytest.raises(ValueError, match="vocab_size = 100 is too small: 256 bytes and 5 special ones"):
        train_tokenizer(TEXTS, vocab_size=100)
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=r"There is no file .*tokenizer.json, but vocab.txt. A tokenizer of older"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"vocab\.txt is not a tokenizer of the library tokenizers"):
        load_tokenizer(tmp_path / "vocab.txt")
