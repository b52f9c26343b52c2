"""`reconfigure`: the same arrays under a changed fact, or a list of what does not fit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import Encoder, MaskedLM, SequenceClassifier, load, reconfigure, save
from eqx_transformers.nn import kernels, relu
from eqx_transformers.skeletons import differences
from eqx_transformers.surgery import leaves_by_path

from .ours import CONFIGS, KEY, SIZES, make, tokens

arrays = lambda tree: {path: x for path, x in leaves_by_path(tree).items() if eqx.is_array(x)}
bigger = lambda path, old, new: jnp.zeros(new.shape, new.dtype).at[: len(old)].set(old)


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_facts_change_and_the_arrays_are_the_same_objects(stacked):
    model = make(MaskedLM, "bert", stacked)
    changed = reconfigure(model, dropout=0.7, attention_dropout=0.6, activation="relu", norm_eps=0.5)
    assert (changed.config.dropout, changed.config.activation) == (0.7, "relu")
    assert differences(changed) == []
    mine, theirs = arrays(model), arrays(changed)
    assert mine.keys() == theirs.keys() and all(mine[path] is theirs[path] for path in mine)
    assert changed.backbone.stack.is_stacked == stacked
    block = changed.backbone.stack.blocks if stacked else changed.backbone.stack.blocks[0]
    assert (block.mlp_output_dropout.p, block.attention.dropout.p, block.mlp.activation) == (0.7, 0.6, relu)
    assert (block.mlp_norm.eps, changed.head.norm.eps) == (0.5, 0.5)
    assert model.config.dropout == CONFIGS["bert"].dropout  # the model that was given is as it was


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_how_a_model_runs_is_kept(stacked):
    model = make(Encoder, "bert", stacked)
    model = eqx.nn.inference_mode(eqx.tree_at(lambda m: m.stack.remat, model, True))
    blocks = lambda m: [m.stack.blocks] if stacked else list(m.stack.blocks)
    model = eqx.tree_at(lambda m: [b.attention.attend for b in blocks(m)], model, [kernels.plain] * len(blocks(model)))
    changed = reconfigure(model, dropout=0.7)
    assert changed.stack.remat and changed.stack.is_stacked == stacked
    for block in blocks(changed):
        assert block.attention.attend is kernels.plain
        assert block.mlp_output_dropout.inference and block.mlp_output_dropout.p == 0.7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_grown_vocabulary_is_saved_and_loaded_bit_for_bit(tmp_path, dtype):
    model = make(MaskedLM, "roberta")
    model = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, model)
    grown = reconfigure(model, bigger, vocab_size=70)
    assert grown.config.vocab_size == grown.backbone.embedding.tokens.vocab_size == 70
    mine, theirs = arrays(model), arrays(grown)
    resized = {path for path in mine if mine[path] is not theirs[path]}
    assert resized == {"backbone.embedding.tokens.weight", "head.bias"}
    for path in resized:
        assert theirs[path].dtype == dtype
        np.testing.assert_array_equal(theirs[path][:61], mine[path])
        assert not theirs[path][61:].any()
    save(grown, tmp_path / "model")
    assert eqx.tree_equal(load(tmp_path / "model")[0], grown, typematch=True)
    assert eqx.filter_eval_shape(lambda m, ids: m(ids), grown, tokens()).shape == (13, 70)


def test_arrays_can_be_made_where_the_new_config_adds_them():
    model = make(MaskedLM, "roberta")
    asked = {}

    def grow(path, old, new):
        asked[path] = (old, new.shape)
        return jnp.ones(new.shape, new.dtype)

    untied = reconfigure(model, grow, tied=False)
    assert asked == {"head.decoder.weight": (None, (61, 21))}
    assert (untied.head.decoder.weight == 1).all() and differences(untied) == []


def test_every_array_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="do not fit the new config; pass grow=") as raised:
        reconfigure(make(MaskedLM, "roberta"), vocab_size=70, num_layers=1)
    said = str(raised.value)
    assert "backbone.embedding.tokens.weight: float32[61, 21] -> float32[70, 21]\n" in said
    assert "head.bias: float32[61] -> float32[70]\n" in said
    lost = [line for line in said.splitlines() if "has no place under the new config" in line]
    assert len(lost) == 16 and all(".blocks.1." in line for line in lost)
    assert "blocks.0" not in said


@pytest.mark.parametrize(
    ("grow", "said"),
    [
        (lambda path, old, new: None, r"grow gave None"),
        (lambda path, old, new: old, r"grow gave float32\[61\]"),
        # The token table's dtype is the stream's: growing must not change it unsaid.
        (lambda path, old, new: bigger(path, old, new).astype(jnp.bfloat16), r"grow gave bfloat16\[70\]"),
    ],
    ids=["None", "the old array", "another dtype"],
)
def test_what_grow_gives_must_fit(grow, said):
    with pytest.raises(ValueError, match=said):
        reconfigure(make(MaskedLM, "roberta"), grow, vocab_size=70)


def resized(model):
    return eqx.tree_at(lambda m: m.embedding.tokens.weight, model, jnp.ones((70, SIZES["embed_dim"])))


EDITS = {
    "resized": (resized, r"embedding\.tokens\.weight has shape \(70, 21\) where the config builds \(61, 21\)"),
    "another activation": (
        lambda m: eqx.tree_at(lambda m: m.stack.blocks[1].mlp.activation, m, relu),
        r"stack\.blocks\.1\.mlp\.activation is relu where the config builds gelu_tanh",
    ),
    "another dropout rate": (
        lambda m: eqx.tree_at(lambda m: m.embedding.dropout.p, m, 0.5),
        r"embedding\.dropout\.p is 0\.5 where the config builds 0\.1",
    ),
    "another class": (
        lambda m: eqx.tree_at(lambda m: m.stack.blocks[0].mlp, m, eqx.nn.Identity()),
        r"stack\.blocks\.0\.mlp is a Identity where the config builds a MLP",
    ),
    "a part taken out": (
        lambda m: eqx.tree_at(lambda m: m.pooler, m, None),
        r"pooler is None where the config builds a Pooler",
    ),
    "a block taken out": (
        lambda m: eqx.tree_at(lambda m: m.stack.blocks, m, m.stack.blocks[:1]),
        r"stack\.blocks holds 1 where the config builds 2",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_is_refused_and_the_edit_named(edit, tmp_path):
    change, said = EDITS[edit]
    edited = change(make(Encoder, "bert"))
    with pytest.raises(ValueError, match=said):
        reconfigure(edited, dropout=0.0)
    with pytest.raises(ValueError, match=said):
        save(edited, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_fact_that_the_config_does_not_have_is_refused():
    with pytest.raises(TypeError, match="hidden_size"):
        reconfigure(make(Encoder, "bert"), hidden_size=7)
    with pytest.raises(ValueError, match="activation = 'x' is not one of"):
        reconfigure(make(Encoder, "bert"), activation="x")


def test_a_classifier_gets_other_labels():
    model = SequenceClassifier.of(make(Encoder, "roberta"), 3, key=KEY)
    cut = reconfigure(model, lambda path, old, new: old[: new.shape[0]], labels=2)
    assert cut.head.output.out_features == cut.config.labels == 2
    np.testing.assert_array_equal(cut.head.output.weight, model.head.output.weight[:2])
