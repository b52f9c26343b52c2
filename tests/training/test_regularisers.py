"""Regularisers: against loops over pairs in float64, the T5-VAE's own numbers, and what the discrepancy holds."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from eqx_transformers.training import regularisers
from eqx_transformers.training.regularisers import (
    RBF,
    AbstractKernel,
    OriginalKernel,
    kl,
    logistic_weight,
    mmd,
    mmd_to_prior,
    reconstruction_loss,
    reparameterised,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")
GOLDEN = Path(__file__).parent.parent / "golden" / "t5_vae_flax"
TRAIN, TORCH = (dict(np.load(GOLDEN / name)) for name in ("train_case.npz", "torch_t5_vae/case.npz"))
KEY = jax.random.key(0)
SAMPLES, OTHERS, DIM = 5, 7, 3
NEAR = {"rtol": 1e-5, "atol": 1e-6}
rng = np.random.default_rng(0)
f32 = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
X, Y = f32(SAMPLES, DIM), 0.5 + 0.7 * f32(OTHERS, DIM)


# ---- the discrepancy

gaussian = lambda squared, widths: sum(math.exp(-squared / (2 * b * b)) for b in widths) / len(widths)
KERNELS = {
    "original": (OriginalKernel(), lambda squared, dim: math.exp(-(squared / dim) / dim)),
    "one width": (RBF((1.3,)), lambda squared, dim: gaussian(squared, (1.3,))),
    "three widths": (RBF((0.2, 1.0, 5.0)), lambda squared, dim: gaussian(squared, (0.2, 1.0, 5.0))),
    "widths of the size": (RBF(), lambda squared, dim: gaussian(squared, [c * dim**0.5 for c in (0.5, 1, 2)])),
}


def slopes_are_differences(f, *args):
    """In both modes; it moves along NumPy arrays, which are no inputs of ours."""
    check_grads(lambda *x: f(*map(jnp.asarray, x)), args, 1, rtol=2e-2, atol=2e-2)


def looped(x, y, k, unbiased):
    """The definition, pair by pair, in float64."""
    x, y = np.float64(x), np.float64(y)

    def mean(a, b, itself):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if itself or i != j]
        return sum(k(sum((p - q) ** 2 for p, q in zip(a[i], b[j], strict=True)), a.shape[-1]) for i, j in pairs) / len(
            pairs
        )

    return mean(x, x, not unbiased) + mean(y, y, not unbiased) - 2 * mean(x, y, True)


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_discrepancy_is_that_of_a_loop_over_pairs(name, unbiased):
    kernel, k = KERNELS[name]
    expected = looped(X, Y, k, unbiased)
    assert abs(expected - looped(X, Y, k, not unbiased)) > 1e-3  # so that the two are told apart
    np.testing.assert_allclose(mmd(X, Y, kernel, unbiased=unbiased), expected, **NEAR)
    np.testing.assert_allclose(
        jax.jit(mmd, static_argnames="unbiased")(X, Y, kernel, unbiased=unbiased), expected, **NEAR
    )


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("name", KERNELS)
def test_its_gradient_is_that_of_finite_differences_of_the_loop(name, unbiased):
    kernel, k = KERNELS[name]
    slopes = jax.grad(lambda *x: mmd(*x, kernel, unbiased=unbiased), (0, 1))(X, Y)
    for which, slope in enumerate(slopes):
        for at in np.ndindex(*slope.shape):
            sets = [[np.float64(X), np.float64(Y)] for _ in range(2)]
            for sign, moved in zip((1, -1), sets, strict=True):
                moved[which][at] += sign * 1e-5
            up, down = (looped(*moved, k, unbiased) for moved in sets)
            np.testing.assert_allclose(slope[at], (up - down) / 2e-5, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_one_for_equal_vectors_and_its_two_sides_agree(name):
    kernel, k = KERNELS[name]
    squared = np.array([0.0, 1e-3, 0.7, 30.0], np.float32)
    found = kernel(jnp.asarray(squared), DIM)
    np.testing.assert_allclose(found, [k(float(s), DIM) for s in squared], atol=2e-7)  # digits below 1, not of k
    assert found[0] == 1 and kernel.minus_one(jnp.zeros(()), DIM) == 0
    assert not jax.tree.leaves(kernel)  # its numbers are static, and there is nothing to train in it


def test_of_one_set_with_itself_it_is_exactly_zero_and_gradients_are_finite():
    for kernel, _ in KERNELS.values():
        assert mmd(X, X, kernel) == 0
        same = jnp.ones((4, DIM)) * 1e3  # where |x|² + |y|² - 2xy is far from 0
        for unbiased in (False, True):
            value, slopes = jax.value_and_grad(lambda *x: mmd(*x, kernel, unbiased=unbiased), (0, 1))(same, same)  # noqa: B023
            assert value == 0 and all(np.isfinite(s).all() for s in slopes)
            slopes = jax.grad(lambda *x: mmd(*x, kernel, unbiased=unbiased), (0, 1))(X, X)  # noqa: B023
            assert all(np.isfinite(s).all() for s in slopes)


def test_small_discrepancies_of_wide_vectors_keep_their_digits():
    # The original kernel of 192 numbers is near 1: of three means of it, float32 would keep three digits.
    x, y = jnp.tanh(f32(41, 192)), f32(43, 192)
    k = lambda a, b: np.exp(-np.square(np.float64(a)[:, None] - np.float64(b)[None]).sum(-1) / 192**2)
    expected = k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean()
    mean = lambda a, b: jnp.exp(-jnp.square(a[:, None] - b[None]).sum(-1) / 192**2).mean()
    plain = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert 0 < expected < 1e-3 and abs(plain - expected) > 2e-4 * expected  # so that this can fail
    np.testing.assert_allclose(mmd(x, y), expected, rtol=5e-5)


def test_close_vectors_far_from_zero_are_told_apart():
    # 1000 ± 0.01: the squares of these have no digit left for their difference.
    x, y = 1000 + 0.01 * f32(SAMPLES, DIM), 1000 + 0.01 * f32(OTHERS, DIM)
    kernel, k = RBF((0.01,)), lambda squared, dim: gaussian(squared, (0.01,))
    np.testing.assert_allclose(mmd(x, y, kernel), looped(x, y, k, False), **NEAR)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_blocks_of_rows_change_nothing(rows, monkeypatch):
    kernel = RBF((0.8,))
    both = lambda: jax.jit(jax.value_and_grad(lambda *x: mmd(*x, kernel), (0, 1)))(X, Y)
    expected = both()
    monkeypatch.setattr(regularisers, "BLOCK", rows * OTHERS * DIM)
    for a, b in zip(*map(jax.tree.leaves, (both(), expected)), strict=True):
        np.testing.assert_allclose(a, b, **NEAR)


def held(block, monkeypatch) -> int:
    """Bytes of temporaries of the gradient of a discrepancy of 60 and 64 vectors of 1,000 numbers."""
    monkeypatch.setattr(regularisers, "BLOCK", block)
    shapes = [jax.ShapeDtypeStruct((n, 1000), jnp.float32) for n in (60, 64)]
    done = jax.jit(jax.grad(lambda *x: mmd(*x), (0, 1))).lower(*shapes).compile()
    return done.memory_analysis().temp_size_in_bytes


def test_the_differences_of_all_pairs_never_exist_at_once(monkeypatch):
    everything = 4 * 60 * 64 * 1000
    assert held(60 * 64 * 1000, monkeypatch) >= everything  # so that this can fail
    assert held(2 * 64 * 1000, monkeypatch) < everything / 4


def test_under_vmap_each_pair_of_sets_is_one(monkeypatch):
    xs, ys = f32(2, SAMPLES, DIM), f32(2, OTHERS, DIM)
    for block in (regularisers.BLOCK, 2 * OTHERS * DIM):
        monkeypatch.setattr(regularisers, "BLOCK", block)
        each = [mmd(x, y) for x, y in zip(xs, ys, strict=True)]
        np.testing.assert_allclose(jax.vmap(mmd)(xs, ys), each, **NEAR)


def test_half_precision_is_widened_first():
    x, y = X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16)
    found = mmd(x, y)
    assert found.dtype == jnp.float32 and found == mmd(x.astype(jnp.float32), y.astype(jnp.float32))
    assert mmd(x, Y).dtype == jnp.float32 and jax.grad(mmd)(x, Y).dtype == jnp.bfloat16


def test_unbiased_is_right_on_average_and_biased_is_too_high():
    draw = lambda key: jax.random.normal(key, (2, 6, 2))
    pairs = jax.vmap(draw)(jax.random.split(KEY, 4000))
    mean = lambda unbiased: jax.vmap(lambda p: mmd(*p, RBF(), unbiased=unbiased))(pairs).mean()
    assert abs(mean(True)) < 0.01 < 0.1 < mean(False)  # four standard errors are 0.008


# ---- against the prior


@pytest.mark.parametrize("per_token", [False, True], ids=["flat", "per token"])
def test_the_original_latents_have_the_original_discrepancy(per_token):
    name = "tokens" if per_token else "flat"
    latents, noise = jnp.asarray(TRAIN["latent_codes"]), jnp.asarray(TRAIN[f"noise_{name}"])
    np.testing.assert_allclose(mmd_to_prior(latents, noise=noise, per_token=per_token), TRAIN[f"mmd_{name}"], rtol=2e-6)


def test_the_pytorch_original_is_met_too():
    found = mmd(jnp.asarray(TORCH["noise"]), jnp.asarray(TORCH["latent"]))
    np.testing.assert_allclose(found, TORCH["reg_loss"], rtol=2e-6)


LATENTS = f32(4, 3, 5)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("per_token", [False, True], ids=["flat", "per token"])
def test_a_key_draws_as_many_vectors_as_there_are(per_token, unbiased):
    samples = LATENTS.reshape(12, 5) if per_token else LATENTS.reshape(4, 15)
    options = {"per_token": per_token, "kernel": RBF(), "unbiased": unbiased}
    noise = jax.random.normal(KEY, samples.shape)
    found = jax.jit(lambda x, key: mmd_to_prior(x, key=key, **options))(LATENTS, KEY)
    np.testing.assert_allclose(found, mmd(samples, noise, RBF(), unbiased=unbiased), **NEAR)
    assert abs(found - mmd_to_prior(LATENTS, key=jax.random.key(1), **options)) > 1e-4
    half = mmd_to_prior(LATENTS.astype(jnp.bfloat16), key=KEY, **options)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, found, atol=0.01)


def test_a_noise_may_be_more_vectors_than_the_latents():
    noise = f32(9, 15)
    np.testing.assert_allclose(
        mmd_to_prior(LATENTS, noise=noise), looped(LATENTS.reshape(4, 15), noise, KERNELS["original"][1], False), **NEAR
    )


WEIGHTS = np.array([1, 0, 1, 1], np.float32)
STAYS = np.flatnonzero(WEIGHTS)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("per_token", [False, True], ids=["flat", "per token"])
def test_a_sequence_without_weight_is_not_there(per_token, unbiased):
    noise = f32(12, 5) if per_token else f32(4, 15)
    options = {"per_token": per_token, "kernel": RBF(), "unbiased": unbiased}
    broken = LATENTS.at[1].set(jnp.nan)
    call = jax.value_and_grad(lambda x: mmd_to_prior(x, noise=noise, weights=WEIGHTS, **options))
    found, slope = call(broken)
    there = noise.reshape(4, -1)[STAYS].reshape(-1, noise.shape[1])
    alone, its = jax.value_and_grad(lambda x: mmd_to_prior(x, noise=there, **options))(LATENTS[STAYS])
    np.testing.assert_allclose(found, alone, **NEAR)
    np.testing.assert_allclose(slope[STAYS], its, **NEAR)
    assert not slope[1].any()
    assert mmd_to_prior(broken, noise=noise, weights=np.zeros(4, np.float32), **options) == 0


def test_two_of_one_are_one_that_counts_twice():
    noise = f32(3, 15)
    twice = mmd_to_prior(LATENTS[:3], noise=noise, weights=np.array([1, 2, 1], np.float32))
    both = mmd_to_prior(LATENTS[np.array([0, 1, 1, 2])], noise=noise[np.array([0, 1, 1, 2])])
    np.testing.assert_allclose(twice, both, **NEAR)


# ---- variational

MEAN, LOG_VARIANCE = f32(4, 3, 5), f32(4, 3, 5)


def kl_looped(mean, log_variance, free_bits):
    total = 0.0
    for at in np.ndindex(*mean.shape[1:]):
        each = [
            (float(m[at]) ** 2 + math.exp(float(v[at])) - 1 - float(v[at])) / 2
            for m, v in zip(np.array(mean), np.array(log_variance), strict=True)
        ]
        total += max(free_bits, sum(each) / len(each))
    return total


@pytest.mark.parametrize("free_bits", [0.0, 0.6, 1.1, 50.0])
def test_kl_is_that_of_a_loop_and_no_dimension_counts_less_than_its_free_bits(free_bits):
    expected = kl_looped(MEAN, LOG_VARIANCE, free_bits)
    for given in (free_bits, jnp.asarray(free_bits, jnp.float32)):
        np.testing.assert_allclose(jax.jit(kl)(MEAN, LOG_VARIANCE, free_bits=given), expected, rtol=1e-5)
    assert expected == 15 * 50 if free_bits == 50 else expected > 0
    assert free_bits != 0.6 or kl_looped(MEAN, LOG_VARIANCE, 0.0) < expected  # so that some are below, not all
    assert free_bits != 0.6 or expected > 15 * 0.6


def test_kl_of_a_sequence_without_weight_is_not_there():
    broken = MEAN.at[1].set(jnp.nan)
    call = jax.value_and_grad(lambda mean, **given: kl(mean, LOG_VARIANCE[: len(mean)], free_bits=0.6, **given))
    found, slope = call(broken, weights=WEIGHTS)
    expected = kl_looped(MEAN[STAYS], LOG_VARIANCE[STAYS], 0.6)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.isfinite(slope).all() and not slope[1].any() and slope[0].any()


def test_kl_by_sampling_is_the_same():
    # E[log q - log p] over 200,000 draws: the standard error is below 0.01.
    mean, log_variance = MEAN[:1, 0], LOG_VARIANCE[:1, 0]
    draws = jax.vmap(lambda key: reparameterised(mean, log_variance, key=key))(jax.random.split(KEY, 200_000))
    log = lambda x, m, v: -(jnp.log(2 * jnp.pi) + v + jnp.square(x - m) / jnp.exp(v)) / 2
    gap = log(draws, mean[None], log_variance[None]) - log(draws, 0.0, 0.0)
    np.testing.assert_allclose(kl(mean, log_variance), gap.sum(-1).mean(), rtol=0.01)


def test_kl_of_the_prior_is_zero_and_its_gradients_are_finite_differences():
    zeros = jnp.zeros((4, 3, 5))
    value, slopes = jax.value_and_grad(kl, (0, 1))(zeros, zeros)
    assert value == 0 and not any(s.any() for s in slopes)
    for free_bits in (0.0, 0.6):
        slopes_are_differences(functools.partial(kl, free_bits=free_bits), MEAN, LOG_VARIANCE)
    slopes = jax.grad(kl, (0, 1))(MEAN, LOG_VARIANCE)
    np.testing.assert_allclose(slopes[0], MEAN / 4, **NEAR)
    np.testing.assert_allclose(slopes[1], (np.exp(LOG_VARIANCE) - 1) / 8, **NEAR)


def test_below_its_free_bits_a_dimension_is_not_pressed():
    slopes = jax.grad(lambda m: kl(m, LOG_VARIANCE, free_bits=0.6))(MEAN)
    each = (np.square(MEAN) + np.exp(LOG_VARIANCE) - 1 - LOG_VARIANCE) / 2
    below = each.mean(0) < 0.6
    assert below.any() and not below.all()
    assert not slopes[:, below].any() and (np.asarray(slopes)[:, ~below] != 0).all()


def test_a_draw_has_its_mean_and_its_variance_and_lets_gradients_through():
    mean, log_variance = jnp.asarray([1.5, -2.0]), jnp.asarray([0.8, -1.0])
    draws = jax.vmap(lambda key: reparameterised(mean, log_variance, key=key))(jax.random.split(KEY, 100_000))
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(jnp.log(draws.var(0)), log_variance, atol=0.03)
    one = reparameterised(mean, log_variance, key=KEY)
    slopes = jax.jacobian(lambda *x: reparameterised(*x, key=KEY), (0, 1))(mean, log_variance)
    np.testing.assert_allclose(slopes[0], np.eye(2), **NEAR)
    np.testing.assert_allclose(slopes[1], np.diag((one - mean) / 2), **NEAR)
    half = reparameterised(mean.astype(jnp.bfloat16), log_variance, key=KEY)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, one.astype(jnp.bfloat16))  # 1.5 and -2 are the same in both
    assert kl(mean.astype(jnp.bfloat16)[None], log_variance[None]).dtype == jnp.float32


# ---- reconstruction

STATES, REBUILT = f32(2, 4, 3), f32(2, 4, 3)
REAL = np.array([[1, 1, 0, 1], [0, 1, 0, 0]])


@pytest.mark.parametrize("mask", [None, REAL, REAL.astype(bool), jnp.asarray(REAL)], ids=["all", "0/1", "bool", "jax"])
def test_the_error_is_the_mean_of_a_loop_over_what_counts(mask):
    squares = [
        (float(STATES[b, t, d]) - float(REBUILT[b, t, d])) ** 2
        for b, t, d in np.ndindex(2, 4, 3)
        if mask is None or REAL[b, t]
    ]
    assert len(squares) == (24 if mask is None else 12)
    np.testing.assert_allclose(reconstruction_loss(STATES, REBUILT, mask), np.mean(squares), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(reconstruction_loss)(STATES, REBUILT, mask), np.mean(squares), rtol=1e-6)
    slopes_are_differences(lambda *x: reconstruction_loss(*x, mask), STATES, REBUILT)


def test_the_original_error_counts_the_padding():
    states, rebuilt = (jnp.asarray(TORCH[name]) for name in ("encoder_last_hidden_state", "recon_encoding"))
    np.testing.assert_allclose(reconstruction_loss(states, rebuilt), TORCH["recon_loss"], rtol=2e-6)
    assert abs(reconstruction_loss(states, rebuilt, TORCH["input_ids"] != 0) - TORCH["recon_loss"]) > 1e-3


def test_what_does_not_count_has_no_effect_and_nothing_counting_is_zero():
    both = jax.value_and_grad(reconstruction_loss, (0, 1))
    expected = both(STATES, REBUILT, REAL)
    for junk in (np.nan, np.inf):
        spoilt = [jnp.where(REAL[..., None] != 0, x, junk) for x in (STATES, REBUILT)]
        for a, b in zip(*map(jax.tree.leaves, (both(*spoilt, REAL), expected)), strict=True):
            np.testing.assert_array_equal(a, b)
    value, slopes = both(STATES, REBUILT, np.zeros_like(REAL))
    assert value == 0 and not any(s.any() for s in slopes)
    half = reconstruction_loss(STATES.astype(jnp.bfloat16), REBUILT.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, reconstruction_loss(STATES, REBUILT), rtol=0.02)


# ---- how strongly


def test_the_weight_is_the_original_schedule_of_numbers_and_of_traced_steps():
    steps, expected = TORCH["schedule_steps"], TORCH["schedule_weights"]
    for found in (jax.vmap(jax.jit(logistic_weight))(jnp.asarray(steps)), [logistic_weight(int(s)) for s in steps]):
        np.testing.assert_allclose(found, expected, rtol=3e-6)
    assert logistic_weight(2500) == 0.5 and logistic_weight(7).dtype == jnp.float32
    np.testing.assert_allclose(logistic_weight(9, slope=0.2, offset=1.0), 1 / (1 + math.exp(-0.8)), rtol=1e-6)


def test_it_is_a_schedule_of_optax():
    steep = functools.partial(logistic_weight, slope=1.5, offset=2.0)
    for schedule in (logistic_weight, steep):
        scale = optax.scale_by_schedule(schedule)
        state, update = scale.init(jnp.ones(2)), jax.jit(scale.update)
        for step in range(3):
            found, state = update(jnp.ones(2), state)
            np.testing.assert_allclose(found, np.full(2, schedule(step)), rtol=1e-6)


# ---- errors

REFUSED = {
    "sizes": (lambda: mmd(X, Y[:, :1]), r"vectors of one size are compared, but they are \(5, 3\) and \(7, 1\)"),
    "axes": (lambda: mmd(X, Y[None]), r"but they are \(5, 3\) and \(1, 7, 3\)"),
    "nothing": (lambda: mmd(X[:0], Y), "The discrepancy needs 1 vectors a set at least, but there are 0 and 7"),
    "one": (lambda: mmd(X, Y[:1], unbiased=True), "unbiased discrepancy needs 2 vectors .* are 5 and 1"),
    "no width": (lambda: RBF(()), r"bandwidths = \(\) must be numbers above zero, at least one"),
    "a width of zero": (lambda: RBF((1.0, 0.0)), r"bandwidths = \(1.0, 0.0\) must be numbers above zero"),
    "no draw": (lambda: mmd_to_prior(LATENTS), "give key or noise, one of them"),
    "two draws": (lambda: mmd_to_prior(LATENTS, key=KEY, noise=f32(4, 15)), "give key or noise, one of them"),
    "flat latents": (lambda: mmd_to_prior(X, key=KEY), r"must be \(batch, tokens, size\), but they are \(5, 3\)"),
    "noise per token": (lambda: mmd_to_prior(LATENTS, noise=f32(12, 5)), r"are \(4, 15\) and \(12, 5\)"),
    "variances": (lambda: kl(MEAN, LOG_VARIANCE[:1]), r"mean and log_variance must have one shape, .* \(1, 3, 5\)"),
    "free bits": (lambda: kl(MEAN, LOG_VARIANCE, free_bits=-0.1), "free_bits = -0.1 must be at least 0, in nats"),
    "draw": (lambda: reparameterised(MEAN, LOG_VARIANCE[0], key=KEY), "mean and log_variance must have one shape"),
    "weights": (lambda: kl(MEAN, LOG_VARIANCE, weights=WEIGHTS[:3]), r"one entry a sequence, 4, but they are \(3,\)"),
    "too many draws": (
        lambda: mmd_to_prior(LATENTS, noise=f32(9, 15), weights=WEIGHTS),
        "weights count draws too: 4 are needed, but noise has 9",
    ),
    "rebuilt": (lambda: reconstruction_loss(STATES, REBUILT[:, :1]), "states and rebuilt must have one shape"),
    "mask": (lambda: reconstruction_loss(STATES, REBUILT, REAL[0]), r"mask must have the shape \(2, 4\), .* is \(4,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(unchecked, case):
    call, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        call()


def test_a_kernel_of_ones_own_is_what_it_says_it_is_below_one():
    class Rational(AbstractKernel):
        """The inverse multiquadric of one's own."""

        def minus_one(self, squared, dim):
            return -squared / (dim + squared)

    expected = looped(X, Y, lambda squared, dim: dim / (dim + squared), True)
    np.testing.assert_allclose(mmd(X, Y, Rational(), unbiased=True), expected, **NEAR)
