"""Every loss is its formula on the rows that count, whatever stands in those that only fill the shape."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_transformers import T5, CausalLM, MaskedLM, SentenceEmbedder, SequenceClassifier
from eqx_transformers.skeletons import skeleton
from eqx_transformers.training import lm_loss, logistic_weight, mmd, reconstruction_loss
from eqx_transformers.training.objectives import (
    autoencoder_loss,
    classification_loss,
    contrastive_loss,
    language_model_loss,
    masked_lm_loss,
    sequence_to_sequence_loss,
)
from eqx_transformers.training.regularisers import kl
from eqx_transformers.training.updater import Updater

from ..models import test_t5_vae
from ..models.ours import KEY, filled, make

pytestmark = pytest.mark.usefixtures("strict_promotion")
ROWS, REAL, LENGTH = 5, 3, 9
VAE = functools.partial(test_t5_vae.make, t5=test_t5_vae.replace(test_t5_vae.TINY, num_layers=1))


def batch(**more):
    """Three texts of unlike length, and two rows of other numbers that do not count: one of them is all padding."""
    rng = np.random.default_rng(0)
    mask = (np.arange(LENGTH) < np.array([9, 4, 7, 5, 0])[:, None]).astype(np.int32)
    ids = np.where(mask, rng.integers(3, 61, mask.shape), 1).astype(np.int32)
    weights = (np.arange(ROWS) < REAL).astype(np.float32)
    return {"token_ids": ids, "attention_mask": mask, "weights": weights, **more}


def real(given):
    return {name: x[:REAL] for name, x in given.items()}


def sparse(length, seed=1, share=0.4):
    """Targets, many of which are none."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(3, 61, (ROWS, length))
    return np.where(rng.random(drawn.shape) < share, drawn, -100).astype(np.int32)


def evaluated(loss, call, model, given):
    """(value, aux, the model's output on every row), in one program."""

    @eqx.filter_jit
    def run(model, given):
        return *loss(model, given), jax.vmap(functools.partial(call, model))(given)

    value, aux, output = run(model, given)
    return float(value), {name: float(x) for name, x in aux.items()}, output


def mean_loss(logits, targets):
    """The mean cross-entropy of what is counted, in float64, and how often it is the best."""
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
    there = targets >= 0
    picked = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    top = logits.max(-1)
    each = np.log(np.exp(logits - top[..., None]).sum(-1)) + top - picked
    return each[there].mean(), (logits.argmax(-1) == targets)[there].mean()


def read(model, given):
    return model(given["token_ids"], attention_mask=given["attention_mask"])


def near(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_classification():
    model = make(SequenceClassifier, "roberta", num_layers=1)
    given = batch(labels=np.array([2, 0, 1, -7, 99], np.int32))
    value, aux, logits = evaluated(classification_loss, read, model, given)
    loss, accuracy = mean_loss(logits[:REAL], given["labels"][:REAL])
    near([value, aux["accuracy"]], [loss, accuracy])
    assert (aux["weight"], aux["tokens"]) == (3, 20)


def test_language_models_in_chunks_too_and_without_a_mask():
    model, given = make(CausalLM, "gpt2", num_layers=1), batch()
    bare = {"token_ids": given["token_ids"][:REAL]}

    @eqx.filter_jit
    def run(model):
        whole, chunked = (language_model_loss(model, given, chunk=chunk) for chunk in (None, 16))
        of = lambda mask: lm_loss(model, bare["token_ids"], attention_mask=mask)
        mask = given["attention_mask"][:REAL]
        return whole, chunked[0], of(mask), language_model_loss(model, bare), of(np.ones_like(mask))

    (value, aux), chunked, wanted, (unmasked, said), wanted_unmasked = run(model)
    near([value, chunked, unmasked], [wanted, wanted, wanted_unmasked])
    assert (int(aux["weight"]), int(aux["tokens"])) == (20 - REAL, 20) and int(said["tokens"]) == REAL * LENGTH


def test_packed_texts_are_the_texts_apart():
    """Two in one row, with positions of their own, by a model that is told of segments."""
    model = make(CausalLM, "gpt2", num_layers=1)
    ids = batch()["token_ids"]
    apart = {"token_ids": np.stack([ids[0, :4], ids[1, :4]]), "attention_mask": np.ones((2, 4), np.int32)}
    packed = {
        "token_ids": apart["token_ids"].reshape(1, 8),
        "segment_ids": np.repeat([[1, 2]], 4, axis=1).astype(np.int32),
        "position_ids": np.tile(np.arange(4), 2)[None].astype(np.int32),
    }
    run = eqx.filter_jit(language_model_loss)
    (value, aux), (wanted, said) = run(model, packed), run(model, apart)
    near(value, wanted)
    assert int(aux["weight"]) == int(said["weight"]) == 6


def test_masked_language_models():
    model = make(MaskedLM, "bert", num_layers=1)
    given = batch(targets=sparse(LENGTH))
    loss = functools.partial(masked_lm_loss, accuracy=True)
    value, aux, logits = evaluated(loss, read, model, given)
    wanted, accuracy = mean_loss(logits[:REAL], given["targets"][:REAL])
    near([value, aux["accuracy"]], [wanted, accuracy])
    assert aux["weight"] == (given["targets"][:REAL] >= 0).sum() and aux["tokens"] == 20


def test_encoder_decoders_read_their_targets_one_place_on():
    model = filled(skeleton(T5, test_t5_vae.replace(test_t5_vae.TINY, num_layers=1)))
    targets = np.where(np.arange(6) < np.array([6, 3, 5, 6, 2])[:, None], sparse(6, share=1.0), -100).astype(np.int32)
    before = np.concatenate([np.zeros((ROWS, 1), np.int32), np.maximum(targets, 0)[:, :-1]], axis=1)
    given = batch(targets=targets, decoder_token_ids=before)
    call = lambda model, x: model(x["token_ids"], x["decoder_token_ids"], attention_mask=x["attention_mask"])
    value, aux, logits = evaluated(sequence_to_sequence_loss, call, model, given)
    near(value, mean_loss(logits[:REAL], targets[:REAL])[0])
    assert (aux["weight"], aux["tokens"]) == (14, 20 + 14) and "accuracy" not in aux
    given.pop("decoder_token_ids")
    near(eqx.filter_jit(sequence_to_sequence_loss)(model, given)[0], value)


def test_contrastive_pairs():
    """Against the formula; rows that do not count are no wrong answers either."""
    model = make(SentenceEmbedder, "bert", num_layers=1)
    other = np.roll(batch()["token_ids"], 1, axis=1)
    given = batch(positive_token_ids=other, positive_attention_mask=np.ones_like(other))
    second = lambda model, x: model(x["positive_token_ids"], attention_mask=x["positive_attention_mask"])
    both = lambda model, x: (read(model, x), second(model, x))
    loss = functools.partial(contrastive_loss, temperature=0.1)
    value, aux, (a, b) = evaluated(loss, both, model, given)
    a, b = (np.asarray(x[:REAL] / np.linalg.norm(x[:REAL], axis=1, keepdims=True), np.float64) for x in (a, b))
    scores, right = a @ b.T / 0.1, np.arange(REAL)
    near(value, (mean_loss(scores, right)[0] + mean_loss(scores.T, right)[0]) / 2)
    near(aux["accuracy"], mean_loss(scores, right)[1])
    assert (aux["weight"], aux["tokens"]) == (3, 20 + 27)
    one_way = functools.partial(loss, symmetric=False)
    near(eqx.filter_jit(one_way)(model, given)[0], mean_loss(scores, right)[0])


def test_contrastive_views_differ_by_their_dropout():
    model = make(SentenceEmbedder, "bert", num_layers=1)
    run = eqx.filter_jit(contrastive_loss)
    (first, _), (again, _), (other, aux) = (run(model, batch(), key=jax.random.key(i)) for i in (0, 0, 1))
    assert first == again != other and float(aux["tokens"]) == 20
    with pytest.raises(ValueError, match="a text's two views are the same: pass a key, or pairs"):
        contrastive_loss(model, batch())


said_again = lambda model, x: model(
    x["token_ids"],
    jnp.concatenate([jnp.zeros(1, jnp.int32), x["token_ids"][:-1]]),
    attention_mask=x["attention_mask"],
)


def test_autoencoders_have_the_discrepancy_of_the_rows_that_count():
    """Of whole codes, and of their tokens."""
    model, given = VAE("tokens"), batch()
    flat, tokens = (autoencoder_loss(per_token=per_token, weight=3.0) for per_token in (False, True))
    both = lambda model, given: (
        flat(model, given)[0],
        flat(model, given)[1] | {"of_tokens": tokens(model, given)[1]["regulariser"]},
    )
    value, aux, output = evaluated(both, said_again, model, given)
    targets = np.where(given["attention_mask"], given["token_ids"], -100)[:REAL]
    mean, accuracy = mean_loss(output.logits[:REAL], targets)
    for name, shape in (("regulariser", (ROWS, -1)), ("of_tokens", (-1, output.latents.shape[-1]))):
        x = output.latents.reshape(shape)
        noise = jax.random.normal(jax.random.key(0), x.shape)
        count = REAL * len(x) // ROWS
        near(aux[name], mmd(x[:count], noise[:count]))
    near([aux["cross_entropy"], aux["accuracy"], aux["regulariser_weight"]], [mean, accuracy, 3])
    near(value, mean * 20 / REAL + 3 * aux["regulariser"])
    assert (aux["weight"], aux["tokens"]) == (3, 20)


def test_autoencoders_as_the_original_sums_them_with_its_schedule_and_reconstruction():
    model, given = VAE("flat"), batch()
    loss = autoencoder_loss(per="batch", reconstruct=True)
    at = functools.partial(loss, step=jnp.asarray(2600))
    value, aux, output = evaluated(at, said_again, model, given)
    mask = given["attention_mask"] * given["weights"].astype(np.int32)[:, None]
    near(aux["reconstruction"], reconstruction_loss(output.states, output.reconstructed_states, mask))
    near(aux["regulariser_weight"], logistic_weight(2600))
    near(value, aux["cross_entropy"] * 20 + aux["regulariser_weight"] * aux["regulariser"] + aux["reconstruction"])
    assert aux["weight"] == 1  # micro-batches count alike
    per_token = autoencoder_loss(per="token", regulariser="none")
    value, aux = eqx.filter_jit(per_token)(model, given)
    near(value, aux["cross_entropy"])
    assert float(aux["weight"]) == 20 and "regulariser" not in aux


def test_variational_autoencoders_have_the_divergence_of_the_rows_that_count():
    model, given = VAE("mean"), batch()
    loss = autoencoder_loss(regulariser="kl", free_bits=0.1)
    _, aux, output = evaluated(loss, said_again, model, given)
    posterior = output.posterior
    near(aux["regulariser"], kl(posterior.mean[:REAL], posterior.log_variance[:REAL], free_bits=0.1))
    assert aux["regulariser_weight"] == 1  # of a schedule, where no step is told
    with pytest.raises(ValueError, match='regulariser = "kl" is of codes that are drawn'):
        eqx.filter_eval_shape(loss, VAE("tokens"), given)


def test_an_updater_tells_the_autoencoder_its_step_and_gradients_are_finite():
    """Also where a row is padding alone."""
    model = VAE("tokens")
    updater = Updater(autoencoder_loss(reconstruct=False), optax.sgd(0.0))
    state, update = updater.init(model, key=KEY), eqx.filter_jit(updater.update)
    state, first = update(state, batch())
    state, second = update(state, batch())
    near([first["regulariser_weight"], second["regulariser_weight"]], logistic_weight(jnp.arange(2)))
    assert bool(first["finite"]) and bool(second["finite"]) and first["regulariser"] != second["regulariser"]


def test_what_a_loss_cannot_use_is_said():
    flat = lambda ids, *, key=None, **given: jnp.ones(1)
    with pytest.raises(ValueError, match=r"two logits a row at least, but this model gives \(1,\)"):
        classification_loss(flat, batch(labels=np.zeros(ROWS, np.int32)))
    with pytest.raises(ValueError, match="chunk = 8 needs a CausalLM, but the model is a function"):
        language_model_loss(flat, batch(), chunk=8)
