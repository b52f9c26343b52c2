"""Counted positions against a loop; rotations against transformers, and as rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from eqx_transformers import nn
from eqx_transformers.nn import positions

from .test_layers import random

SEQ, HEADS, DIM = 5, 3, 8
# 40 positions are the context of training; those asked are up to five times as far.
FAR = np.array([0, 1, 7, 39, 200], np.int32)


# ---- counting

REAL = np.array([False, True, True, False, True, True, False, True])
SEGMENTS = np.array([4, 4, 4, 4, 2, 2, 4, 4])


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one text", "packed"])
@pytest.mark.parametrize("real", [REAL, np.ones(8, bool), np.zeros(8, bool)], ids=["some", "all", "none"])
def test_count_is_a_literal_loop(real, segments, before):
    expected, counted = [], before
    for i in range(8):
        if segments is not None and i and segments[i] != segments[i - 1]:
            counted = 0
        counted += int(real[i])
        expected.append(counted)
    marks = None if segments is None else jnp.asarray(segments)
    for given in (before, jnp.asarray(before)):
        got = positions.count(jnp.asarray(real), marks, given)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, expected)


# ---- rotations

SCALINGS = {
    "default": ({}, {"rope_type": "default"}),
    "linear": ({"scaling": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        {"scaling": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_positions": 40},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    ),
}


def both(scaling, dim=DIM, base=50.0):
    """Ours and the reference's."""
    ours, theirs = SCALINGS[scaling]
    config = LlamaConfig(
        hidden_size=HEADS * dim,
        num_attention_heads=HEADS,
        head_dim=dim,
        max_position_embeddings=40,
        rope_parameters={**theirs, "rope_theta": base},
    )
    return nn.Rotary(dim, base, **ours), LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_are_the_references(scaling):
    for dim, base in ((8, 50.0), (64, 10000.0), (128, 5e5)):
        ours, theirs = both(scaling, dim, base)
        np.testing.assert_allclose(ours.frequencies, theirs.inv_freq.numpy(), rtol=1e-6)
    assert ours.frequencies.dtype == np.float32
    plain = nn.Rotary(DIM, 50.0).frequencies
    assert (scaling == "default") == np.allclose(both(scaling)[0].frequencies, plain, rtol=1e-3)


def test_llama3_keeps_short_waves_divides_long_ones_and_goes_over_between():
    scaled, plain = nn.Rotary(128, 5e5, **SCALINGS["llama3"][0]).frequencies, nn.Rotary(128, 5e5).frequencies
    turns = 40 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns >= 4], plain[turns >= 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns <= 1], plain[turns <= 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert all(x.sum() > 2 for x in (turns >= 4, turns <= 1, between))
    assert (np.diff((scaled / plain)[between]) < 0).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_rotation_is_the_references(scaling):
    ours, theirs = both(scaling)
    q, k = random(SEQ, HEADS, DIM), random(SEQ, 1, DIM, seed=2)
    rotation = ours(jnp.asarray(FAR))
    assert isinstance(rotation, nn.Rotation) and rotation.cos.shape == (SEQ, DIM // 2)
    as_torch = lambda x: torch.tensor(np.array(x))[None]
    cos, sin = theirs(as_torch(q), torch.tensor(FAR)[None].long())
    expected = apply_rotary_pos_emb(as_torch(q), as_torch(k), cos, sin, unsqueeze_dim=2)
    for x, there in zip((q, k), expected, strict=True):
        np.testing.assert_allclose(nn.rotate(x, rotation), there[0].numpy(), rtol=1e-4, atol=2e-5)


def test_a_rotation_keeps_norms_and_scores_depend_on_distances_alone():
    rotary, q, k = nn.Rotary(DIM, 50.0), random(SEQ, HEADS, DIM), random(SEQ, HEADS, DIM, seed=2)
    turned = lambda x, shift: nn.rotate(x, rotary(jnp.asarray(FAR) + shift))
    np.testing.assert_allclose(np.linalg.norm(turned(q, 0), axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5)
    scores = lambda shift: np.einsum("snd,tnd->nst", turned(q, shift), turned(k, shift))
    np.testing.assert_allclose(scores(0), scores(17), rtol=1e-3, atol=1e-4)
    assert not np.allclose(scores(0), np.einsum("snd,tnd->nst", q, k), atol=0.1)
    np.testing.assert_array_equal(turned(q, 0)[0], q[0])  # nothing turns at position 0


def test_leading_axes_are_examples_and_the_dtype_stays():
    rotation = nn.Rotary(DIM)(jnp.asarray(FAR))
    x = random(2, 3, SEQ, HEADS, DIM)
    np.testing.assert_array_equal(nn.rotate(x, rotation)[1, 2], nn.rotate(x[1, 2], rotation))
    half = nn.rotate(x.astype(jnp.bfloat16), rotation)
    assert half.dtype == jnp.bfloat16
    wide = nn.rotate(x.astype(jnp.bfloat16).astype(jnp.float32), rotation)
    np.testing.assert_array_equal(half, wide.astype(jnp.bfloat16))  # rounded once


REFUSED = {
    "odd": (lambda: nn.Rotary(7), "dim = 7 must be even"),
    "nothing": (lambda: nn.Rotary(0), "dim = 0 must be even"),
    "a word": (lambda: nn.Rotary(8, scaling="yarn"), "'yarn' is not one of default, linear, llama3"),
    "no room between": (
        lambda: nn.Rotary(8, scaling="llama3", low_freq_factor=4.0),
        "low_freq_factor = 4.0 and high_freq_factor = 4.0, but the first must be less",
    ),
    "other heads": (
        lambda: nn.rotate(jnp.ones((SEQ, 1, 8)), nn.Rotary(2)(jnp.asarray(FAR))),
        "1 pairs are turned, so heads must have 2 numbers, not 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_turned_is_refused(unchecked, case):
    make, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        make()


def test_positions_may_be_traced():
    rotary = nn.Rotary(DIM, 50.0)
    for a, b in zip(jax.jit(rotary)(jnp.asarray(FAR)), rotary(jnp.asarray(FAR)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
