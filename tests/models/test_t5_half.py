"""T5 in float16, which ends at 65504: finite where transformers' own is not, and near to float32; and in bfloat16.

Matrices before a feed-forward network's product are made so large that numbers in it surpass float16's range, as they
do in trained T5s. transformers cuts off what a sub-layer gives; within one, what is infinite has become NaN before.
"""

import copy
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import converters
from eqx_transformers.nn import Mask

from .. import kept
from ..reference import run
from ..tiny import GATED

LARGEST = float(jnp.finfo(jnp.float16).max)
rng = np.random.default_rng(0)
GIVEN = {"ids": rng.integers(2, 61, (3, 11)), "decoder_token_ids": rng.integers(2, 61, (3, 7))}
SIZES = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
SIZES |= {"num_decoder_layers": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 7}
SIZES |= {"decoder_start_token_id": 0, "attn_implementation": "eager"}
# By how much `wi` is larger than it was drawn, and `wo` smaller or larger.
INSIDE = {"gated": (300.0, 1e-3), "relu": (30000.0, 1e-4)}  # the products leave the range, what is added does not
BEYOND = {"gated": (200.0, 1.0)}  # what is added leaves it too
SAID = {"gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, "relu": {}}


@functools.cache
def there(name, scales):
    """(directory, torch model, its scores, the largest number before `wo`, the largest after it)."""
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES, **SAID[name])).eval()
    before, after = [], []

    def note(_, inputs, y):
        before.append(inputs[0].abs().max().item())
        after.append(y.abs().max().item())

    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.mul_(scales[0] if ".wi" in path else scales[1] if ".wo." in path else 1.0)
        outputs = [module for path, module in model.named_modules() if path.endswith(".wo")]
        hooks = [module.register_forward_hook(note) for module in outputs]
        scores = run(model, GATED, GIVEN).numpy()
    for hook in hooks:
        hook.remove()
    directory = kept.directory("half")
    model.save_pretrained(directory)
    return directory, model, scores, max(before), max(after)


@functools.cache
def loaded(name, scales, dtype):
    return converters.load(there(name, scales)[0], dtype=dtype)[0]


@functools.cache
def ours(name, scales, dtype):
    def each(model, ids, decoder_token_ids):
        return jax.vmap(lambda a, b: model(a, b))(ids, decoder_token_ids)

    scores = eqx.filter_jit(each)(loaded(name, scales, dtype), *GIVEN.values())
    assert scores.dtype == dtype
    return np.asarray(scores, np.float32)


def distance(scores, expected):
    """The largest one, as a part of the largest score."""
    return np.abs(scores - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", INSIDE)
def test_float16_is_finite_and_near_where_transformers_own_is_not_a_number(name):
    _, model, expected, inside, added = there(name, INSIDE[name])
    assert inside > LARGEST > 10 * added
    with torch.no_grad():
        theirs = run(copy.deepcopy(model).half(), GATED, GIVEN)
    assert theirs.isnan().any()
    half = ours(name, INSIDE[name], "float16")
    # A unit in float16's last place is 1e-3 of a number: weights have one rounding, the stream one a sub-layer, and
    # errors of 13 sub-layers add up to a few of them. bfloat16, whose unit is eight times as large, is further off.
    assert np.isfinite(half).all() and distance(half, expected) < 6e-3
    coarse = ours(name, INSIDE[name], "bfloat16")
    assert np.isfinite(coarse).all() and 2 * distance(half, expected) < distance(coarse, expected) < 5e-2


@pytest.mark.parametrize("name", BEYOND)
def test_a_stream_that_leaves_the_range_stays_at_its_end(name):
    """What float16 cannot hold is cut off: finite, and no longer near. The wider types hold it."""
    _, model, expected, _, added = there(name, BEYOND[name])
    assert added > LARGEST
    with torch.no_grad():
        assert not run(copy.deepcopy(model).half(), GATED, GIVEN).isfinite().all()
    half = ours(name, BEYOND[name], "float16")
    assert np.isfinite(half).all() and 0.05 < distance(half, expected) < 1
    assert distance(ours(name, BEYOND[name], "bfloat16"), expected) < 5e-2
    assert distance(ours(name, BEYOND[name], "float32"), expected) < 2e-5


@pytest.mark.parametrize("name", INSIDE)
def test_steps_in_float16_are_the_call(name):
    model, given = loaded(name, INSIDE[name], "float16"), GIVEN["decoder_token_ids"][0]

    @eqx.filter_jit
    def steps(model):
        cache, out = model.init_cache(model.encode(GIVEN["ids"][0]), 7), []
        for at, n in ((0, 3), (3, 1), (4, 3)):
            y, cache = model.step(given[at : at + n], cache)
            out.append(y)
        return jnp.concatenate(out)

    expected = ours(name, INSIDE[name], "float16")[0]
    assert distance(np.asarray(steps(model), np.float32), expected) < 6e-3


def floats(jaxpr):
    """(primitive, dtype) of everything that computes numbers with a point, inside of what is called too."""
    found = {(e.primitive.name, str(o.aval.dtype)) for e in jaxpr.eqns for o in e.outvars}
    inner = [x for e in jaxpr.eqns for x in jax.tree.leaves(e.params, is_leaf=lambda x: hasattr(x, "eqns"))]
    called = [getattr(x, "jaxpr", x) for x in inner if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
    found |= {one for jaxpr in called for one in floats(jaxpr)}
    return {(name, dtype) for name, dtype in found if "float" in dtype}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nothing_is_cut_off_and_nothing_widened_but_in_float16(dtype):
    model = loaded("gated", INSIDE["gated"], dtype)
    arrays, rest = eqx.partition(model, eqx.is_array)
    assert {x.dtype for x in jax.tree.leaves(arrays)} == {jnp.dtype(dtype)}
    block = model.decoder.stack.blocks[0]
    whole = jax.make_jaxpr(lambda arrays: eqx.combine(arrays, rest)(*(x[0] for x in GIVEN.values())))(arrays)
    cuts = {name for name, _ in floats(whole.jaxpr)} & {"min", "clamp"}
    assert bool(cuts) == (dtype == "float16")
    inside = []
    watched = eqx.tree_at(lambda b: b.mlp.down_proj, block, lambda x: inside.append(x.dtype) or x[:, :32])
    memory = model.encode(GIVEN["ids"][0])
    y = watched(memory.states, Mask(causal=True), None, memory)
    assert y.dtype == dtype and inside == [jnp.dtype("bfloat16" if dtype == "bfloat16" else "float32")]
