"""A corpus in, its embeddings or logits out: tokenized, put into batches of few shapes, in the order of the texts."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Int, Shaped

# A larger batch leaves a CPU's cache and runs slower; an accelerator wants more to do.
CPU_TOKENS, ACCELERATOR_TOKENS = 1024, 32768
AT_ONCE = 4096  # texts a tokenizer is given: what it returns is many times larger than the ids in it


class Tokens(NamedTuple):
    """One text: its ids and, where the tokenizer gives them, which of a pair each belongs to."""

    ids: Int[np.ndarray, " seq"]
    types: Int[np.ndarray, " seq"] | None


class Batch(NamedTuple):
    """Numbers of texts, and the shape that they are padded to."""

    texts: Int[np.ndarray, " texts"]
    rows: int
    length: int


def encode(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str] | Iterable[Sequence[str]],
    *,
    max_length: int | None = None,
    truncate: bool = False,
    batch_tokens: int | None = None,
    max_shapes: int = 8,
    lengths: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Shaped[np.ndarray, "texts ..."] | list[np.ndarray]:
    """What `model` makes of each text alone, as NumPy in the model's dtype and in the order of the texts.

    The result is one array `texts …` when the output of a text has the same shape whatever its length
    (`SentenceEmbedder`, `SequenceClassifier`). Axes that grow with the text (`Encoder`, `MaskedLM`) are cut to its own
    tokens, special ones included, and the result is a list of arrays. Shapes at two lengths tell which axes those are.

    - `model` is called as `model(token_ids, attention_mask=…)` for one sequence, with `token_type_ids` too if the
      tokenizer gives them and `model.config.token_types` is more than 1.
    - `tokenizer`: a `tokenizers.Tokenizer` or a tokenizer of transformers. It is not changed: padding and truncation
      that it is set to are put aside (in a copy), only the side and the strategy of its truncation are kept.
    - `texts`: strings, or pairs of strings.
    - `max_length`: tokens of a text at most; None: the model's room, or the last of `lengths` if that is less. A text
      with more is an error, unless `truncate`: then the tokenizer cuts it and keeps its special tokens. A model whose
      table of positions has an end cannot be asked for more; a rotary one can, beyond the context of its config.
    - `batch_tokens`: how many tokens, padding included, are computed at once; None: 1,024 on a CPU, else 32,768.
    - `max_shapes`: one program is compiled for each shape of a batch; at most so many, and fewer for a corpus of fewer
      batches. Their lengths are those that pad this corpus least. Models that are equal but for the numbers in their
      arrays share programs, from call to call too, where the shapes are the same.
    - `lengths`: pad to these instead, with a fixed number of rows each, so that calls with different texts meet the
      same shapes and only the first one compiles.
    - `progress(done, total)` is called with numbers of texts.

    Raises a `TypeError` for what is neither text nor pair, and a `ValueError` for texts that are too long or have no
    tokens at all, and for an output with NaN, which is what ids outside the vocabulary give.
    """
    corpus = _corpus(texts)
    limit = _limit(model, max_length, lengths)
    tokens = _tokens(tokenizer, corpus, limit, truncate)
    fitted = None if lengths is None else [min(n, limit or n) for n in lengths]
    sizes = np.array([len(t.ids) for t in tokens], np.int64)
    batches = plan(sizes, batch_tokens=batch_tokens, max_shapes=max_shapes, lengths=fitted)
    return _run(model, tokens, batches, progress)


def plan(
    sizes: Int[np.ndarray, " texts"],
    *,
    batch_tokens: int | None = None,
    max_shapes: int = 8,
    lengths: Sequence[int] | None = None,
) -> list[Batch]:
    """The batches in which `encode` computes texts of these numbers of tokens."""
    if batch_tokens is None:
        batch_tokens = CPU_TOKENS if jax.default_backend() == "cpu" else ACCELERATOR_TOKENS
    if batch_tokens < 1 or max_shapes < 1:
        raise ValueError(f"batch_tokens = {batch_tokens} and max_shapes = {max_shapes} must be at least 1.")
    if lengths is not None:
        return list(_batches(sizes, sorted(set(lengths)), batch_tokens, fixed=True))
    shapes = min(max_shapes, max(1, int(sizes.sum()) // batch_tokens))
    return list(_batches(sizes, bucket_lengths(sizes, shapes), batch_tokens, fixed=False))


def bucket_lengths(sizes: Int[np.ndarray, " texts"], most: int) -> list[int]:
    """At most `most` lengths, ascending, that pad texts of these sizes to the fewest tokens.

    Dynamic programming over the histogram of the sizes: the best way to cover the shortest ones with k lengths is the
    best way to cover fewer of them with k - 1, and one more length.
    """
    if not sizes.size:
        return []
    step = -(-int(sizes.max()) // 1024)  # the table below is square in the number of different lengths
    values, counts = np.unique(np.minimum(-(-sizes // step) * step, sizes.max()), return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[i, j]: tokens when the values i to j are all padded to value j.
    cost = np.triu(values * (below[1:] - below[:-1, None])).astype(float)
    cost[np.tri(len(values), k=-1, dtype=bool)] = np.inf
    best, starts = cost[0], []
    for _ in range(min(most, len(values)) - 1):
        totals = best[:-1, None] + cost[1:]
        starts.append(totals.argmin(0) + 1)
        best = totals.min(0)
    last, chosen = len(values) - 1, [len(values) - 1]
    for start in reversed(starts):
        last = int(start[last]) - 1
        chosen.append(last)
    return [int(values[i]) for i in reversed(chosen)]


def _corpus(texts: Any) -> list[Any]:
    if isinstance(texts, str):
        raise TypeError(f"texts must be many texts, but it is one str: give [{texts[:40]!r}].")
    corpus = list(texts)
    for i, text in enumerate(corpus):
        if _kind(text) is None:
            raise TypeError(f"texts[{i}] must be a str or a pair of them, but it is {_said(text)}.")
        if _kind(text) != _kind(corpus[0]):
            raise TypeError(f"texts[0] is {_kind(corpus[0])}, but texts[{i}] is {_kind(text)}: give all of one kind.")
    return corpus


def _kind(text: Any) -> str | None:
    if isinstance(text, str):
        return "a str"
    is_pair = isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(part, str) for part in text)
    return "a pair" if is_pair else None


def _said(text: Any) -> str:
    found = repr(text)
    return f"{type(text).__name__} {found if len(found) <= 60 else found[:59] + '…'}"


def _limit(model: Any, max_length: int | None, lengths: Sequence[int] | None) -> int | None:
    """How many tokens a text may have, if anything says so."""
    room = getattr(getattr(model, "backbone", model), "room", None)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length = {max_length} must be at least 1.")
    if lengths is not None and (not lengths or min(lengths) < 1):
        raise ValueError(f"lengths = {lengths} must be whole numbers of tokens, at least 1, and at least one of them.")
    if max_length is not None and room is not None and max_length > room:
        raise ValueError(f"max_length = {max_length} is more than the model has positions for, which is {room}.")
    if max_length is not None and lengths is not None and max_length > max(lengths):
        raise ValueError(f"max_length = {max_length} is more than the last of lengths, {max(lengths)}.")
    limits = [room, max_length, None if lengths is None else max(lengths)]
    # Where no table of positions ends, there is still a context that the model was trained on.
    context = getattr(getattr(model, "config", None), "max_positions", None)
    return min((n for n in limits if n is not None), default=context)


def _tokens(tokenizer: Any, corpus: list[Any], limit: int | None, truncate: bool) -> list[Tokens]:
    tokens = _tokenize(tokenizer, corpus, None)
    for i, t in enumerate(tokens):
        if not len(t.ids):
            raise ValueError(f"texts[{i}], {_said(corpus[i])}, has no tokens: the tokenizer adds no special ones.")
    long = [i for i, t in enumerate(tokens) if limit is not None and len(t.ids) > limit]
    if long and not truncate:
        worst = max(long, key=lambda i: len(tokens[i].ids))
        raise ValueError(
            f"{len(long)} of {len(corpus)} texts have more than {limit} tokens, which is what the model's positions,"
            f" max_length or lengths allow; the longest, texts[{worst}], has {len(tokens[worst].ids)}."
            " truncate=True cuts them."
        )
    for i, t in zip(long, _tokenize(tokenizer, [corpus[i] for i in long], limit), strict=True):
        if len(t.ids) > (limit or 0):  # tokenizers' answer to a limit that is smaller than the special tokens
            raise ValueError(f"No text can be cut to {limit} tokens: the special tokens alone take as many.")
        tokens[i] = t
    return tokens


def _tokenize(tokenizer: Any, corpus: list[Any], limit: int | None) -> list[Tokens]:
    """All tokens of each text, or those that the tokenizer keeps of a text cut to `limit` tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    is_set = [getattr(backend, name, None) is not None for name in ("padding", "truncation")]
    if corpus and (limit is not None or any(is_set)):
        tokenizer = copy.deepcopy(tokenizer)
    call = _rust if hasattr(tokenizer, "encode_batch") else _transformers
    chunks = [corpus[at : at + AT_ONCE] for at in range(0, len(corpus), AT_ONCE)]
    array = lambda x: np.array(x, np.int32)
    return [
        Tokens(array(t), None if types is None else array(types))
        for chunk in chunks
        for t, types in call(tokenizer, chunk, limit)
    ]


def _rust(tokenizer: Any, chunk: list[Any], limit: int | None) -> list[tuple[list[int], list[int] | None]]:
    kept = {name: value for name, value in (tokenizer.truncation or {}).items() if name in ("strategy", "direction")}
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if limit is not None:
        tokenizer.enable_truncation(limit, **kept)
    chunk = [text if isinstance(text, str) else tuple(text) for text in chunk]  # a list would be one text in words
    return [(e.ids, e.type_ids) for e in tokenizer.encode_batch_fast(chunk)]


def _transformers(tokenizer: Any, chunk: list[Any], limit: int | None) -> list[tuple[list[int], list[int] | None]]:
    columns = [chunk] if isinstance(chunk[0], str) else [list(column) for column in zip(*chunk, strict=True)]
    # Not verbose: it would warn of texts that are longer than the tokenizer's own limit, which is not asked here.
    found = tokenizer(*columns, padding=False, truncation=limit is not None, max_length=limit, verbose=False)
    return list(zip(found["input_ids"], found.get("token_type_ids") or [None] * len(chunk), strict=True))


def _batches(sizes: Int[np.ndarray, " texts"], buckets: list[int], batch_tokens: int, fixed: bool) -> Iterator[Batch]:
    """The longest texts first: what does not fit into memory fails at once."""
    place = np.searchsorted(buckets, sizes)
    for i, length in reversed(list(enumerate(buckets))):
        texts = np.flatnonzero(place == i)
        most = max(1, batch_tokens // length)
        count = -(-len(texts) // most)
        rows = most if fixed or not count else -(-len(texts) // count)  # as even as can be: few rows are left over
        yield from (Batch(texts[at : at + rows], rows, length) for at in range(0, len(texts), rows))


@eqx.filter_jit
def _forward(
    model: Any,
    token_ids: Int[Array, "rows seq"],
    attention_mask: Int[Array, "rows seq"],
    token_type_ids: Int[Array, "rows seq"] | None,
) -> Any:
    def one(ids: Array, mask: Array, types: Array | None) -> Any:
        return model(ids, attention_mask=mask, **({} if types is None else {"token_type_ids": types}))

    return jax.vmap(one)(token_ids, attention_mask, token_type_ids)


def _run(
    model: Any, tokens: list[Tokens], batches: list[Batch], progress: Callable[[int, int], None] | None
) -> np.ndarray | list[np.ndarray]:
    config = getattr(model, "config", None)
    has_types = getattr(config, "token_types", 0) > 1 and bool(tokens) and tokens[0].types is not None
    row, axes = _output(model, batches, has_types)
    padding_id = getattr(config, "padding_id", None) or 0
    make = lambda batch: _inputs(batch, [tokens[i] for i in batch.texts], padding_id, has_types)
    out: Any = [None] * len(tokens) if axes else np.empty((len(tokens), *row.shape), row.dtype)
    done = 0
    for batch, y in _computed(model, batches, make):
        for i, x in zip(batch.texts, y, strict=False):  # rows beyond the texts are dummies
            out[i] = _own(x, axes, tokens[i], int(i), config)
        done += len(batch.texts)
        if progress is not None:
            progress(done, len(tokens))
    return out


def _computed(
    model: Any, batches: list[Batch], make: Callable[[Batch], tuple[Any, Any, Any]]
) -> Iterator[tuple[Batch, np.ndarray]]:
    # On a CPU two batches at once would fight for its cores; elsewhere one is made ready while another is computed.
    ahead = 0 if jax.default_backend() == "cpu" else 1
    waiting: deque[tuple[Batch, Any]] = deque()
    for batch in batches:
        waiting.append((batch, _forward(model, *make(batch))))
        if len(waiting) > ahead:
            first, y = waiting.popleft()
            yield first, np.asarray(y)
    yield from ((batch, np.asarray(y)) for batch, y in waiting)


def _inputs(batch: Batch, tokens: list[Tokens], padding_id: int, has_types: bool) -> tuple[Any, Any, Any]:
    shape = (batch.rows, batch.length)
    ids, mask, types = np.full(shape, padding_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask[:, 0] = 1  # of an empty text too: attention to nothing is an edge that no text should pay for
    for i in range(batch.rows):  # the dummies are the first text again, for a model may ask for a token in every row
        t = tokens[i] if i < len(tokens) else tokens[0]
        ids[i, : len(t.ids)] = t.ids
        mask[i, : len(t.ids)] = 1
        if has_types and t.types is not None:
            types[i, : len(t.ids)] = t.types
    return ids, mask, types if has_types else None


def _output(model: Any, batches: list[Batch], has_types: bool) -> tuple[jax.ShapeDtypeStruct, tuple[int, ...]]:
    """What one text gives, and which of its axes are the text's own."""
    shapes = list(dict.fromkeys((b.rows, b.length) for b in batches))[:2] or [(1, 2)]
    if len(shapes) == 1:
        rows, length = shapes[0]
        shapes.append((rows, length - 1 if length > 1 else 2))
    # Traces of shapes that will be run are not lost: JAX keeps them.
    first, second = (_shape(model, shape, has_types) for shape in shapes)
    grows = [i for i, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)) if i and a != b]
    if any((first.shape[i], second.shape[i]) != (shapes[0][1], shapes[1][1]) for i in grows):
        found = f"{first.shape[1:]} of {shapes[0][1]} tokens and {second.shape[1:]} of {shapes[1][1]}"
        raise ValueError(f"The model gives {found}: an axis that depends on the text, but is not one entry a token.")
    return jax.ShapeDtypeStruct(first.shape[1:], first.dtype), tuple(i - 1 for i in grows)


def _shape(model: Any, shape: tuple[int, int], has_types: bool) -> jax.ShapeDtypeStruct:
    given = lambda dtype: jax.ShapeDtypeStruct(shape, dtype)
    types = given(np.int32) if has_types else None
    found = eqx.filter_eval_shape(_forward, model, given(np.int32), given(np.int32), types)
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise TypeError(f"The model must give one array, but it gives {type(found).__name__}.")
    return found


def _own(x: np.ndarray, axes: tuple[int, ...], tokens: Tokens, text: int, config: Any) -> np.ndarray:
    """A text's output without what belongs to padding, in memory of its own."""
    x = np.array(x[tuple(slice(len(tokens.ids)) if i in axes else slice(None) for i in range(x.ndim))])
    if not np.isnan(x).any():
        return x
    vocab_size, largest = getattr(config, "vocab_size", None), int(tokens.ids.max())
    if vocab_size is not None and largest >= vocab_size:
        cause = f"It has the token {largest}, but the model's vocabulary has {vocab_size}: another model's tokenizer?"
    else:
        cause = "Its tokens are in the model's vocabulary, so the weights hold NaN or the numbers left their dtype."
    raise ValueError(f"The model gives NaN for texts[{text}]. {cause}")
