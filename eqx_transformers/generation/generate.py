"""The doors: `generate` and `beam_search` check a request, choose its shapes, and run the loop."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, PRNGKeyArray

from . import beam, loop
from .beam import Beams, Rule
from .loop import Ends, Prompt
from .request import (
    changing,
    ends_of,
    expect_key,
    filtering,
    number,
    prompt_of,
    real_number,
    whole,
)

Batch = Integer[Array | np.ndarray, "batch seq"]
Attended = Bool[Array | np.ndarray, "batch seq"] | Integer[Array | np.ndarray, "batch seq"]
Stream = Callable[[np.ndarray], bool | None]
UNSET: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}


def generate(
    model: Any,
    token_ids: Batch | None = None,
    *,
    attention_mask: Attended | None = None,
    memory: Any = None,
    max_new_tokens: int,
    end_ids: int | Sequence[int] | None = None,
    padding_id: int | None = None,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    key: PRNGKeyArray | None = None,
    stream: Stream | None = None,
    cache_length: int | None = None,
) -> Int[Array, "batch max_new_tokens"]:
    """The tokens that `model` continues each prompt with: its best ones, samples with a `key`, or by beam search.

    - `token_ids`, `attention_mask`: a batch of prompts. Padding (mask 0) may stand anywhere: each row gives what it
      gives alone. A model with an encoder, such as `T5`, reads them there, and its decoder begins with `start_id`.
    - `memory`: what `jax.vmap(model.encode)` made of them, in their place: to continue it in many ways, or to continue
      what no text was made of.
    - `max_new_tokens`: where every row ends. `end_ids`: tokens that end a row before, themselves included; behind them
      stands `padding_id` (the first of `end_ids` unless given, or 0). All is over when all rows have ended.
    - `min_new_tokens`: no end token before there are so many.
    - `repetition_penalty`: divides positive scores of tokens that are there already, and multiplies negative ones. The
      prompt is there, but not what an encoder reads. `no_repeat_ngram`: no n tokens in a row occur twice.
    - `key` draws from the distribution instead of taking the best token. `temperature`, `top_k`, `top_p` and `min_p`
      shape it, in this order. Row i draws from a key folded with i: the other rows change nothing.
    - `beams`, `length_penalty`, `early_stopping`: see `beam_search`, of which this gives the best sequence.
    - `stream(tokens)` is called with the next token of every row, ` batch`, as they come; True stops after them.
    - `cache_length`: slots for prompt and new tokens, to have one size for all calls; None: as many as are needed,
      rounded up.

    One program is compiled for a shape: prompts and new tokens are each rounded up to a power of two, at least 64. How
    many new tokens, which ends, and all numbers but `top_k` and `no_repeat_ngram` may change without compiling.
    Models that are equal but for the numbers in their arrays share programs.

    `model` has `init_cache(length)` and `step(token_ids, cache, *, last, attention_mask)` for one sequence (see
    `CausalLM`). Raises a `ValueError` before anything runs where an option makes no sense, the cache is too short, the
    tokens are more than the model has positions for, or its blocks are stacked; and after it ran where a score was NaN
    or every token was forbidden.
    """
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    more = {"repetition_penalty": repetition_penalty, "no_repeat_ngram": no_repeat_ngram}
    more |= {"min_new_tokens": min_new_tokens}
    expect_key(key)
    if stream is not None and not callable(stream):
        raise ValueError(f"stream must be a function of the next tokens, but it is {stream!r}.")
    if whole("beams", beams, 1) > 1:
        _expect_unset(f"beams = {beams} search for the likeliest sequence", sampling | {"key": key, "stream": stream})
        found = beam_search(
            model,
            token_ids,
            attention_mask=attention_mask,
            memory=memory,
            max_new_tokens=max_new_tokens,
            end_ids=end_ids,
            padding_id=padding_id,
            beams=beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            cache_length=cache_length,
            **more,
        )
        return jax.device_put(np.asarray(found.tokens)[:, 0])
    _expect_unset("beams = 1", {"length_penalty": length_penalty, "early_stopping": early_stopping})
    if key is None:
        _expect_unset("without a key the best token is taken", sampling)
    ends = ends_of(end_ids, padding_id, model)
    processors = changing(ends, **more) + filtering(**sampling)
    new = whole("max_new_tokens", max_new_tokens, 1)
    prompt = prompt_of(model, token_ids, attention_mask, memory, new, cache_length)
    if stream is None:
        tokens, sound = loop.run(model, prompt, number(new, np.int32), processors, ends, key)
    else:
        tokens, sound = _streamed(model, prompt, new, processors, ends, key, stream)
    _expect_sound(sound)
    return jax.device_put(np.asarray(tokens)[:, :new])  # JAX's own slice would be one more program


def beam_search(
    model: Any,
    token_ids: Batch | None = None,
    *,
    attention_mask: Attended | None = None,
    memory: Any = None,
    max_new_tokens: int,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    end_ids: int | Sequence[int] | None = None,
    padding_id: int | None = None,
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int | None = None,
    cache_length: int | None = None,
) -> Beams:
    r"""The `beams` best continuations of each prompt that were found, the best first, and their scores.

    Of every row the `beams` likeliest sequences are kept. The score of one that has ended, of $n$ new tokens, is
    $\sum \log p / n^{\mathrm{length\_penalty}}$: above 0 longer ones gain, below 0 they lose.

    - `early_stopping=False`: a row is done when its best sequence under way, scored as if it ended now, is no better
      than the worst of `beams` ended ones. True: as soon as `beams` have ended. "never": when even at the length that
      is best for its score it could not be better.

    All else is as in `generate`. A row needs `beams` times its cache. Source: transformers' beam search, 5.x.
    """
    ends = ends_of(end_ids, padding_id, model)
    if early_stopping != "never" and not isinstance(early_stopping, bool | np.bool_):
        raise ValueError(f"early_stopping must be True, False or 'never', but it is {early_stopping!r}.")
    length_penalty = real_number("length_penalty", length_penalty, "a number", lambda x: True)
    processors = changing(
        ends,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram=no_repeat_ngram,
        min_new_tokens=min_new_tokens,
    )
    beams = whole("beams", beams, 1)
    new = whole("max_new_tokens", max_new_tokens, 1)
    prompt = prompt_of(model, token_ids, attention_mask, memory, new, cache_length)
    when = number(early_stopping != "never" and bool(early_stopping), bool), number(early_stopping == "never", bool)
    rule = Rule(beams, *when, number(length_penalty), number(new, np.int32))
    found, sound = beam.run(model, prompt, processors, ends, rule)
    _expect_sound(sound)
    return found._replace(tokens=jax.device_put(np.asarray(found.tokens)[..., :new]))


def _streamed(
    model: Any,
    prompt: Prompt,
    new: int,
    processors: tuple[Any, ...],
    ends: Ends,
    key: PRNGKeyArray | None,
    stream: Stream,
) -> tuple[Int[Array, "batch new"], Bool[Array, ""]]:
    """The same in steps of one token, each of which is handed on before the next one is computed."""
    stepper, state, token = loop.run_begin(model, prompt, processors, ends, key)
    for count in range(1, new + 1):
        _expect_sound(state.sound)
        wants_no_more = stream(np.asarray(token))
        if wants_no_more or count == new or np.asarray(state.ended).all():
            break
        state, token = loop.run_advance((stepper, processors, ends, key), state, prompt.width)
    return loop.filled(state, prompt.width, ends), state.sound


def _expect_unset(why: str, options: dict[str, Any]) -> None:
    defaults = UNSET | {"key": None, "stream": None, "length_penalty": 1.0, "early_stopping": False}
    given = [name for name, value in options.items() if value is not defaults[name] and value != defaults[name]]
    if given:
        raise ValueError(
            f"{', '.join(given)}: no effect here, for {why}. Leave {'it' if len(given) == 1 else 'them'} out."
        )


def _expect_sound(sound: Bool[Array, ""]) -> None:
    if not sound:
        raise ValueError(
            "No token could be chosen: the model's scores are NaN (a token id outside of its vocabulary gives that, and"
            " weights or activations that overflow), or no_repeat_ngram forbids every token that is left. Check"
            " token_ids, end_ids and padding_id against the tokenizer, or ask for fewer new tokens."
        )
