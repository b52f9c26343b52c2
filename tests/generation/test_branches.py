"""A text that goes on in several ways at once, in one cache: every way has the scores that it has alone."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from .twins import CONFIGS, prompts, twins

BRANCHES, TURNS, TRUNK = 3, 6, 7
SPARE = 5  # slots that stay empty
# Parents that stay, that change places, that end, and one from which all go on.
PARENTS = np.array([[0, 1, 2], [2, 0, 1], [0, 0, 2], [1, 1, 1], [2, 1, 0]])
GIVEN = prompts(TURNS, BRANCHES, seed=3)


@eqx.filter_jit
def first(model, ids, real, slots):
    state = model.init_cache(model.encode(ids), slots) if hasattr(model, "encode") else model.init_cache(slots)
    ids = jnp.full(TRUNK, model.start_id) if hasattr(model, "encode") else ids
    return model.step(ids, state, attention_mask=real)[1].branched(BRANCHES)


@eqx.filter_jit
def turn(model, ids, cache):
    return model.step(ids, cache, attention_mask=jnp.ones(BRANCHES, bool))


@eqx.filter_jit
def alone(model, ids, real, path):
    """The scores after the last token of `path`, with a cache of its own."""
    begin = jnp.full(TRUNK, model.start_id) if hasattr(model, "encode") else ids
    slots = TRUNK + len(path)
    cache = model.init_cache(model.encode(ids), slots) if hasattr(model, "encode") else model.init_cache(slots)
    both = jnp.concatenate([begin, path])
    return model.step(both, cache, attention_mask=jnp.concatenate([real, jnp.ones(len(path), bool)]))[0][-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_branch_has_the_scores_of_its_own_text(name):
    model, ids = twins(name).ours, prompts(1, TRUNK)[0]
    real = np.arange(TRUNK) >= 2
    cache = first(model, ids, real, TRUNK + TURNS * BRANCHES + SPARE)
    paths = [[] for _ in range(BRANCHES)]
    for at, given in enumerate(GIVEN):
        if at:
            cache = cache.follow(jnp.asarray(PARENTS[at - 1]))
            paths = [list(paths[parent]) for parent in PARENTS[at - 1]]
        paths = [[*path, token] for path, token in zip(paths, given, strict=True)]
        scores, cache = turn(model, given, cache)
        for got, path in zip(scores, paths, strict=True):
            np.testing.assert_allclose(got, alone(model, ids, real, np.array(path)), rtol=0, atol=5e-5)
    assert int(cache.index) == TRUNK + TURNS * BRANCHES and not cache.overfull
