"""What a caller asks for, checked before anything runs, in the form that the loop takes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from .loop import Ends
from .processors import MinNewTokens, MinP, NoRepeatNgram, RepetitionPenalty, Temperature, TopK, TopP

SHORTEST = 64  # slots of a bucket: fewer cost about as much


class Prompt(NamedTuple):
    """Rows of tokens that end at the right edge, and how many slots a cache has for them and what follows."""

    ids: Int[Array, "rows prompt"]
    real: Bool[Array, "rows prompt"]
    length: int


def bucket(size: int) -> int:
    """The power of two, at least 64, that holds `size`: one program serves all sizes of a bucket."""
    return max(SHORTEST, 1 << (size - 1).bit_length())


def prompt_of(model: Any, token_ids: Any, attention_mask: Any, max_new_tokens: int, cache_length: int | None) -> Prompt:
    """The prompts in the smallest bucket, with room for `max_new_tokens`. Raises a `ValueError` for what cannot be."""
    whole("max_new_tokens", max_new_tokens, 1)
    ids = _ids(token_ids)
    real = _real(model, ids, attention_mask)
    longest = max(1, int(real.sum(1).max()))
    _expect_room(model, longest, max_new_tokens)
    width, length = bucket(longest), cache_length
    if length is None:
        length = width + bucket(max_new_tokens)
    elif length < longest + max_new_tokens:
        raise ValueError(
            f"cache_length = {length} is too short: the longest prompt has {longest} tokens and max_new_tokens ="
            f" {max_new_tokens}, which takes {longest + max_new_tokens} slots. Leave cache_length out to have it fit."
        )
    width = min(width, length - max_new_tokens)
    return Prompt(*map(jnp.asarray, _compacted(ids, real, width)), length)


def _concrete(name: str, x: Any) -> np.ndarray:
    if isinstance(x, jax.core.Tracer):
        raise ValueError(
            f"{name} is being traced, but generate compiles its own loop and chooses its shapes by the prompts: call it"
            " outside of jit, vmap and grad."
        )
    return np.asarray(x)


def _ids(token_ids: Any) -> np.ndarray:
    ids = _concrete("token_ids", token_ids)
    if ids.ndim == 1:
        raise ValueError(f"token_ids must be 'batch seq', but it is {ids.shape}: give token_ids[None] for one row.")
    if ids.ndim != 2:
        raise ValueError(f"token_ids must be 'batch seq', but it is {ids.shape}.")
    if 0 in ids.shape:
        raise ValueError(f"token_ids is empty, {ids.shape}: every row needs a token to begin with.")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token_ids must be integers, but it is {ids.dtype}.")
    return ids.astype(np.int32)


def _real(model: Any, ids: np.ndarray, attention_mask: Any) -> np.ndarray:
    """Which tokens are not padding; without a mask all, but for those that the model itself would hide."""
    if attention_mask is None:
        hidden = getattr(_body(model), "hidden_id", None)
        return np.ones(ids.shape, bool) if hidden is None else ids != hidden
    mask = _concrete("attention_mask", attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be as token_ids, {ids.shape}, but it is {mask.shape}.")
    if not (mask.dtype == bool or np.issubdtype(mask.dtype, np.integer)) or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"attention_mask must hold 0 and 1 (or False and True), but it is {mask.dtype} of other values."
        )
    return mask.astype(bool)


def _body(model: Any) -> Any:
    """What says how many positions there are, and which token is hidden where no mask is given."""
    return getattr(model, "backbone", model)


def _expect_room(model: Any, longest: int, max_new_tokens: int) -> None:
    room = getattr(_body(model), "room", None)
    needed = longest + max_new_tokens - 1  # the last token is not read any more
    if room is not None and needed > room:
        raise ValueError(
            f"The longest prompt has {longest} tokens and max_new_tokens = {max_new_tokens}: that takes {needed}"
            f" positions, but the model has {room}. Ask for at most {max(0, room - longest + 1)} new tokens, or cut the"
            " prompt."
        )


def _compacted(ids: np.ndarray, real: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The real tokens of every row in their order at the right edge; zeros before them."""
    order = np.argsort(real, axis=1, kind="stable")[:, -width:]
    ids, real = (np.take_along_axis(x, order, axis=1) for x in (ids, real))
    left = ((0, 0), (width - ids.shape[1], 0))
    return np.pad(np.where(real, ids, 0), left), np.pad(real, left)


def ends_of(end_ids: int | Sequence[int] | None, padding_id: int | None) -> Ends:
    """`end_ids` as an array; `padding_id` is the first of them unless given, or 0."""
    given = [] if end_ids is None else np.asarray(end_ids).reshape(-1).tolist()
    for name, x in [*(("end_ids", x) for x in given), *([] if padding_id is None else [("padding_id", padding_id)])]:
        if not isinstance(x, int | np.integer) or isinstance(x, bool) or x < 0:
            raise ValueError(f"{name} must be token ids, whole numbers from 0, but there is {x!r}.")
    padding = padding_id if padding_id is not None else given[0] if given else 0
    return Ends(jnp.asarray(np.array(given, np.int32)), number(padding, np.int32))


def changing(
    ends: Ends, *, repetition_penalty: float = 1.0, no_repeat_ngram: int | None = None, min_new_tokens: int = 0
) -> tuple[Any, ...]:
    """The processors that act on every way of choosing, in transformers' order."""
    found: list[Any] = []
    if repetition_penalty != 1.0:
        _expect("repetition_penalty", repetition_penalty, repetition_penalty > 0, "more than 0")
        found.append(RepetitionPenalty(number(repetition_penalty)))
    if no_repeat_ngram is not None:
        found.append(NoRepeatNgram(whole("no_repeat_ngram", no_repeat_ngram, 1)))
    if whole("min_new_tokens", min_new_tokens, 0) and len(ends.ids):
        found.append(MinNewTokens(ends.ids, number(min_new_tokens, np.int32)))
    return tuple(found)


def filtering(
    *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> tuple[Any, ...]:
    """The processors that shape a distribution to be sampled from, in transformers' order."""
    found: list[Any] = []
    if temperature != 1.0:
        _expect("temperature", temperature, temperature > 0, "more than 0 (without a key, the best token is taken)")
        found.append(Temperature(number(temperature)))
    if top_k is not None:
        found.append(TopK(whole("top_k", top_k, 1)))
    if top_p is not None:
        _expect("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1")
        found += [TopP(number(1.0 - top_p))] if top_p < 1 else []
    if min_p is not None:
        _expect("min_p", min_p, 0 <= min_p <= 1, "from 0 to 1")
        found.append(MinP(number(min_p)))
    return tuple(found)


def whole(name: str, x: Any, least: int) -> int:
    """`x`, which must be a whole number of at least `least`."""
    if not isinstance(x, int | np.integer) or isinstance(x, bool) or x < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, but it is {x!r}.")
    return int(x)


def _expect(name: str, x: Any, holds: bool, said: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {said}, but it is {x!r}.")


def number(x: float | int | bool, dtype: Any = np.float32) -> jax.Array:
    """Traced, so that another value is no other program."""
    return jnp.asarray(np.asarray(x, dtype))
