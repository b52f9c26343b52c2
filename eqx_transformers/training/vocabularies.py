"""Tokenizers made from texts or read from a file, and which tokens begin a word."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

Kind = Literal["bpe", "unigram", "char", "wordlevel"]
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
LINE_ENDS = ("Ċ", "ĉ")  # a line's end and a tab, as byte-level tokenizers spell them


def train_tokenizer(
    texts: Iterable[str],
    kind: Kind = "bpe",
    *,
    vocab_size: int = 8000,
    special_tokens: Sequence[str] = SPECIAL,
    unknown: str = "<unk>",
    begin: str | None = None,
    end: str | None = None,
) -> Any:
    """A `tokenizers.Tokenizer` learned from texts; `.save(path)` writes it, and `load_tokenizer` reads it.

    - `kind`: "bpe" merges bytes (any text can be said, and comes back as it was); "unigram" is SentencePiece's model,
      on words with a mark for the space before them (its trainer does not give the same one twice: save it); "char" has
      one token a character, in the order of Unicode; "wordlevel" has words and punctuation, and does not keep what is
      between them.
    - `vocab_size`: tokens at most, special ones included. Of characters and words, the most frequent are kept.
    - `special_tokens`: the first ids, in this order. `unknown` is one of them but for "bpe".
    - `begin`, `end`: special tokens put around every text (or pair).

    Raises a `ValueError` for special tokens that are not in the list, and for a vocabulary too small to have them.
    """
    _expect(kind, vocab_size, special_tokens, unknown, [x for x in (begin, end) if x is not None])
    tokenizer = _MAKERS[kind](texts, vocab_size, list(special_tokens), unknown)
    if begin is not None or end is not None:
        tokenizer.post_processor = _around(tokenizer, begin, end)
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The `tokenizers.Tokenizer` of a file `tokenizer.json`, or of a directory that has one.

    Raises a `ValueError` where there is none, and says what there is.
    """
    given = Path(path)
    file = given / "tokenizer.json" if given.is_dir() else given
    if not file.is_file():
        there = sorted(x.name for x in file.parent.iterdir()) if file.parent.is_dir() else []
        raise ValueError(
            f"There is no file {file}, but {', '.join(there[:8]) or 'nothing'}. A tokenizer of older files is written"
            " as one by transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        )
    try:
        return _library().Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is not a tokenizer of the library tokenizers: {error}") from error


def word_starts(tokenizer: Any) -> Bool[np.ndarray, " vocab_size"]:
    """Which tokens of a vocabulary begin a word, for `mask_tokens(words=...)`.

    By how tokens are spelled: of WordPiece those without `##`, of SentencePiece those with `▁` and of byte-level BPE
    those with `Ġ` in front (and line ends); where no token has any of these marks, all.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    spelled = np.full(max(vocabulary.values()) + 1, "", object)
    for token, i in vocabulary.items():
        spelled[i] = token
    if any(token.startswith("##") and len(token) > 2 for token in vocabulary):
        return np.array([not token.startswith("##") for token in spelled])
    if any(token.startswith(("▁", "Ġ")) for token in vocabulary):
        return np.array([token.startswith(("▁", "Ġ", *LINE_ENDS)) for token in spelled])
    return np.ones(len(spelled), bool)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("This needs the library tokenizers: pip install 'eqx_transformers[train]'") from error
    return tokenizers


def _bpe(texts: Iterable[str], vocab_size: int, special: list[str], unknown: str) -> Any:
    t = _library()
    tokenizer = t.Tokenizer(t.models.BPE())
    tokenizer.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = t.decoders.ByteLevel()
    alphabet = t.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"vocab_size = {vocab_size} is too small: {len(alphabet)} bytes and {len(special)} special ones."
        )
    trainer = t.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram(texts: Iterable[str], vocab_size: int, special: list[str], unknown: str) -> Any:
    t = _library()
    tokenizer = t.Tokenizer(t.models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = t.pre_tokenizers.Metaspace(), t.decoders.Metaspace()
    trainer = t.trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token=unknown, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _char(texts: Iterable[str], vocab_size: int, special: list[str], unknown: str) -> Any:
    t = _library()
    # Each character on its own. The class stands for a dot that matches line ends too.
    return _of_words(t, texts, t.pre_tokenizers.Split(t.Regex(r"[\s\S]"), "isolated"), vocab_size, special, unknown)


def _wordlevel(texts: Iterable[str], vocab_size: int, special: list[str], unknown: str) -> Any:
    t = _library()
    return _of_words(t, texts, t.pre_tokenizers.Whitespace(), vocab_size, special, unknown)


def _of_words(t: Any, texts: Iterable[str], split: Any, vocab_size: int, special: list[str], unknown: str) -> Any:
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - len(special)]
    vocabulary = [*special, *(word for word in sorted(frequent) if word not in special)]
    tokenizer = t.Tokenizer(t.models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=unknown))
    tokenizer.pre_tokenizer = split
    if isinstance(split, t.pre_tokenizers.Split):
        tokenizer.decoder = t.decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return tokenizer


_MAKERS = {"bpe": _bpe, "unigram": _unigram, "char": _char, "wordlevel": _wordlevel}


def _around(tokenizer: Any, begin: str | None, end: str | None) -> Any:
    ends = [(token, tokenizer.token_to_id(token)) for token in (begin, end) if token is not None]
    side = lambda token: [] if token is None else [token]
    single = " ".join([*side(begin), "$A", *side(end)])
    pair = " ".join([*side(begin), "$A", *side(end), "$B:1", *(f"{token}:1" for token in side(end))])
    return _library().processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)


def _expect(kind: str, vocab_size: int, special: Sequence[str], unknown: str, ends: list[str]) -> None:
    if kind not in _MAKERS:
        raise ValueError(f"kind = {kind!r} is none of {', '.join(_MAKERS)}.")
    needed = [*ends, *([] if kind == "bpe" else [unknown])]
    missing = [token for token in needed if token not in special]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be among special_tokens, which are {', '.join(special)}.")
    if vocab_size <= len(special):
        raise ValueError(f"vocab_size = {vocab_size} leaves no room beside {len(special)} special tokens.")
