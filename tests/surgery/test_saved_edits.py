"""What surgery made is saved, exported, and generated with."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import converters
from eqx_transformers import FormatError, generate, load, reconfigure, save, select
from eqx_transformers.surgery import add_adapter, set_static
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


def test_an_edit_of_no_array_that_is_not_repeated_is_found(tmp_path):
    model = model_of("bert")
    where = select("Linear", under="**.attention.{query,value}_proj")
    adapt = lambda model, **options: add_adapter(model, where, rank=2, key=jax.random.key(0), **options)
    calm = lambda model: set_static(model, "backbone.stack.blocks.1.attention_norm", eps=0.1)
    quick = lambda model: select(under="**.mlp.activation").map(model, lambda _: jax.nn.relu)
    save(adapt(calm(quick(model)), dropout=0.5, name="french"), tmp_path / "edited", edited=True)
    again, _ = load(tmp_path / "edited", skeleton=lambda m: adapt(calm(quick(m)), dropout=0.5, name="french"))
    assert equal(again, adapt(calm(quick(model)), dropout=0.5, name="french"))
    for forgets, said in (
        (lambda m: adapt(quick(m), dropout=0.5, name="french"), r"attention_norm: saved LayerNorm\(eps=0.1\), the"),
        (
            lambda m: adapt(calm(m), dropout=0.5, name="french"),
            r"mlp.activation: saved .*relu.*, the skeleton builds .*gelu",
        ),
        (lambda m: adapt(calm(quick(m)), name="french"), r"dropout.p: saved 0.5, the skeleton builds 0.0"),
        (lambda m: adapt(calm(quick(m)), dropout=0.5), r"saved LoRA\(names=\('french',\)\), the"),
    ):
        with pytest.raises(FormatError, match="(?s)holds another model than the one that skeleton= builds.*" + said):
            load(tmp_path / "edited", skeleton=forgets)
    with pytest.raises(FormatError, match="is not a directory"):
        load(tmp_path / "nowhere")
