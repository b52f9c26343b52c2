"""`Mask.allowed` against the definition, pair by pair."""

import itertools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers.nn import Mask

SEQ, KEYS, HEADS = 3, 5, 2
rng = np.random.default_rng(0)
OPTIONS = {
    "causal": [False, True],
    "window": [None, 1, 3],
    "offset": [0, 2],
    "keys": [None, np.array([True, False, True, True, False])],
    "segments": [None, np.array([7, 7, 3, 3, 7])],
    "dense": [None, rng.random((SEQ, KEYS)) < 0.6, rng.random((HEADS, SEQ, KEYS)) < 0.6],
}
CASES = [dict(zip(OPTIONS, case, strict=True)) for case in itertools.product(*OPTIONS.values())]


def literal(causal, window, offset, keys, segments, dense):
    """The docstring, sentence by sentence, for one pair at a time; all heads spelled out."""
    table = np.ones((HEADS, SEQ, KEYS), bool)
    for h, i, j in itertools.product(range(HEADS), range(SEQ), range(KEYS)):
        position = i + offset
        table[h, i, j] = all(
            (
                not causal or j <= position,
                window is None or position - j < window,
                keys is None or keys[j],
                segments is None or segments[position] == segments[j],
                dense is None or (dense[i, j] if dense.ndim == 2 else dense[h, i, j]),
            )
        )
    return table


def mask(case):
    return Mask(**{k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in case.items()})


def test_allowed_is_the_definition_for_every_combination():
    for case in CASES:
        got, m = mask(case).allowed(SEQ, KEYS), mask(case)
        if got is None:
            assert m.is_empty and literal(**case).all()
        else:
            assert not m.is_empty
            assert got.dtype == jnp.bool_
            assert got.shape in ((SEQ, KEYS), (HEADS, SEQ, KEYS))
            np.testing.assert_array_equal(np.broadcast_to(got, (HEADS, SEQ, KEYS)), literal(**case), err_msg=str(case))


def test_only_a_mask_without_conditions_is_empty():
    assert Mask().is_empty and Mask().allowed(SEQ, KEYS) is None
    assert Mask(offset=2).is_empty
    conditions = [
        case
        for case in CASES
        if case["causal"] or any(case[k] is not None for k in case if k not in ("causal", "offset"))
    ]
    assert len(conditions) == len(CASES) - 2
    assert not any(mask(case).is_empty for case in conditions)
    # A window of 0 is a condition too: nothing but the future.
    assert not Mask(window=0).is_empty
    np.testing.assert_array_equal(Mask(window=0).allowed(2, 2), [[False, True], [False, False]])


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_an_offset_may_be_known_only_at_run_time(offset):
    case = {"causal": True, "window": 2, "keys": None, "segments": np.array([7, 7, 3, 3, 7]), "dense": None}
    traced = eqx.filter_jit(lambda offset: mask(case | {"offset": offset}).allowed(SEQ, KEYS))
    np.testing.assert_array_equal(traced(jnp.asarray(offset)), literal(offset=offset, **case)[0])
