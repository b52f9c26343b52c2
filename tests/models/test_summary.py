"""`summary` counts what is there."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from eqx_transformers import Encoder, MaskedLM, summary
from eqx_transformers.summary import num_parameters

from .ours import make

WEIGHTS = 21 * (61 + 31 + 2 + 2)  # the tables and the norm of the embedding
BLOCK = 4 * 22 * 21 + (22 * 37 + 38 * 21) + 4 * 21  # attention, MLP, two norms
HEAD = 22 * 21 + 2 * 21 + 61  # dense, norm, bias; the decoder is the embedding


def rows(text):
    """part -> (arrays, parameters, bytes, dtypes)"""
    cells = [line.split(maxsplit=4) for line in text.splitlines() if not line.startswith(("-", "part"))]
    return {name: (int(n), int(p.replace(",", "")), int(b.replace(",", "")), d) for name, n, p, b, d in cells}


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_a_summary_counts_every_part(stacked):
    table = rows(summary(make(MaskedLM, "bert", stacked)))
    total = WEIGHTS + 2 * BLOCK + HEAD
    assert table["backbone.embedding"] == (5, WEIGHTS, 4 * WEIGHTS, "float32")
    assert table["backbone.stack"] == (16 if stacked else 32, 2 * BLOCK, 8 * BLOCK, "float32")
    assert table["head"][1] == 61 and table["head.dense"][1] == 22 * 21 and table["head.norm"][1] == 42
    assert table["MaskedLM"] == (sum(v[0] for k, v in table.items() if k != "MaskedLM"), total, 4 * total, "float32")
    assert num_parameters(make(MaskedLM, "bert", stacked)) == total


def test_depth_goes_down_the_paths():
    encoder = make(Encoder, "bert")
    assert list(rows(summary(encoder, depth=1))) == ["embedding", "stack", "pooler", "Encoder"]
    assert rows(summary(encoder, depth=3))["stack.blocks.1"][1] == BLOCK
    assert rows(summary(encoder, depth=9))["stack.blocks.1.mlp.up_proj"][1] == 22 * 37


def test_a_skeleton_has_the_same_summary_and_dtypes_are_listed():
    model = make(Encoder, "bert")
    assert summary(eqx.filter_eval_shape(lambda: model)) == summary(model)
    half = eqx.tree_at(lambda m: m.embedding.tokens.weight, model, replace_fn=lambda w: w.astype(jnp.bfloat16))
    table = rows(summary(half))
    assert table["embedding.tokens"][2:] == (2 * 61 * 21, "bfloat16")
    assert table["Encoder"][3] == "bfloat16, float32"


def test_only_floating_point_arrays_are_parameters():
    tree = {"a": jnp.ones((2, 3)), "b": jnp.arange(4), "c": "text", "d": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}
    assert num_parameters(tree) == 11
