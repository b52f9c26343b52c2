"""What surgery made is saved, exported, and generated with."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import converters
from eqx_transformers import generate, load, reconfigure, save, select
from eqx_transformers.surgery.blocks import duplicate, remove
from eqx_transformers.surgery.quantize import dequantize, quantize

from ..models.ours import tokens
from .test_select import equal, model_of


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_a_model_of_other_blocks_becomes_one_of_its_new_config(name, stacked, tmp_path):
    model = model_of(name, stacked)
    place = "encoder.stack" if name == "t5" else "backbone.stack"
    for changed, layers in ((remove(model, f"{place}.blocks.0"), 1), (duplicate(model, f"{place}.blocks.1"), 3)):
        whole = reconfigure(changed, num_layers=layers)
        assert whole.config.num_layers == layers
        assert equal(eqx.tree_at(lambda m: jax.tree.leaves(m), whole, jax.tree.leaves(changed)), whole)
        save(whole, tmp_path / "native")
        assert equal(load(tmp_path / "native")[0], whole)
        if name != "t5":
            converters.export(whole, tmp_path / "hf")
            again, _ = converters.load(tmp_path / "hf", stacked=stacked)
            assert again.config.num_layers == layers
            arrays = lambda model: jax.tree.leaves(eqx.filter(model, eqx.is_array))
            assert equal(arrays(again), arrays(whole))
        with pytest.raises(ValueError, match="differs from what its config builds"):
            reconfigure(changed, num_layers=layers + 1)
        with pytest.raises(ValueError, match="differs from what its config builds"):
            reconfigure(changed)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_quantized_models_generate(name):
    model = quantize(model_of(name), select("Linear") | select("Embedding"), 8)
    ids = jnp.asarray(tokens())[None]
    ours = generate(model, ids, max_new_tokens=4)
    assert np.array_equal(ours, generate(dequantize(model), ids, max_new_tokens=4))
