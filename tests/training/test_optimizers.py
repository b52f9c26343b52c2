"""Schedules against transformers', decay against what is left out, the originals' optimizers by their formulas."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from eqx_transformers import T5, CausalLM, SequenceClassifier, nn
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery import decay_mask, leaves_by_path
from eqx_transformers.training.optimizers import adamw
from eqx_transformers.training.originals import functional_transformer, haiku_tutorial, roberta_article, roberta_scale
from eqx_transformers.training.schedules import warmup_cosine, warmup_linear, warmup_steps

from ..models.ours import CONFIGS, DECODERS, filled
from ..models.test_t5_vae import TINY

STEPS = 200


def torchs(name, warm):
    """A schedule of transformers, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = getattr(transformers, name)(optimizer, warm, STEPS)
    rates = []
    for _ in range(STEPS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return np.array(rates)


@pytest.mark.parametrize("warmup", [0.1, 0, 7, 0.123, STEPS])
def test_schedules_are_those_of_transformers(warmup):
    warm = warmup_steps(STEPS, warmup)
    assert warm == {0.1: 20, 0: 0, 7: 7, 0.123: 25, STEPS: STEPS}[warmup]
    steps = jnp.arange(STEPS + 1)
    linear, cosine = warmup_linear(0.3, STEPS, warmup), warmup_cosine(0.3, STEPS, warmup)
    np.testing.assert_allclose(linear(steps), torchs("get_linear_schedule_with_warmup", warm), rtol=0, atol=1e-7)
    wanted = torchs("get_cosine_schedule_with_warmup", warm)
    wanted[STEPS] = 0  # where all of it is a warm-up, theirs does not fall
    np.testing.assert_allclose(cosine(steps), wanted, rtol=0, atol=1e-7)
    assert linear(10 * STEPS) == cosine(10 * STEPS) == 0 and jnp.shape(linear(3)) == ()


def test_a_schedule_out_of_range_says_so(unchecked):
    with pytest.raises(ValueError, match=r"warmup = 201 must be a share of the 200 steps below 1"):
        warmup_linear(1.0, STEPS, 201)
    for warmup in (-0.1, 1.5):
        with pytest.raises(ValueError, match="warmup = "):
            warmup_cosine(1.0, STEPS, warmup)
    with pytest.raises(ValueError, match="steps = 0 must be at least 1"):
        warmup_linear(1.0, 0)


@eqx.filter_jit
def of_nothing(optimizer, params):
    """An update on gradients of zero: what moves is what decays."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return optimizer.update(zeros, optimizer.init(params), params)[0]


@pytest.mark.parametrize(("name", "stacked"), [("roberta", True), ("llama", True), ("t5", False)])
def test_biases_and_norms_do_not_decay(name, stacked):
    """Also in stacked blocks, whose biases are matrices."""
    made = {
        "roberta": (SequenceClassifier, CONFIGS["roberta"]),
        "llama": (CausalLM, DECODERS["llama"]),
        "t5": (T5, TINY),
    }
    model = filled(skeleton(*made[name]))
    model = eqx.filter(nn.stack(model) if stacked else model, eqx.is_array)
    before, updates = leaves_by_path(model), leaves_by_path(of_nothing(adamw(1.0, weight_decay=0.5), model))
    kept = {path for path in before if "norm" in path or "bias" in path}
    assert kept and kept < before.keys()
    for path, x in updates.items():
        np.testing.assert_allclose(x, 0 * x if path in kept else -0.5 * before[path], rtol=1e-6, err_msg=path)


def test_what_decays_may_be_said():
    model = eqx.filter(filled(skeleton(T5, replace(TINY, num_layers=1))), eqx.is_array)
    everything = adamw(1.0, weight_decay=0.5, decays=lambda params: True)
    assert all(x.any() for x in jax.tree.leaves(of_nothing(everything, model)))
    no_tables = functools.partial(decay_mask, exclude=("bias", "norm", "embedding"))
    fewer = of_nothing(adamw(1.0, weight_decay=0.5, decays=no_tables), model)
    assert not fewer.embedding.weight.any() and fewer.encoder.stack.blocks[0].mlp.up_proj.weight.any()


def run(optimizer, gradients):
    """Every update of some gradients."""
    params = jnp.zeros(len(gradients[0]))
    state, updates = optimizer.init(params), []
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        updates.append(np.asarray(update))
    return np.stack(updates)


GRADIENTS = np.array([[3.0, -4.0, 0.0], [-0.2, 0.7, 0.0], [0.1, -5.0, 0.0]])


def adams(gradients, rate, b2, *, b1=0.9, eps=1e-8):
    """Adam in float64."""
    m = v = np.zeros(len(gradients[0]))
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield -rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def clipped(gradients, limit):
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients * np.minimum(1, limit / norms)


def test_haikus_tutorial_is_clipping_and_adam():
    wanted = list(adams(clipped(GRADIENTS, 0.25), 2e-4, 0.99))
    np.testing.assert_allclose(run(haiku_tutorial(), GRADIENTS), wanted, rtol=1e-5, atol=1e-12)


def test_the_roberta_article_rises_and_falls_at_once():
    assert float(roberta_scale(10, 0)(0)) == 1 and float(roberta_scale(10, 0)(5)) == 0.5  # no warm-up, and no 0 / 0
    scale = roberta_scale(10, 0.3)
    factors = [0, 1 / 3 * 0.9, 2 / 3 * 0.8, 0.7, 0.6, 0.5]
    np.testing.assert_allclose([scale(i) for i in range(6)], factors, rtol=1e-6)
    steps = np.stack(list(adams(clipped(GRADIENTS, 2.0), 0.1, 0.999)))
    found = run(roberta_article(0.1, 10, warmup=0.3, max_grad_norm=2.0), GRADIENTS)
    np.testing.assert_allclose(found, steps * np.array(factors[:3])[:, None], rtol=1e-4, atol=1e-12)
    assert not found[0].any()


def test_the_functional_transformers_methods():
    """Its own Adam has tests of its own: golden, and by hand."""
    np.testing.assert_allclose(run(functional_transformer(0.1, method="sgd"), GRADIENTS), -0.1 * GRADIENTS, rtol=1e-6)
    signs = run(functional_transformer(0.1, method="sign"), GRADIENTS)
    np.testing.assert_allclose(signs, -0.1 * np.sign(GRADIENTS), rtol=1e-6)
    cut = run(functional_transformer(0.1, method="sgd", clip=1.0), GRADIENTS)
    np.testing.assert_allclose(cut, -0.1 * np.clip(GRADIENTS, -1, 1), rtol=1e-6)
    nearly = run(functional_transformer(0.1), GRADIENTS)
    np.testing.assert_allclose(nearly, list(adams(GRADIENTS, 0.1, 0.99, eps=1e-30)), rtol=1e-4)


def test_a_method_that_is_none_says_so(unchecked):
    with pytest.raises(ValueError, match="method = 'lamb' is not one of adam, sgd, sign"):
        functional_transformer(method="lamb")
