"""golden/haiku_lm: the causal LMs of Haiku's tutorial and of its official example, number by number."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import converters
from eqx_transformers import CausalLM
from eqx_transformers.nn import Mask
from eqx_transformers.training import cross_entropy
from eqx_transformers.training.originals import haiku_tutorial
from eqx_transformers.training.updater import Updater, compiled

from .folder import (
    FORWARD,
    GRADIENT,
    SUMS,
    Recorded,
    among,
    arrays,
    by_path,
    cases,
    close,
    close_gradients,
    close_parameters,
    config,
    folder,
    norm,
    present,
    weights,
)
from .initial import drawn, expect_law, expect_same_distribution, initial

HERE = folder("haiku_lm")
PLACES = sorted(path.parent for path in HERE.glob("*/config.json"))


def every(*holding):
    return among(PLACES, lambda place: cases(place, *holding))


def those(pattern):
    return among(PLACES, lambda place: present(place, sorted(place.glob(pattern))))


def format_of(place):
    return "haiku-lm-tutorial" if "d_model" in config(place) else "haiku-lm-example"


def read(place, tensors=None, **changed):
    given = weights(place, "params") if tensors is None else tensors
    return converters.from_arrays(format_of(place), given, config(place) | changed)[0]


@functools.cache
def model_of(place):
    return read(place)


def batch_of(case):
    """(inputs, targets), by either system's names."""
    return case["obs" if "obs" in case else "inputs"], case["target" if "target" in case else "targets"]


def states(model, ids):
    """The embedding's output, every block's, and the last norm's, as the original numbers its hidden states."""
    mask = Mask(causal=True, keys=ids != model.padding_id)
    found = [model.embedding(ids, jnp.arange(len(ids)))]
    for block in model.stack.blocks:
        found.append(block(found[-1], mask))
    return jnp.stack([*found, model.norm(found[-1])])


@eqx.filter_jit
def computed(model, ids, targets):
    """(loss, logits, hidden states), gradient: all that a case may hold, compiled once a shape."""

    def loss(model):
        logits = jax.vmap(model)(ids)
        hidden = jax.vmap(lambda ids: states(model.backbone, ids), out_axes=1)(ids)
        # Masked by the input: the position whose target is the first padding counts.
        return cross_entropy(logits, targets, ids != model.config.padding_id), (logits, hidden)

    (loss, (logits, hidden)), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return (loss, logits, hidden), gradient


@pytest.mark.parametrize("path", every("logits", "loss"))
def test_golden_haiku_lm_forward_and_loss(path):
    """Padding on the right and on the left (whose first rows see nothing), none, and less than the table's length."""
    case, model = arrays(path), model_of(path.parent)
    assert isinstance(model, CausalLM) and model.config.dropout == config(path.parent)["dropout_rate"]
    ids, targets = batch_of(case)
    if "input_mask" in case:
        np.testing.assert_array_equal(ids != model.config.padding_id, case["input_mask"] == 1)
    (loss, logits, hidden), gradient = computed(model, ids, targets)
    close(logits, case["logits"], FORWARD)
    close(loss, case["loss"], FORWARD)
    if "hidden_states" in case:
        close(hidden, case["hidden_states"], FORWARD)
    if "grad_global_norm" in case:
        close(norm(gradient), case["grad_global_norm"], SUMS)


@pytest.mark.parametrize("path", every("logits", "loss"))
def test_golden_haiku_lm_the_backbone_is_the_same(path):
    """`head=` gives the model below its output, whose last states are the case's."""
    given = arrays(path)
    place, (ids, _) = path.parent, batch_of(given)
    whole = model_of(place)
    bare, origin = converters.from_arrays(
        format_of(place), weights(place, "params"), config(place), head=type(whole.backbone)
    )
    assert sorted(origin.dropped) == sorted(key for key in weights(place, "params") if is_output(key))
    assert by_path(bare).keys() == by_path(whole.backbone).keys()
    assert all(np.array_equal(x, by_path(whole.backbone)[name]) for name, x in by_path(bare).items())
    if "hidden_states" in given:
        close(eqx.filter_jit(bare)(ids[0]), given["hidden_states"][-1][0], FORWARD)


def is_output(key):
    return re.fullmatch(r"(language_model/)?linear/[wb]", key) is not None


@pytest.mark.parametrize("path", those("*_grads.npz"))
def test_golden_haiku_lm_gradients(path):
    ids, targets = batch_of(arrays(path.with_name(path.name.replace("_grads", "_case"))))
    _, gradient = computed(model_of(path.parent), ids, targets)
    close_gradients(gradient, read(path.parent, arrays(path)))


def sites(model):
    """The places at which the original drops, in its order of calls."""
    blocks = model.backbone.stack.blocks
    return [place for b in blocks for place in (b.attention_output_dropout, b.mlp_output_dropout)]


@pytest.mark.parametrize("path", every("keep_00", "rate"))
def test_golden_haiku_lm_recorded_dropout(path):
    case = arrays(path)
    model = read(path.parent, dropout_rate=float(case["rate"]))
    keeps = [case[name] for name in sorted(name for name in case if name.startswith("keep_"))]
    assert len(keeps) == len(sites(model))
    close([place.p for place in sites(model)], np.full(len(keeps), case["rate"]), 1e-7)
    assert model.backbone.embedding.dropout.p == 0  # nor is anything else dropped
    assert all(b.attention.dropout.p == 0 for b in model.backbone.stack.blocks)
    for row, ids in enumerate(batch_of(case)[0]):
        recorded = [Recorded(jnp.asarray(keep[row]), float(case["rate"])) for keep in keeps]
        dropped = eqx.tree_at(sites, model, recorded)
        close(eqx.filter_jit(dropped)(ids, key=jax.random.key(0)), case["logits"][row], FORWARD)


def undropped_loss(model, batch):
    """It takes no key, so there is no dropout."""
    logits = jax.vmap(model)(batch["ids"])
    return cross_entropy(logits, batch["targets"], batch["ids"] != model.config.padding_id)


def adam_state(state):
    """The moments, wherever the chain holds them."""
    return next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))


@pytest.mark.parametrize("path", every("losses", "grad_norms_before_clip"))
def test_golden_haiku_lm_optimizer_steps(path):
    """Clipped by the norm of all gradients, then Adam: losses, norms, moments and parameters."""
    case, place, model = arrays(path), path.parent, model_of(path.parent)
    facts = config(place)
    settings = {"clip_norm": facts["grad_clip_value"], "b1": facts["b1"], "b2": facts["b2"]}
    updater = Updater(undropped_loss, haiku_tutorial(facts["learning_rate"], **settings))
    step, compared = compiled(updater), set()
    trained = updater.init(model, key=jax.random.key(0))
    for i, (ids, targets) in enumerate(zip(case["obs"], case["target"], strict=True)):
        trained, metrics = step(trained, {"ids": ids, "targets": targets})
        close(metrics["loss"], case["losses"][i], FORWARD)
        close(metrics["gradient_norm"], case["grad_norms_before_clip"][i], SUMS)
        model, state = trained.model, trained.optimizer_state
        if (wanted := place / f"params_after_update{i + 1}.npz").exists():
            close_parameters(model, read(place, arrays(wanted)))
            compared.add(wanted)
        for kind, tolerance in (("mu", moment(1 - facts["b1"], 1)), ("nu", moment(1 - facts["b2"], 2))):
            if (wanted := place / f"adam_{kind}_after_update{i + 1}.npz").exists():
                compared.add(wanted)
                theirs, ours = by_path(read(place, arrays(wanted))), by_path(getattr(adam_state(state), kind))
                assert theirs.keys() == ours.keys()
                for name, x in theirs.items():
                    close(ours[name], x, tolerance(x))
    assert compared == set(place.glob("*_after_update*.npz"))


def moment(share, power):
    """The tolerance of gradients, as it reaches a moment: their power, of which this share comes in."""
    return lambda x: power * GRADIENT * np.abs(x).max() + share * 1e-7**power


@pytest.mark.parametrize("path", those("init_stats.json"))
def test_golden_haiku_lm_initialiser(path):
    """Every parameter is drawn as the original draws it; what is cut is cut where it cuts."""
    model, theirs = model_of(path.parent), initial(path, format_of(path.parent))
    ours, facts = drawn(CausalLM, model.config), model.config
    expect_same_distribution(ours, theirs)
    cut = 0.87962566103423978  # the deviation of a normal that is cut at 2
    for name, x in ours.items():
        fan_in = x.shape[-1]
        if ".embedding." in name:
            expect_law(x, theirs[name], deviation=0.02 * cut, bound=0.04)
        elif name == "head.decoder.weight":
            expect_law(x, theirs[name], deviation=cut / np.sqrt(fan_in), bound=2 / np.sqrt(fan_in))
        elif name.endswith("proj.weight"):
            deviation = np.sqrt(2 / facts.num_layers / fan_in)
            expect_law(x, theirs[name], deviation=deviation, bound=2 * deviation / cut)
        else:
            assert name.endswith("bias") or "norm" in name
