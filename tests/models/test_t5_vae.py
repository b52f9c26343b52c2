"""Laws of the T5-VAE that no published one has: averages, variance, padding; the published one is in golden."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import T5_V1, T5VAE, Posterior, T5VAEConfig, T5VAEOutput, generate, stack
from eqx_transformers.latents import interpolate
from eqx_transformers.skeletons import skeleton
from eqx_transformers.training import kl

from ..full import FULL
from .ours import KEY, filled

SIZES = {"vocab_size": 61, "embed_dim": 21, "num_layers": 2, "num_heads": 3, "head_dim": 5, "mlp_dim": 37}
TINY = replace(T5_V1, **SIZES, num_buckets=8, max_distance=7)
CONFIGS = {
    "mean": T5VAEConfig(t5=TINY, latent_dim=7),
    "mean, not variational": T5VAEConfig(t5=TINY, latent_dim=7, variational=False),
    "tokens": T5VAEConfig(t5=TINY, latent_dim=7, pooling="first", latent_tokens=3, variational=False),
    "all tokens": T5VAEConfig(t5=TINY, latent_dim=7, pooling="first"),
    "flat": T5VAEConfig(t5=TINY, latent_dim=7, pooling="flat", max_tokens=9, inner_dim=20),
}
every = pytest.mark.parametrize("name", CONFIGS if FULL else ["mean", "tokens", "flat"])
NEAR = {"rtol": 0, "atol": 2e-5}
call = eqx.filter_jit(lambda model, *args, key=None, **inputs: model(*args, key=key, **inputs))
encode = eqx.filter_jit(lambda model, ids, key=None, **inputs: model.encode(ids, key=key, **inputs))


@functools.cache
def make(name, **facts):
    return filled(skeleton(T5VAE, replace(CONFIGS[name], **facts)))


def tokens(length=9, seed=0):
    return np.random.default_rng(seed).integers(3, 61, length).astype(np.int32)


CODES = {"mean": 1, "mean, not variational": 1, "tokens": 3, "all tokens": 9, "flat": 1}


@every
def test_a_call_is_its_parts(name):
    """Codes, what is rebuilt from them, and what the T5 says of that."""
    model, ids, target = make(name), tokens(), tokens(6, seed=1)
    out = call(model, ids, target)
    assert isinstance(out, T5VAEOutput) and isinstance(out.posterior, Posterior)
    assert out.latents.shape == (CODES[name], 7) and out.logits.shape == (6, 61)

    @eqx.filter_jit
    def parts(model, latents):
        memory = model.remembered(latents)
        decoded = model.t5.decode(memory, target), model.decode(latents, target)
        return model.t5.encode(ids).states, (model.posterior(ids)[1].mean, model.encode(ids)), memory.states, decoded

    states, codes, reconstructed, decoded = parts(model, out.latents)
    np.testing.assert_allclose(out.states, states, **NEAR)
    np.testing.assert_allclose(out.reconstructed_states, reconstructed, **NEAR)
    for found in codes:
        np.testing.assert_allclose(out.latents, found, **NEAR)
    for found in decoded:
        np.testing.assert_allclose(out.logits, found, **NEAR)


@every
def test_the_layouts_compute_the_same(name):
    model = make(name)
    ours, stacked = (call(m, tokens(), tokens(6, seed=1), key=KEY) for m in (model, stack(model)))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_allclose(a, b, **NEAR)


def test_the_average_is_of_the_tokens_that_exist():
    model, ids = make("mean"), tokens(5)
    alone = encode(model, ids)
    states = np.asarray(model.t5.encode(ids).states)
    dense = model.encoder_to_latent.dense
    wanted = states.mean(0) @ np.asarray(dense.weight).T + np.asarray(dense.bias)
    np.testing.assert_allclose(alone[0], wanted, **NEAR)
    for row in (np.pad(ids, (0, 4)), np.pad(ids, (3, 0)), np.pad(ids, (2, 2))):  # 0 is the padding
        np.testing.assert_allclose(encode(model, row), alone, **NEAR)
        np.testing.assert_allclose(encode(model, row, attention_mask=row != 0), alone, **NEAR)
    seen = encode(model, np.pad(ids, (0, 4)), attention_mask=np.ones(9, bool))
    assert np.abs(seen - alone).max() > 1e-2


def test_codes_of_padding_are_zero_and_the_others_do_not_see_it():
    model, ids = make("all tokens"), tokens(5)
    found = encode(model, np.pad(ids, (0, 4)))
    np.testing.assert_allclose(found[:5], encode(model, ids), **NEAR)
    assert not found[5:].any()
    drawn = encode(model, np.pad(ids, (0, 4)), key=KEY)
    assert drawn[:5].all() and not drawn[5:].any()
    posterior = model.posterior(np.pad(ids, (0, 4)))[1]
    assert not np.concatenate([posterior.mean[5:], posterior.log_variance[5:]]).any()
    alone = [x[None, :5] for x in posterior[:2]]
    np.testing.assert_allclose(kl(posterior.mean[None], posterior.log_variance[None]), kl(*alone), rtol=1e-6)


@pytest.mark.parametrize("name", ["mean", "all tokens", "flat"])
def test_codes_are_drawn_from_their_normal(name):
    """Mean and deviation of many draws are the posterior's; without a key, the mean."""
    model, ids = eqx.nn.inference_mode(make(name)), tokens()
    model = eqx.tree_at(lambda m: m.encoder_to_latent.log_variance.weight, model, replace_fn=lambda w: w / 50)
    posterior = model.posterior(ids)[1]
    draws = eqx.filter_jit(lambda model, keys: jax.vmap(lambda key: model.encode(ids, key=key))(keys))
    found = draws(model, jax.random.split(KEY, 4000))
    deviation = np.exp(np.asarray(posterior.log_variance) / 2)
    np.testing.assert_array_less(np.abs(found.mean(0) - posterior.mean), 6 * deviation / 4000**0.5)
    np.testing.assert_allclose(found.std(0), deviation, rtol=6 / 8000**0.5)
    np.testing.assert_allclose(encode(model, ids), posterior.mean, **NEAR)


def test_gradients_reach_the_variance_through_a_draw():
    model, ids = make("mean"), tokens()
    loss = lambda model: jnp.square(model(ids, ids, key=KEY).logits).mean()
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(model)
    for part in (gradient.encoder_to_latent.log_variance, gradient.encoder_to_latent.dense, gradient.latent_to_decoder):
        assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in jax.tree.leaves(part))
    assert np.abs(gradient.t5.encoder.stack.blocks[0].attention.query_proj.weight).max() > 0


def test_codes_that_are_not_variational_are_between_minus_one_and_one():
    model, ids = make("tokens"), tokens()
    assert np.abs(encode(model, ids)).max() < 1
    np.testing.assert_array_equal(encode(eqx.nn.inference_mode(model), ids, key=KEY), encode(model, ids))
    assert model.posterior(ids)[1].log_variance is None


@pytest.mark.parametrize("name", ["mean", "tokens", "flat"])
@pytest.mark.parametrize("beams", [1, 2])
def test_texts_are_read_and_said_again_as_their_codes_are(name, beams):
    model, ids = make(name), np.stack([tokens(), np.pad(tokens(5, seed=3), (0, 4))])
    codes = eqx.filter_jit(lambda model: jax.vmap(model.encode)(ids))(model)
    found = generate(model, ids, max_new_tokens=6, beams=beams)
    np.testing.assert_array_equal(found, generate(model, memory=codes, max_new_tokens=6, beams=beams))
    if beams == 1:
        read = np.pad(np.asarray(found)[:, :-1], ((0, 0), (1, 0)))
        scores = eqx.filter_jit(lambda model: jax.vmap(model.decode)(codes, read))(model)
        np.testing.assert_array_equal(found, scores.argmax(-1))


def test_sampled_texts_of_an_interpolation_and_of_the_prior():
    model = make("mean")
    first, second = (encode(model, tokens(seed=i)) for i in range(2))
    between = interpolate(first, second, 5, kind="spherical")
    found = generate(model, memory=between, max_new_tokens=6, key=KEY, temperature=0.7)
    assert found.shape == (5, 6)
    np.testing.assert_array_equal(found, generate(model, memory=between, max_new_tokens=6, key=KEY, temperature=0.7))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"memory": jnp.zeros((2, 7))}, r"memory must be a batch, jax\.vmap\(model\.encode\)\(…\), but it is \(2, 7\)"),
        ({"memory": jnp.zeros((0, 1, 7))}, "memory must be a batch"),
        ({"memory": None}, "token_ids is None"),
        ({"memory": (jnp.zeros((2, 1, 7)), jnp.ones((2, 1), bool))}, r"memory must be a batch.* \(2, 1, 7\), \(2, 1\)"),
        ({"memory": [[1.0, 2.0]]}, r"memory must be a batch.* \(\), \(\)"),
        ({"memory": jnp.zeros((2, 1, 7)), "token_ids": np.ones((2, 9), np.int32)}, "give either it, or token_ids"),
        (
            {"memory": jnp.zeros((2, 1, 7)), "cache_length": 4},
            r"there is a start token and max_new_tokens = 4.*takes 5",
        ),
    ],
)
def test_a_memory_that_makes_no_sense_is_one_error(given, said):
    given = {"max_new_tokens": 4} | given
    with pytest.raises(ValueError, match=said):
        generate(make("mean"), given.pop("token_ids", None), **given)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("flat", (4, 7), r"The latents of a text are \(1, 7\), but these are \(4, 7\)\. jax\.vmap over a batch"),
        ("mean", (5, 7), r"are \(1, 7\), but these are \(5, 7\)"),
        ("tokens", (1, 7), r"are \(3, 7\), but these are \(1, 7\)"),
        ("all tokens", (4, 6), r"are \(codes, 7\), but these are \(4, 6\)"),
        ("mean", (2, 1, 7), r"are \(1, 7\), but these are \(2, 1, 7\)"),
    ],
)
def test_codes_that_do_not_fit_are_one_error(unchecked, name, shape, said):
    """A flat one would take the first of them, and a batch for one text."""
    model = make(name)
    for call in (lambda x: model.decode(x, tokens(3)), lambda x: model.init_cache(x, 5)):
        with pytest.raises(ValueError, match=said):
            call(jnp.zeros(shape))


def test_a_text_that_does_not_fit_is_one_error():
    with pytest.raises(ValueError, match="must have max_tokens = 9 tokens, not 5: pad it"):
        make("flat").encode(tokens(5))
    with pytest.raises(ValueError, match="A sequence of 2 tokens has not 3 codes: pad it"):
        make("tokens").encode(tokens(2))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"pooling": "median"}, "pooling = 'median' is not one of mean, first, flat"),
        ({"latent_dim": 0}, "latent_dim = 0 must be at least 1"),
        ({"pooling": "first", "latent_tokens": 0}, "latent_tokens = 0 must be at least 1"),
        ({"pooling": "first", "latent_tokens": -1}, "latent_tokens = -1 must be at least 1; None means all tokens"),
        ({"latent_tokens": 3}, "latent_tokens = 3: pooling = 'mean' gives one code"),
        ({"as_published": True}, "as_published is of codes of the first tokens that are not variational"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_error(unchecked, facts, said):
    with pytest.raises(ValueError, match=said):
        T5VAEConfig(**facts)
