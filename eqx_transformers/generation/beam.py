"""Beam search: the likeliest continuations that are kept, and those that have ended, side by side.

The bookkeeping is transformers' (`GenerationMixin._beam_search` of 5.x), so that the same sequences win: of `keep`
candidates a row, the best `beams` that have not ended go on; of those among the first `beams` that have, the best by
score are remembered. A score is the sum of log probabilities over the number of new tokens to the power of
`length_penalty`.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .loop import Ends, Prompt, Start, caches, settled, start_of, stepped, wide
from .processors import SoFar, highest, processed
from .turned import for_rows

NEVER = -1e9  # a score that is out of the running, as a number that can be added


class Beams(NamedTuple):
    """The sequences that beam search found for every row, the best first, and their scores.

    `tokens` are padded behind their ends.
    """

    tokens: Int[Array, "batch beams new"]
    scores: Float[Array, "batch beams"]


class Rule(NamedTuple):
    """How sequences compete, as `beam_search` says: `at_once` is its `early_stopping=True`, `patient` its "never".

    `bound` is the number of new tokens at most. All but the number of beams may change without compiling.
    """

    beams: int
    at_once: Bool[Array, ""]
    patient: Bool[Array, ""]
    length_penalty: Float[Array, ""]
    bound: Int[Array, ""]


class Search(NamedTuple):
    """Beams that are under way (`ids`, `real`, `running`), and the best ended ones (`tokens`, `scores`, `finished`).

    `open` rows may still find a better one. `more` is False when nothing can.
    """

    cache: Any
    ids: Int[Array, "batch beams length"]
    real: Bool[Array, "batch beams length"]
    running: Float[Array, "batch beams"]
    tokens: Int[Array, "batch beams new"]
    scores: Float[Array, "batch beams"]
    finished: Bool[Array, "batch beams"]
    open: Bool[Array, " batch"]
    new: Int[Array, ""]
    more: Bool[Array, ""]
    sound: Bool[Array, ""]


def pick(x: Array, index: Int[Array, "batch chosen"]) -> Array:
    """The chosen ones of every row's beams."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, index)


def flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def opened(start: Start, cache: Any, length: int, rule: Rule, ends: Ends) -> Search:
    """Before the first token: all beams of a row are alike, so that only the first one counts."""
    batch, prompt, beams = len(start.ids), start.ids.shape[-1], rule.beams
    alike = lambda x: jnp.repeat(wide(x, length)[:, None], beams, axis=1)
    first = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, NEVER)[None, :], (batch, beams))
    return Search(
        cache=caches(lambda one: one.branched(beams), cache, cache.axes),
        ids=alike(start.ids),
        real=alike(start.real),
        running=first,
        tokens=jnp.full((batch, beams, length - prompt), ends.padding_id),
        scores=jnp.full((batch, beams), NEVER),
        finished=jnp.zeros((batch, beams), bool),
        open=jnp.ones(batch, bool),
        new=jnp.zeros((), jnp.int32),
        more=jnp.ones((), bool),
        sound=jnp.ones((), bool),
    )


class Candidates(NamedTuple):
    """The best continuations of every row, the best first; `beam` is the one that each continues."""

    scores: Float[Array, "batch keep"]
    beam: Int[Array, "batch keep"]
    token: Int[Array, "batch keep"]
    ended: Bool[Array, "batch keep"]


def candidates(
    search: Search, scores: Float[Array, "rows vocab"], prompt: int, processors: tuple[Any, ...], ends: Ends, rule: Rule
) -> Candidates:
    """So many that `beams` of them go on, even where every beam's best continuations are ends."""
    batch, beams, vocab = *search.running.shape, scores.shape[-1]
    keep = max(2, 1 + len(ends.ids)) * beams
    if keep > beams * vocab:
        raise ValueError(f"{len(ends.ids)} end tokens leave no other one to go on with, of a vocabulary of {vocab}.")
    index = prompt + search.new
    one = lambda s, ids, real: processed(processors, s, SoFar(ids, real, index, search.new))
    likely = jax.vmap(one)(jax.nn.log_softmax(scores), flat(search.ids), flat(search.real))
    total = (likely.reshape(batch, beams, vocab) + search.running[..., None]).reshape(batch, -1)
    scores, place = highest(total, keep)
    token = place % vocab
    ended = jnp.any(token[..., None] == ends.ids[None, None, :], axis=-1) | (search.new + 1 >= rule.bound)
    return Candidates(scores, place // vocab, token, ended)


def updated(
    search: Search, scores: Float[Array, "rows vocab"], prompt: int, processors: tuple[Any, ...], ends: Ends, rule: Rule
) -> Search:
    """With one more token: the beams that go on, with the caches of those that they continue, and what has ended."""
    found = candidates(search, scores, prompt, processors, ends, rule)
    new = search.new + 1
    running, chosen = highest(found.scores + jnp.where(found.ended, NEVER, 0.0), rule.beams)
    from_beam, token = pick(found.beam, chosen), pick(found.token, chosen)
    at = prompt + search.new
    grow = lambda x, last: jax.lax.dynamic_update_slice_in_dim(pick(x, from_beam), last[..., None], at, 2)
    tokens, best, finished = remembered(search, found, prompt, ends, rule)
    open = search.open & improvable(running, best, finished, new, rule)
    done = rule.at_once & finished.all()
    search = Search(
        cache=search.cache,
        ids=grow(search.ids, token),
        real=grow(search.real, jnp.ones_like(token, bool)),
        running=running,
        tokens=tokens,
        scores=best,
        finished=finished,
        open=open,
        new=new,
        more=open.any() & ~done & ~found.ended.all(),
        sound=search.sound & jnp.all(jnp.isfinite(found.scores[:, 0]) | ~search.open),
    )
    axes = search.cache.axes
    return search._replace(cache=jax.vmap(lambda c, i: c.follow(i), (axes, 0), axes)(search.cache, from_beam))


def advanced(
    model: Any, ids: Int[Array, "batch beams"], cache: Any, real: Bool[Array, "batch beams"]
) -> tuple[Float[Array, "rows vocab"], Any]:
    """The scores of every beam's next token, and the caches with these."""
    step = lambda ids, cache, real: model.step(ids, cache, attention_mask=real)
    scores, cache = jax.vmap(step, (0, cache.axes, 0), (0, cache.axes))(ids, cache, real)
    return flat(scores).astype(jnp.float32), cache


def remembered(
    search: Search, found: Candidates, prompt: int, ends: Ends, rule: Rule
) -> tuple[Int[Array, "batch beams new"], Float[Array, "batch beams"], Bool[Array, "batch beams"]]:
    """The best ended sequences, their scores, and which of them there are."""
    ended = found.ended & (jnp.arange(found.scores.shape[-1]) < rule.beams)[None, :]
    scores = found.scores / (search.new + 1).astype(jnp.float32) ** rule.length_penalty
    full = search.finished.all(axis=1) & rule.at_once
    out = (full | ~search.open)[:, None]
    scores = scores + jnp.where(out, NEVER, 0.0) + jnp.where(ended, 0.0, NEVER)
    joined = lambda a, b: jnp.concatenate([a, b], axis=1)
    best, chosen = highest(joined(search.scores, scores), rule.beams)
    tokens = joined(search.tokens, _written(search, found, prompt, ends))
    return pick(tokens, chosen), best, pick(joined(search.finished, ended), chosen)


def _written(search: Search, found: Candidates, prompt: int, ends: Ends) -> Int[Array, "batch keep new"]:
    """The new tokens of the candidates, padded."""
    tokens = pick(search.ids[:, :, prompt:], found.beam)
    slots = jnp.arange(tokens.shape[-1])[None, None, :]
    tokens = jnp.where(slots == search.new, found.token[..., None], tokens)
    return jnp.where(slots > search.new, ends.padding_id, tokens)


def improvable(running: Array, best: Array, finished: Array, new: Int[Array, ""], rule: Rule) -> Bool[Array, " batch"]:
    """Whether the best beam under way could still surpass the worst ended one."""
    length = jnp.where(rule.patient & (rule.length_penalty > 0), rule.bound, new).astype(jnp.float32)
    possible = running[:, :1] / length**rule.length_penalty
    worst = jnp.where(finished, best.min(axis=1, keepdims=True), NEVER)
    return jnp.any(possible > worst, axis=1)


@eqx.filter_jit
def run(
    model: Any, prompt: Prompt, processors: tuple[Any, ...], ends: Ends, rule: Rule
) -> tuple[Beams, Bool[Array, ""]]:
    """All of it as one program, and whether no score was NaN."""
    width = prompt.width
    # The prompt's slots serve all beams, and no step reads the last token.
    slots = width + max(1, prompt.length - width - 1) * rule.beams
    start = start_of(model, prompt._replace(length=slots))
    rows = len(start.ids)
    scores, cache = stepped(model, start.ids, start.cache, start.real)
    search = opened(start, cache, prompt.length, rule, ends)
    search = updated(search, jnp.repeat(scores, rule.beams, axis=0), width, processors, ends, rule)
    model = for_rows(model, rows * rule.beams)

    def turn(search: Search) -> Search:
        at = lambda x: jax.lax.dynamic_index_in_dim(x, width + search.new - 1, axis=2, keepdims=False)
        scores, cache = advanced(model, at(search.ids), search.cache, at(search.real))
        return updated(search._replace(cache=cache), scores, width, processors, ends, rule)

    search = jax.lax.while_loop(lambda search: search.more, turn, settled(search))
    return Beams(search.tokens, search.scores), search.sound
