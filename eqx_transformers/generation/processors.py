"""What may come next: each processor changes the scores of one row's next token, given the tokens so far.

The formulas, and the order in which `generate` applies them, are those of transformers' logits processors. Padding is
no token: it is not penalised, it is in no n-gram, and where it stands changes nothing.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Scores = Float[Array, " vocab"]
BLOCK = 128  # numbers


class SoFar(NamedTuple):
    """One row's tokens: the `real` ones of its `length` slots, the last one before slot `index`; `new` are new."""

    ids: Int[Array, " length"]
    real: Bool[Array, " length"]
    index: Int[Array, ""]
    new: Int[Array, ""]


def _divided(scores: Scores, by: Float[Array, ""]) -> Scores:
    """Rounded once. XLA turns a division by one number into a product with its reciprocal, which differs in the last
    place; this divisor is one number too, but XLA cannot know it."""
    return scores / jnp.where(jnp.isnan(scores), scores, by)


def highest(
    x: Float[Array, "*rows numbers"], count: int
) -> tuple[Float[Array, "*rows found"], Int[Array, "*rows found"]]:
    """The greatest numbers of every row, in order, and where they are: of equal ones, the first."""
    blocks = x.shape[-1] // BLOCK
    if x.shape[-1] % BLOCK or blocks <= 4 * count:
        return _highest(x, count)
    # The greatest are in the blocks with the greatest maxima, which are found in a twentieth of the time. In their
    # order, the first of equal numbers is the first one.
    parts = x.reshape(*x.shape[:-1], blocks, BLOCK)
    chosen = jnp.sort(_highest(parts.max(-1), count)[1], axis=-1)
    held = jnp.take_along_axis(parts, chosen[..., None], axis=-2).reshape(*x.shape[:-1], -1)
    scores, places = _highest(held, count)
    return scores, jnp.take_along_axis(chosen, places // BLOCK, axis=-1) * BLOCK + places % BLOCK


def _highest(x: Float[Array, "*rows numbers"], count: int) -> tuple[Array, Array]:
    # The barrier keeps XLA from seeing that only a part of them may be used: then it would sort whole rows, which of a
    # vocabulary takes longer than the model.
    scores, places = jax.lax.optimization_barrier(jax.lax.top_k(x, count))
    return scores, places


class RepetitionPenalty(eqx.Module):
    """Scores of tokens that are there already: divided by `penalty` where positive, multiplied by it where negative.

    Source: Keskar et al. 2019, arXiv:1909.05858.
    """

    penalty: Float[Array, ""]

    def __call__(self, scores: Scores, so_far: SoFar) -> Scores:
        places = jnp.where(so_far.real, so_far.ids, scores.shape[-1])
        seen = jnp.zeros(scores.shape, bool).at[places].set(True, mode="drop")
        changed = jnp.where(scores < 0, scores * self.penalty, _divided(scores, self.penalty))
        return jnp.where(seen, changed, scores)


class NoRepeatNgram(eqx.Module):
    """-inf for what would complete an n-gram, `size` tokens in a row, that is there already."""

    size: int = eqx.field(static=True)

    def __call__(self, scores: Scores, so_far: SoFar) -> Scores:
        count, vocab = so_far.ids.shape[-1] - self.size + 1, scores.shape[-1]
        if count < 1:
            return scores
        window = lambda x, i: jax.lax.slice_in_dim(x, i, i + count)
        last = lambda x: jax.lax.dynamic_slice_in_dim(x, so_far.index - (self.size - 1), self.size - 1)
        ids, real = last(so_far.ids), last(so_far.real)
        matches = window(so_far.real, self.size - 1)
        for i in range(self.size - 1):
            matches &= (window(so_far.ids, i) == ids[i]) & window(so_far.real, i) & real[i]
        places = jnp.where(matches, window(so_far.ids, self.size - 1), vocab)
        return scores.at[places].set(-jnp.inf, mode="drop")


class MinNewTokens(eqx.Module):
    """-inf for the end tokens, until there are `least` new tokens."""

    end_ids: Int[Array, " ends"]
    least: Int[Array, ""]

    def __call__(self, scores: Scores, so_far: SoFar) -> Scores:
        return jnp.where(so_far.new < self.least, scores.at[self.end_ids].set(-jnp.inf, mode="drop"), scores)


class Temperature(eqx.Module):
    """Scores divided by `temperature`: below 1 the likely becomes likelier."""

    temperature: Float[Array, ""]

    def __call__(self, scores: Scores, so_far: SoFar) -> Scores:
        return _divided(scores, self.temperature)


class TopK(eqx.Module):
    """-inf for all but the `k` highest scores; those that equal the lowest of these stay too."""

    k: int = eqx.field(static=True)

    def __call__(self, scores: Scores, so_far: SoFar) -> Scores:
        least = highest(scores, min(self.k, scores.shape[-1]))[0][-1]
        return jnp.where(scores < least, -jnp.inf, scores)


class TopP(eqx.Module):
    """-inf for the least likely tokens that together have at most the probability `tail`; the likeliest always stays.

    `tail` is 1 - p, taken before anything is rounded to float32. Source: Holtzman et al. 2020, arXiv:1904.09751.
    """

    tail: Float[Array, ""]

    def __call__(self, scores: Scores, so_far: SoFar) -> Scores:
        order = jnp.argsort(scores)
        drop = jnp.cumsum(jax.nn.softmax(scores[order])) <= self.tail
        return jnp.where(jnp.zeros(scores.shape, bool).at[order].set(drop.at[-1].set(False)), -jnp.inf, scores)


class MinP(eqx.Module):
    """-inf for tokens that are less likely than `share` times the likeliest.

    Source: Nguyen et al. 2024, arXiv:2407.01082.
    """

    share: Float[Array, ""]

    def __call__(self, scores: Scores, so_far: SoFar) -> Scores:
        likely = jax.nn.softmax(scores)
        return jnp.where(likely < self.share * likely.max(), -jnp.inf, scores)


def processed(processors: tuple[Any, ...], scores: Scores, so_far: SoFar) -> Scores:
    """`scores` after all `processors`, in their order."""
    for process in processors:
        scores = process(scores, so_far)
    return scores
