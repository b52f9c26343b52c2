"""golden/functional_transformer: the article's model and its repository's of today, number by number."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import converters
from converters import arrays as from_file
from eqx_transformers import CausalLM, FunctionalTransformer
from eqx_transformers.nn import Mask
from eqx_transformers.training import adam_uncorrected, cross_entropy
from eqx_transformers.training.originals import functional_transformer
from eqx_transformers.training.updater import Updater

from .folder import (
    FORWARD,
    STEPS,
    among,
    arrays,
    by_path,
    cases,
    close,
    close_gradients,
    close_parameters,
    config,
    folder,
    present,
    weights,
)
from .initial import drawn, expect_law, expect_same_distribution, initial

HERE, FORMAT = folder("functional_transformer"), "functional-transformer"
PLACES = sorted(path.parent for path in HERE.glob("*/config.json"))
# The options of its command line that were used.
LEARNING_RATE, B1, B2 = 0.001, 0.9, 0.99


def every(*holding):
    return among(PLACES, lambda place: cases(place, *holding))


def those(pattern):
    return among(PLACES, lambda place: present(place, sorted(place.glob(pattern))))


def read(place, tensors=None):
    given = weights(place, "params") if tensors is None else tensors
    return converters.from_arrays(FORMAT, given, config(place))[0]


@functools.cache
def model_of(place):
    return read(place)


def loss_of(logits, tokens):
    """Every position but the last predicts the token after it."""
    return cross_entropy(logits[..., :-1, :], tokens[..., 1:])


@eqx.filter_jit
def computed(model, tokens):
    """(loss, logits, the last norm's output after every number of blocks) of one sequence."""
    x = model.backbone.embedding(tokens, jnp.arange(len(tokens)))
    found = [model.backbone.norm(x)]
    for block in model.backbone.stack.blocks:
        x = block(x, Mask(causal=True))
        found.append(model.backbone.norm(x))
    logits = model(tokens)
    return loss_of(logits, tokens), logits, jnp.stack(found)


@eqx.filter_jit
def trained(model, tokens):
    """((loss, the loss of every sequence), gradient) of a batch."""

    def loss(model):
        each = jax.vmap(lambda row: loss_of(model(row), row))(tokens)
        return each.mean(), each

    return eqx.filter_value_and_grad(loss, has_aux=True)(model)


@pytest.mark.parametrize("path", every("logits", "final_normed_hidden_after_k_layers"))
def test_golden_functional_transformer_forward_and_loss(path):
    case, model = arrays(path), model_of(path.parent)
    assert isinstance(model, CausalLM) and isinstance(model.backbone, FunctionalTransformer)
    loss, logits, hidden = computed(model, case["tokens"])
    close(logits, case["logits"], FORWARD)
    close(loss, case["loss"], FORWARD)
    close(hidden, case["final_normed_hidden_after_k_layers"], FORWARD)


@pytest.mark.parametrize("path", every("per_sequence_loss"))
def test_golden_functional_transformer_batch_loss(path):
    case = arrays(path)
    (loss, each), _ = trained(model_of(path.parent), case["tokens"])
    close(loss, case["loss"], FORWARD)
    close(each, case["per_sequence_loss"], FORWARD)


@pytest.mark.parametrize("path", those("*_grads.npz"))
def test_golden_functional_transformer_gradients(path):
    tokens = arrays(path.with_name(path.name.replace("_grads", "_case")))["tokens"]
    _, gradient = trained(model_of(path.parent), tokens)
    close_gradients(gradient, read(path.parent, arrays(path)))
    assert not np.any(gradient.backbone.embedding.positions.weight[tokens.shape[1] :])


def batch_loss(model, batch):
    """The mean of every sequence's loss."""
    return jax.vmap(lambda row: loss_of(model(row), row))(batch["tokens"]).mean()


def updated(model, optimiser, batches):
    """(model, loss before the step) after every step."""
    updater = Updater(batch_loss, optimiser)
    step, state = eqx.filter_jit(updater.update), updater.init(model, key=jax.random.key(0))
    for tokens in batches:
        state, metrics = step(state, {"tokens": tokens})
        yield state.model, metrics["loss"]


@pytest.mark.parametrize("path", those("adam_run.npz"))
def test_golden_functional_transformer_adam(path):
    """Its own: epsilon beside the uncorrected root."""
    case, place, compared = arrays(path), path.parent, set()
    run = updated(model_of(place), functional_transformer(LEARNING_RATE, b1=B1, b2=B2), case["tokens"])
    for i, (model, loss) in enumerate(run, start=1):
        close(loss, case["losses"][i - 1], FORWARD)
        if (wanted := place / f"adam_params_after{i}.npz").exists():
            close_parameters(model, read(place, arrays(wanted)))
            compared.add(wanted)
    assert compared == set(place.glob("adam_params_after*.npz"))


def close_partly(model, place, tensors):
    """Of parameters of which a file holds some."""
    paths = {key: link.ours[0] for link in links(place) for key in link.keys}
    theirs, ours = by_path(read(place, weights(place, "params") | tensors)), by_path(model)
    assert tensors
    for key in tensors:
        close(ours[paths[key]], theirs[paths[key]], STEPS)


@functools.cache
def links(place):
    return from_file.inspect_arrays(FORMAT, weights(place, "params"), config(place)).links


@pytest.mark.parametrize("path", those("sgd_params_after*.npz"))
def test_golden_functional_transformer_sgd(path):
    steps = int(re.findall(r"\d+", path.stem)[-1])
    run = updated(model_of(path.parent), functional_transformer(LEARNING_RATE, method="sgd"), batches(path)[:steps])
    close_partly([model for model, _ in run][-1], path.parent, arrays(path))


@pytest.mark.parametrize("path", those("adam_ancestor_clip1_after*.npz"))
def test_golden_functional_transformer_ancestor_clips_each_number(path):
    """To [-1, 1]. These gradients are smaller, so the clipping itself is tested on others."""
    case, steps = arrays(path), int(re.findall(r"\d+", path.stem)[-1])
    optimiser = functional_transformer(LEARNING_RATE, b1=B1, b2=B2, clip=1.0)
    models, losses = zip(*updated(model_of(path.parent), optimiser, batches(path)[:steps]), strict=True)
    close(losses, case.pop("losses"), FORWARD)
    close_partly(models[-1], path.parent, case)


def batches(path):
    return arrays(path.with_name("adam_run.npz"))["tokens"]


def test_golden_functional_transformer_adam_by_hand():
    """Against the formula in NumPy's float64: large gradients are clipped, and zeros move nothing."""
    optimiser = optax.chain(optax.clip(1.0), adam_uncorrected(0.01, 0.9, 0.999, 0.05))
    gradients = np.array([[3.0, -0.5, 0.0], [-0.2, 0.7, 0.0], [0.1, -5.0, 0.0]])
    x, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
    params = jnp.zeros(3)
    state = optimiser.init(params)
    for t, g in enumerate(np.clip(gradients, -1, 1), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 0.05)
        updates, state = optimiser.update(jnp.asarray(gradients[t - 1], jnp.float32), state)
        params = optax.apply_updates(params, updates)
        close(params, x, 1e-6 * np.abs(x).max() + 1e-9)
    assert params[2] == 0


@pytest.mark.parametrize("path", every("sampled", "margins"))
def test_golden_functional_transformer_greedy_sample(path):
    """One token after the other: all of it at every step, and with a cache."""
    case, model = arrays(path), model_of(path.parent)
    prompt, wanted = case["prompt"], case["sampled"]
    assert len(wanted) == len(prompt) + int(case["length"])
    whole, margins = whole_again(model, prompt, len(wanted))
    np.testing.assert_array_equal(whole, wanted)
    close(margins, case["margins"], FORWARD)
    cached, margins = with_cache(model, prompt, len(wanted))
    np.testing.assert_array_equal(cached, wanted)
    close(margins, case["margins"], FORWARD)


def chosen(scores):
    """(the best, how much better it is than the second)."""
    second, first = np.sort(np.asarray(scores))[-2:]
    return int(np.argmax(scores)), first - second


def whole_again(model, prompt, length):
    """What stands behind a token changes nothing for it: the sequence has its last length from the start."""
    call, tokens, margins = eqx.filter_jit(model), np.zeros(length, np.int32), []
    tokens[: len(prompt)] = prompt
    for i in range(len(prompt), length):
        tokens[i], margin = chosen(call(tokens)[i - 1])
        margins.append(margin)
    return tokens, margins


def with_cache(model, prompt, length):
    step, tokens, margins = eqx.filter_jit(lambda m, ids, cache: m.step(ids, cache, last=True)), [*prompt], []
    scores, cache = step(model, jnp.asarray(prompt), model.init_cache(length))
    while True:
        token, margin = chosen(scores[-1])
        tokens.append(token)
        margins.append(margin)
        if len(tokens) == length:
            return np.array(tokens), margins
        scores, cache = step(model, jnp.asarray([token]), cache)


@pytest.mark.parametrize("path", those("init_stats.json"))
def test_golden_functional_transformer_initialiser(path):
    model, theirs = model_of(path.parent), initial(path, FORMAT)
    ours = drawn(CausalLM, model.config)
    expect_same_distribution(ours, theirs)
    for name, x in ours.items():
        if name.endswith(("proj.weight", "decoder.weight")):
            bound = x.shape[-1] ** -0.5
            expect_law(x, theirs[name], deviation=bound / np.sqrt(3), bound=bound)
        elif name.endswith("tokens.weight"):
            expect_law(x, theirs[name], deviation=1.0)
        else:
            assert name.endswith(("positions.weight", "bias")) or "norm" in name
