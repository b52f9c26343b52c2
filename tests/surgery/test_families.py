"""Surgery on every family: what wrappers promise, and swaps of activations, layers and heads by one `eqx.tree_at`."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import converters
from converters.families import FAMILIES
from eqx_transformers import LoRA, SequenceClassifier, load, nn, reconfigure, save, select, stack, unstack
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery import IA3, Quantized, merge, quantization_report, quantize

from ..models.ours import filled

pytestmark = pytest.mark.usefixtures("strict_promotion")
KEY = jax.random.key(3)
SIZES = {"vocab_size": 61, "embed_dim": 24, "num_layers": 2, "num_heads": 4, "mlp_dim": 20, "max_positions": 31}
SIZES |= {"embedding_dim": 13, "num_kv_heads": 2, "head_dim": 6, "labels": 3}
SIZES |= {"num_decoder_layers": 2, "num_buckets": 8, "max_distance": 7}
IDS = jnp.asarray([7, 31, 12, 60, 5, 44, 9, 23, 1], jnp.int32)  # T5 reads the state of its end, 1

every = pytest.mark.parametrize("family", FAMILIES)
layouts = pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
call = eqx.filter_jit(lambda models, ids: [model(ids) for model in models])


@functools.cache
def model_of(family, stacked=False):
    """A tiny classifier with random numbers in every array."""
    defaults = FAMILIES[family].defaults
    known = {field.name for field in dataclasses.fields(defaults)} & SIZES.keys()
    unsaid = {"embedding_dim"} if getattr(defaults, "embedding_dim", None) is None else set()
    facts = {name: SIZES[name] for name in known - unsaid}
    config = dataclasses.replace(defaults, **facts, **({"tied": False} if family == "umt5" else {}))  # as its files say
    model = filled(skeleton(SequenceClassifier, config))
    model = jax.tree.map(lambda x: 0.5 * x if eqx.is_array(x) and x.ndim == 2 else x, model)
    return stack(model) if stacked else model


def apart(a, b):
    """The largest difference, of the largest number."""
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def far(a, b):
    """The same, of the largest number or of 1: how numerical promises are stated."""
    return float(jnp.abs(a - b).max() / max(1.0, float(jnp.abs(b).max())))


# ---- what wrappers promise

PROJECTIONS = select("Linear", under="**.{attention,self_attention,cross_attention}.{query,value}_proj")
TABLES = select("Embedding", where=lambda path, node: node.vocab_size > 20)
WRAPPERS = {
    "LoRA": (PROJECTIONS, LoRA.adapter(2, 4)),
    "rsLoRA on all linear layers": (select("Linear", under="**.blocks"), LoRA.adapter(3, 5, rslora=True)),
    "LoRA on tables": (TABLES, LoRA.adapter(2)),
    "DoRA": (PROJECTIONS, LoRA.adapter(2, 4, dora=True)),
    "PiSSA": (PROJECTIONS, LoRA.adapter(2, init="pissa")),
    "OLoRA": (PROJECTIONS, LoRA.adapter(2, init="olora")),
    "fused": (select("Linear", under="**.mlp.up_proj"), LoRA.adapter(2, parts=2)),
    "IA3": (PROJECTIONS, lambda node, key: IA3.adapter()(node)),
}


def wrapped(model, where, make):
    chosen = where.on(model)
    return eqx.tree_at(chosen, model, chosen.each(model, make, key=KEY))


def trained(model):
    """As if everything that an adapter learns had been learnt: random numbers are added to it."""
    return jax.tree.map(lambda node: moved(node) if is_wrapper(node) else node, model, is_leaf=is_wrapper)


def is_wrapper(node):
    return isinstance(node, LoRA | IA3)


def moved(node):
    if isinstance(node, IA3):
        return eqx.tree_at(lambda n: n.scale, node, replace_fn=nudged)
    learnt = lambda n: [x for a in n.adapters for x in (a.a, a.b, a.magnitude) if x is not None]
    return eqx.tree_at(learnt, node, replace_fn=nudged)


def nudged(x):
    return x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)


@layouts
@every
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_change_nothing_at_first_and_merging_keeps_the_function(wrapper, family, stacked):
    model, (where, make) = model_of(family, stacked), WRAPPERS[wrapper]
    fresh = wrapped(model, where, make)
    learnt = trained(fresh)
    plain, added, back, changed, merged = call([model, fresh, merge(fresh), learnt, merge(learnt)], IDS)
    # PiSSA and OLoRA round what remains of the base, DoRA a norm; all else adds zero.
    rounding = 2e-5 if wrapper in ("PiSSA", "OLoRA", "DoRA") else 1e-6
    assert far(added, plain) < rounding and far(back, plain) < rounding
    assert far(merged, changed) < 2e-5 and apart(changed, plain) > 1e-3
    assert jax.tree.structure(merge(learnt)) == jax.tree.structure(model)
    if rounding == 1e-6:
        assert eqx.tree_equal(merge(fresh), model)


@layouts
@every
def test_adapters_differ_and_both_layouts_have_the_same_ones(family, stacked):
    adapted = wrapped(model_of(family, stacked), PROJECTIONS, LoRA.adapter(2, 4))
    adapters = [node.adapters[0].a for node in select(LoRA).get(unstack(adapted) if stacked else adapted)]
    assert len(adapters) >= 4 and all(x.shape[0] == 2 for x in adapters)
    assert all(float(jnp.abs(a - b).max()) > 1e-3 for i, a in enumerate(adapters) for b in adapters[:i])
    other = wrapped(model_of(family, not stacked), PROJECTIONS, LoRA.adapter(2, 4))
    assert eqx.tree_equal(stack(other) if stacked else unstack(other), adapted)


# ---- swaps


@layouts
@every
def test_an_activation_is_swapped_by_replace_fn(family, stacked):
    model = model_of(family, stacked)
    chosen = select(under="**.mlp.activation")
    new = "relu" if model.config.activation != "relu" else "silu"
    swapped = eqx.tree_at(chosen, model, replace_fn=lambda _: nn.ACTIVATIONS[new])
    found, told, plain = call([swapped, reconfigure(model, activation=new), model], IDS)
    assert apart(found, told) == 0 and apart(found, plain) > 1e-3


class Doubled(eqx.Module):
    """A layer in another's place."""

    layer: eqx.Module

    def __call__(self, x, *, key=None):
        return 2 * self.layer(x)


@layouts
@every
def test_layers_are_swapped_by_each(family, stacked):
    model = model_of(family, stacked)
    chosen = select("Linear", under="**.mlp.down_proj").on(model)
    swapped = eqx.tree_at(chosen, model, chosen.each(model, Doubled))
    twice = chosen.map(model, lambda layer: jax.tree.map(lambda x: 2 * x, layer))
    found, wanted, plain = call([swapped, twice, model], IDS)
    assert apart(found, wanted) < 1e-6 and apart(found, plain) > 1e-3


@every
def test_a_head_is_swapped_by_one(family):
    model = model_of(family)
    head = select(under="head")
    wide = type(model)(dataclasses.replace(model.config, labels=5), key=KEY).head
    swapped = eqx.tree_at(head.one(), model, wide)
    (found,) = call([swapped], IDS)
    assert found.shape == (5,) and eqx.tree_equal(swapped.backbone, model.backbone)


@layouts
@every
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_layers_compute_what_their_rounded_weights_do(family, stacked, bits):
    model = model_of(family, stacked)
    small = quantize(model, select("Linear", under="**.blocks"), bits=bits, group=8)
    rounded = select(Quantized).map(small, lambda node: node.plain())
    found, wanted, plain = call([small, rounded, model], IDS)
    assert far(found, wanted) < 2e-5 and apart(found, plain) > 0
    report = quantization_report(model, small)
    assert all(0 < line.error < (0.01 if bits == 8 else 0.15) for line in report.layers), str(report)
    assert all(line.bytes_after < line.bytes_before for line in report.layers)


# ---- a vocabulary that grows


def zeros_below(path, old, new):
    """More rows of zeros."""
    return jnp.zeros(new.shape, new.dtype).at[: len(old)].set(old)


@every
def test_a_vocabulary_grows_and_goes_out_and_back(family, tmp_path):
    model = model_of(family)
    bigger = reconfigure(model, zeros_below, vocab_size=67)
    assert apart(*call([bigger, model], IDS)) < 1e-6
    save(bigger, tmp_path / "native")
    converters.export(bigger, tmp_path / "hf")
    assert eqx.tree_equal(load(tmp_path / "native")[0], bigger)
    again, origin = converters.load(tmp_path / "hf")
    assert origin.family == family and eqx.tree_equal(jax.tree.leaves(again), jax.tree.leaves(bigger))
