"""What a caller asks for, checked before anything runs, in the form that the loop takes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .loop import Ends, Prompt
from .processors import MinNewTokens, MinP, NoRepeatNgram, RepetitionPenalty, Temperature, TopK, TopP

SHORTEST = 64  # slots of a bucket: fewer cost about as much
STEP = 16  # slots by which a prompt's bucket is cut where `cache_length` leaves too few
TINIEST = 1e-30  # of what scores are divided by: less would make them infinite


def bucket(size: int) -> int:
    """The power of two, at least 64, that holds `size`: one program serves all sizes of a bucket."""
    return max(SHORTEST, 1 << (size - 1).bit_length())


def prompt_of(
    model: Any, token_ids: Any, attention_mask: Any, memory: Any, new: int, cache_length: int | None
) -> Prompt:
    """The prompts in the smallest bucket, with room for `new` tokens. Raises a `ValueError` for what cannot be."""
    _expect_model(model)
    if hasattr(model, "encode"):
        return _prompt_of_encoder(model, token_ids, attention_mask, memory, new, cache_length)
    if memory is not None:
        raise ValueError(f"memory is what an encoder made of the prompts, and a {type(model).__name__} has none.")
    ids, real, longest = _rows(model, token_ids, attention_mask)
    _expect_room(model, longest, new)
    width = bucket(longest)
    if cache_length is None:
        return Prompt(*map(jax.device_put, _placed(ids, real, width)), None, width, width + bucket(new))
    length = _length(cache_length, longest, new, f"the longest prompt has {longest} tokens")
    if width + new > length:  # what is left, in steps: a few more new tokens are no other program
        left = length - new
        width = left // STEP * STEP if left // STEP * STEP >= longest else left
    return Prompt(*map(jax.device_put, _placed(ids, real, width)), None, width, length)


def _prompt_of_encoder(
    model: Any, token_ids: Any, attention_mask: Any, memory: Any, new: int, cache_length: int | None
) -> Prompt:
    """Of a model whose decoder begins with one token of its own."""
    if model.start_id is None:
        raise ValueError("The config names no start_id, with which the decoder's input begins; T5's own is 0.")
    length = 1 + bucket(new) if cache_length is None else _length(cache_length, 1, new, "there is a start token")
    if memory is None:
        ids, real, longest = _rows(model, token_ids, attention_mask)
        placed = (ids, real) if model.counts_padding else _placed(ids, real, bucket(longest))
        return Prompt(*map(jax.device_put, placed), None, 1, length)
    if token_ids is not None or attention_mask is not None:
        raise ValueError("memory is what the encoder made of the prompts: give either it, or token_ids and their mask.")
    _expect_untraced("memory", memory)
    _expect_memory(model, memory)
    return Prompt(None, None, memory, 1, length)


def _expect_memory(model: Any, memory: Any) -> None:
    """Raises a `ValueError` for what is not a batch of what the model's `encode` gives."""
    wanted = jax.tree.map(lambda axes: axes + 1, model.memory_axes)
    alike = jax.tree.structure(memory) == jax.tree.structure(wanted)
    rows = {jnp.shape(x)[:1] for x in jax.tree.leaves(memory)}
    if not alike or jax.tree.map(jnp.ndim, memory) != wanted or len(rows) != 1 or rows == {(0,)}:
        shapes = ", ".join(str(jnp.shape(x)) for x in jax.tree.leaves(memory))
        raise ValueError(f"memory must be a batch, jax.vmap(model.encode)(…), but it is {shapes or type(memory)}.")


def _length(cache_length: int, before: int, new: int, said: str) -> int:
    length = whole("cache_length", cache_length, 1)
    if length < before + new:
        raise ValueError(
            f"cache_length = {length} is too short: {said} and max_new_tokens = {new}, which takes {before + new}"
            " slots. Leave cache_length out to have it fit."
        )
    return length


def _rows(model: Any, token_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """The prompts, which of their tokens are real, and how many at most in a row."""
    ids = _ids(token_ids)
    real = _real(model, ids, attention_mask)
    return ids, real, max(1, int(real.sum(1).max()))


def _expect_model(model: Any) -> None:
    if not (hasattr(model, "init_cache") and hasattr(model, "step") and hasattr(model, "scores")):
        raise ValueError(
            f"generate needs a model with scores of the next token and a cache, such as CausalLM or T5, but it is"
            f" {type(model).__name__}. CausalLM.of(decoder, key=…) puts an output on a bare decoder; a T5Model's file"
            " is loaded with head=T5."
        )
    _expect_untraced("model", model)


def _expect_untraced(name: str, tree: Any) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
        raise ValueError(
            f"{name} is being traced, but generate compiles its own loop and chooses its shapes by the prompts: call it"
            " outside of jit, vmap and grad."
        )


def _concrete(name: str, x: Any) -> np.ndarray:
    _expect_untraced(name, x)
    return np.asarray(x)


def _ids(token_ids: Any) -> np.ndarray:
    if token_ids is None:
        raise ValueError("token_ids is None: nothing is there to continue.")
    ids = _concrete("token_ids", token_ids)
    if ids.ndim == 1:
        raise ValueError(f"token_ids must be 'batch seq', but it is {ids.shape}: give token_ids[None] for one row.")
    if ids.ndim != 2:
        raise ValueError(f"token_ids must be 'batch seq', but it is {ids.shape}.")
    if 0 in ids.shape:
        raise ValueError(f"token_ids is empty, {ids.shape}: every row needs a token to begin with.")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token_ids must be integers, but it is {ids.dtype}.")
    if ids.min() < 0 or ids.max() >= 2**31:
        raise ValueError(
            f"token_ids must be numbers of tokens, from 0, but there is {ids[(ids < 0) | (ids >= 2**31)][0]}."
        )
    return ids.astype(np.int32)


def _real(model: Any, ids: np.ndarray, attention_mask: Any) -> np.ndarray:
    """Which tokens are not padding; without a mask all, but for those that the model itself would hide."""
    if attention_mask is None:
        hidden = getattr(_body(model), "hidden_id", None)
        return np.ones(ids.shape, bool) if hidden is None else ids != hidden
    mask = _concrete("attention_mask", attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be as token_ids, {ids.shape}, but it is {mask.shape}.")
    if not (mask.dtype == bool or np.issubdtype(mask.dtype, np.integer)):
        raise ValueError(f"attention_mask must be bool or integers, 1 for a token, but it is {mask.dtype}.")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("attention_mask must hold 0 and 1 (or False and True), but there are other values in it.")
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


def _placed(ids: np.ndarray, real: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The real tokens of every row in their order at the right edge; zeros before them."""
    order = np.argsort(real, axis=1, kind="stable")[:, -width:]
    ids, real = (np.take_along_axis(x, order, axis=1) for x in (ids, real))
    left = ((0, 0), (width - ids.shape[1], 0))
    return np.pad(np.where(real, ids, 0), left), np.pad(real, left)


def ends_of(end_ids: int | Sequence[int] | None, padding_id: int | None, model: Any = None) -> Ends:
    """`end_ids` as an array; `padding_id` is the first of them unless given, or 0.

    Raises a `ValueError` for an end that is not in the vocabulary that the model's config names: it would never come.
    """
    given = [] if end_ids is None else np.asarray(end_ids).reshape(-1).tolist()
    for name, x in [*(("end_ids", x) for x in given), *([] if padding_id is None else [("padding_id", padding_id)])]:
        if not isinstance(x, int | np.integer) or isinstance(x, bool) or not 0 <= x < 2**31:
            raise ValueError(f"{name} must be token ids, whole numbers from 0, but there is {x!r}.")
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab_size is not None and given and max(given) >= vocab_size:
        raise ValueError(f"end_ids: there is {max(given)}, but the model has {vocab_size} tokens, from 0 on.")
    padding = padding_id if padding_id is not None else given[0] if given else 0
    return Ends(jax.device_put(np.array(list(dict.fromkeys(given)), np.int32)), number(padding, np.int32))


def changing(
    ends: Ends, *, repetition_penalty: float = 1.0, no_repeat_ngram: int | None = None, min_new_tokens: int = 0
) -> tuple[Any, ...]:
    """The processors that act on every way of choosing, in transformers' order."""
    found: list[Any] = []
    if real_number("repetition_penalty", repetition_penalty, "more than 0", lambda x: x > TINIEST) != 1.0:
        found.append(RepetitionPenalty(number(repetition_penalty)))
    if no_repeat_ngram is not None:
        found.append(NoRepeatNgram(whole("no_repeat_ngram", no_repeat_ngram, 1)))
    if whole("min_new_tokens", min_new_tokens, 0):
        if not len(ends.ids):
            raise ValueError(
                f"min_new_tokens = {min_new_tokens}: no effect here, for nothing ends a row: give end_ids."
            )
        found.append(MinNewTokens(ends.ids, number(min_new_tokens, np.int32)))
    return tuple(found)


def filtering(
    *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> tuple[Any, ...]:
    """The processors that shape a distribution to be sampled from, in transformers' order."""
    found: list[Any] = []
    said = "more than 0 (without a key, the best token is taken)"
    if real_number("temperature", temperature, said, lambda x: x > TINIEST) != 1.0:
        found.append(Temperature(number(temperature)))
    if top_k is not None:
        found.append(TopK(whole("top_k", top_k, 1)))
    if top_p is not None:
        real_number("top_p", top_p, "more than 0 and at most 1", lambda x: 0 < x <= 1)
        found += [TopP(number(1.0 - top_p))] if top_p < 1 else []
    if min_p is not None:
        real_number("min_p", min_p, "from 0 to 1", lambda x: 0 <= x <= 1)
        found.append(MinP(number(min_p)))
    return tuple(found)


def whole(name: str, x: Any, least: int) -> int:
    """`x`, which must be a whole number of at least `least`."""
    if not isinstance(x, int | np.integer) or isinstance(x, bool) or x < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, but it is {x!r}.")
    return int(x)


def real_number(name: str, x: Any, said: str, holds: Callable[[float], bool]) -> float:
    """`x`, which must be a finite number of which `holds` is true, as `said`."""
    is_number = isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)
    if not is_number or not math.isfinite(x) or not holds(float(x)):
        raise ValueError(f"{name} must be {said}, but it is {x!r}.")
    return float(x)


def expect_key(key: Any) -> None:
    """One key, as `jax.random.key` makes it, or none."""
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = getattr(key, "dtype", None) == jnp.uint32 and key.shape == (2,)
    if key is not None and not raw and not (typed and key.shape == ()):
        raise ValueError(f"key must be one random key, jax.random.key(…), but it is {type(key).__name__}.")


def number(x: float | int | bool, dtype: Any = np.float32) -> jax.Array:
    """Traced, so that another value is no other program; `device_put` compiles nothing, where `jnp.asarray` does."""
    return jax.device_put(np.asarray(x, dtype))
