"""The encoder: positions, packing, masks, wrong ids, dropout, and what it says when it is called wrongly."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaEmbeddings

from eqx_transformers import ROBERTA, Encoder, EncoderConfig, stack
from eqx_transformers.nn import Linear
from eqx_transformers.skeletons import skeleton

from .ours import CONFIGS, HEADS, KEY, LENGTH, SHAPES, SIZES, call, filled, make, tokens, train

FAMILIES = ["bert", "roberta", "xlm-roberta"]
NEAR = {"rtol": 0, "atol": 1e-5}


def padded(family, keep):
    """Ids with the family's padding wherever `keep` is 0."""
    return np.where(keep, tokens(), CONFIGS[family].padding_id).astype(np.int32)


ROWS = {
    "whole": np.ones(LENGTH, int),
    "padded right": np.arange(LENGTH) < 8,
    "padded left": np.arange(LENGTH) >= 5,
    "padded inside": np.arange(LENGTH) % 4 != 2,
    "padding alone": np.zeros(LENGTH, int),
}


# ---- positions


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_follow_the_references_rule(family, row):
    import torch

    ids = padded(family, ROWS[row])
    if family == "bert":
        there = BertEmbeddings(BertConfig(hidden_size=12)).position_ids[:, :LENGTH]
    else:
        rule = {"roberta": RobertaEmbeddings, "xlm-roberta": XLMRobertaEmbeddings}[family]
        there = rule.create_position_ids_from_input_ids(torch.from_numpy(ids)[None], CONFIGS[family].padding_id)
    np.testing.assert_array_equal(make(Encoder, family).embedding.position_ids(jnp.asarray(ids)), there[0].numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_explicit_positions_are_rows_of_the_position_table(family):
    model, ids = make(Encoder, family, num_layers=0), tokens()
    usual = np.asarray(model.embedding.position_ids(jnp.asarray(ids)))
    np.testing.assert_array_equal(call(model, ids, position_ids=usual), call(model, ids))
    # Three rows further down in a table that was rolled up by three is the same.
    rolled = eqx.tree_at(lambda m: m.embedding.positions.weight, model, replace_fn=lambda w: jnp.roll(w, -3, 0))
    np.testing.assert_array_equal(call(rolled, ids, position_ids=usual), call(model, ids, position_ids=usual + 3))
    assert not np.allclose(call(model, ids, position_ids=usual + 3), call(model, ids), atol=1e-2)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_sequence_that_fills_the_position_table_works_and_a_longer_one_is_refused_while_tracing(family):
    # RoBERTa's 514 rows are for 512 tokens: the commonest mistake with it.
    config = replace(CONFIGS[family], max_positions={"bert": 512, "roberta": 514}[family])
    model, ids = skeleton(Encoder, config), lambda n: jax.ShapeDtypeStruct((n,), jnp.int32)
    run = lambda n, **inputs: (
        eqx.filter_eval_shape(lambda m, ids, inputs: m(ids, **inputs), model, ids(n), inputs).shape
    )
    assert run(512) == (512, SIZES["embed_dim"])
    with pytest.raises(ValueError, match=r"a sequence of 513 tokens is longer than .* which is 512") as raised:
        run(513)
    assert {"bert": "512 rows, the first 0", "roberta": "514 rows, the first 2 not for tokens"}[family] in str(
        raised.value
    )
    assert "Truncate it when tokenizing, or pass position_ids" in str(raised.value)
    assert raised.value.__notes__[0] == "at embedding"
    assert run(600, position_ids=ids(600)) == (600, SIZES["embed_dim"])
    assert run(600, segment_ids=ids(600)) == (600, SIZES["embed_dim"])  # each of the packed texts must fit, not the row


# ---- packing


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_packed_row_is_the_separate_rows(family):
    model, lengths = make(Encoder, family, num_layers=1), (5, 1, 5)
    parts = [tokens(seed, n) for seed, n in enumerate(lengths)]
    parts[2][4] = CONFIGS[family].padding_id  # padding inside a text: RoBERTa does not count it
    types = [np.arange(n, dtype=np.int32) % CONFIGS[family].token_types for n in lengths]
    # The packer's own padding at the end is a segment too; nobody reads it.
    packed = np.concatenate([*parts, np.full(3, CONFIGS[family].padding_id, np.int32)])
    packed_types = np.concatenate([*types, np.zeros(3, np.int32)])
    segments = np.repeat([1, 2, 3, 0], [*lengths, 3])
    together = call(model, packed, segment_ids=segments, token_type_ids=packed_types)
    apart = [call(model, part, token_type_ids=t) for part, t in zip(parts, types, strict=True)]
    np.testing.assert_allclose(together[: sum(lengths)], np.concatenate(apart), **NEAR)
    assert np.isfinite(together).all()
    assert not np.allclose(call(model, packed, token_type_ids=packed_types)[6:11], together[6:11], atol=1e-2)


# ---- masks

KEEP = ROWS["padded inside"].astype(int)


class Probe(eqx.Module):
    """In the place of the blocks: shows what reaches them, the embedded tokens and the table of who sees whom."""

    def __call__(self, x, mask, *, key=None):
        return jnp.concatenate([x, mask.allowed(*x.shape[:1] * 2).astype(x.dtype)], -1)


def test_every_spelling_of_a_mask_and_of_ids_is_the_same():
    probe, ids = eqx.tree_at(lambda m: m.stack, make(Encoder, "bert"), Probe()), tokens()
    expected = np.asarray(probe(ids, attention_mask=KEEP != 0))
    table = np.broadcast_to(KEEP, (LENGTH, LENGTH))
    np.testing.assert_array_equal(expected[:, -LENGTH:], table)
    spellings = [KEEP.astype(np.int64), KEEP.astype(np.uint8), KEEP.astype(np.int32), table, table != 0]
    for mask in [*spellings, *map(jnp.asarray, spellings)]:
        np.testing.assert_array_equal(probe(ids, attention_mask=mask), expected)
    for dtype in (np.uint8, np.uint16, np.int8, np.int64):
        for same in (ids.astype(dtype), jnp.asarray(ids.astype(dtype))):
            zeros = np.zeros_like(same)
            got = probe(same, attention_mask=KEEP, token_type_ids=zeros, segment_ids=zeros)
            np.testing.assert_array_equal(got, expected)


def test_a_masked_key_is_seen_by_nobody_and_a_table_says_who_sees_whom():
    model, ids = make(Encoder, "bert"), tokens()
    other = np.where(KEEP, ids, (ids + 1) % 61).astype(np.int32)
    seen = KEEP != 0
    np.testing.assert_array_equal(
        call(model, ids, attention_mask=KEEP)[seen], call(model, other, attention_mask=KEEP)[seen]
    )
    causal = np.tri(LENGTH, dtype=bool)
    changed = ids.copy()
    changed[7] += 1 if ids[7] < 60 else -1
    before, after = (call(model, x, attention_mask=causal) for x in (ids, changed))
    np.testing.assert_array_equal(before[:7], after[:7])
    assert (np.abs(before[7:] - after[7:]).max(-1) > 1e-3).all()


def trained(family, row, mask):
    return train(make(Encoder, family, num_layers=1), padded(family, ROWS[row]), {"attention_mask": mask})


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_row_of_padding_alone_is_finite_with_finite_gradients(family):
    y, gradient = trained(family, "padding alone", 0 * KEEP)
    arrays = jax.tree.leaves(eqx.filter(gradient, eqx.is_array))
    assert arrays and all(np.isfinite(x).all() for x in [y, *arrays])


# ---- ids outside, shapes that do not fit


def test_a_known_id_outside_is_refused_with_its_path():
    for name, inputs in [("tokens", {}), ("token_types", {"token_type_ids": np.full(LENGTH, 2)})]:
        ids = tokens()
        ids[3] = 61 if name == "tokens" else ids[3]
        with pytest.raises(ValueError, match=r"ids must be 0 to (60|1) .*outside, the first is (61|2)") as raised:
            make(Encoder, "bert")(ids, **inputs)
        assert raised.value.__notes__[0] == f"at embedding.{name}"


@pytest.mark.parametrize("bad", [61, -1])
def test_an_unknown_id_outside_never_gives_plausible_numbers(bad):
    ids = np.stack([tokens(0), tokens(1)])
    ids[1, 3] = bad
    run = eqx.filter_jit(lambda model, ids: jax.vmap(model)(ids))
    hidden = run(make(Encoder, "bert", num_layers=1), ids)
    assert np.isfinite(hidden[0]).all() and np.isnan(hidden[1]).all()


CHECKED = """
import json, jax, jax.numpy as jnp, equinox as eqx
from dataclasses import replace
from eqx_transformers import BERT, Encoder

config = replace(BERT, vocab_size=61, embed_dim=6, num_layers=1, num_heads=2, mlp_dim=8, max_positions=9)
model = Encoder(config, key=jax.random.key(0))
run = eqx.filter_jit(lambda model, ids, mask=None: jax.vmap(lambda x: model(x, attention_mask=mask))(ids))
good = jnp.arange(8).reshape(2, 4)

def said(call):
    try:
        return f"fine: {bool(jnp.isfinite(call()).all())}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps({
    "good": said(lambda: run(model, good)),
    "too large": said(lambda: run(model, good.at[1, 2].set(61))),
    "negative": said(lambda: run(model, good.at[1, 2].set(-1))),
    "mask": said(lambda: run(model, good, jnp.array([1, 1, 2, 0]))),
    "shape": said(lambda: model.stack.blocks[0].attention(jnp.ones(6))),
    "batch": said(lambda: model(good)),
}))
"""


def test_with_the_switch_on_a_user_gets_errors_at_run_time_and_shapes_checked():
    environment = os.environ | {"EQX_TRANSFORMERS_CHECK": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", CHECKED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["good"] == "fine: True"
    for case in ("too large", "negative"):
        assert "ids must be 0 to 60 (a table of 61 rows)" in said[case]
    assert "attention_mask must hold 0 and 1" in said["mask"]
    assert said["shape"].startswith("TypeCheckError") and "Attention.__call__" in said["shape"]
    assert said["batch"].startswith("TypeCheckError") and "token_ids" in said["batch"]


@pytest.mark.parametrize("head", SHAPES, ids=lambda head: head.__name__)
def test_a_batch_without_vmap_is_refused_and_told_of_vmap(unchecked, head):
    ids = np.stack([tokens(0), tokens(1)])
    for inputs in ({}, {"attention_mask": np.ones_like(ids)}):
        with pytest.raises(
            ValueError, match=r"token_ids must be 'seq', but it is \(2, 13\).*jax\.vmap it over a batch"
        ):
            make(head, "bert")(ids, **inputs)


REFUSED = {
    "mask of a batch": ({"attention_mask": np.ones((4, LENGTH), int)}, r"but it is \(4, 13\).*vmap"),
    "mask of another length": (
        {"attention_mask": np.ones(12, int)},
        r"attention_mask must be \(13,\) .* but it is \(12,\)",
    ),
    "additive mask": ({"attention_mask": np.zeros(LENGTH, np.float32)}, "1 where to attend, but it is float32"),
    "short types": (
        {"token_type_ids": np.zeros(1, int)},
        "token_type_ids must be as long as token_ids, 13, but it is 1",
    ),
    "long positions": ({"position_ids": np.zeros(14, int)}, "position_ids must be as long as token_ids"),
    "short segments": ({"segment_ids": np.zeros(12, int)}, "segment_ids must be as long as token_ids"),
    "segments of a batch": ({"segment_ids": np.zeros((2, LENGTH), int)}, "segment_ids must be 'seq'.*vmap"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_would_broadcast_or_mean_something_else_are_refused(unchecked, case):
    inputs, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        make(Encoder, "bert")(tokens(), **inputs)


def test_ids_that_are_not_whole_numbers_are_refused(unchecked):
    with pytest.raises(ValueError, match="token_ids must be integers, but it is float32"):
        make(Encoder, "bert")(tokens().astype(np.float32))


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_an_error_inside_a_model_carries_the_modules_path(unchecked, stacked):
    model = skeleton(HEADS[2], CONFIGS["roberta"])
    where = lambda m: m.backbone.stack.blocks[1].attention.query_proj
    model = eqx.tree_at(where, model, eqx.filter_eval_shape(Linear, 20, 21, key=KEY))
    path = "backbone.stack.blocks.1.attention.query_proj"
    if stacked:
        blocks = model.backbone.stack.blocks[1:]
        model = stack(eqx.tree_at(lambda m: m.backbone.stack.blocks, model, blocks))
        path = path.replace(".1", "")
    with pytest.raises(ValueError, match=r"in_features = 20, but the input is \(13, 21\)") as raised:
        eqx.filter_eval_shape(lambda m, ids: m(ids), model, tokens())
    assert raised.value.__notes__[0] == f"at {path}"


# ---- gradients, dropout, dtypes, depth


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_padding_rows_of_the_tables_get_no_gradient(family):
    ids, (_, gradient) = padded(family, KEEP), trained(family, "padded inside", KEEP)
    embedding = gradient.embedding
    used = lambda table: set(np.flatnonzero(np.abs(getattr(embedding, table).weight).max(-1)))
    pad = CONFIGS[family].padding_id
    assert used("tokens") == set(ids.tolist()) - {pad}
    positions = set(np.asarray(make(Encoder, family).embedding.position_ids(jnp.asarray(ids))).tolist())
    assert used("positions") == (positions if family == "bert" else positions - {pad})
    assert used("token_types") == {0}


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_a_key_switches_dropout_on_and_inference_mode_wins(stacked):
    model, ids = make(Encoder, "bert", stacked, dropout=0.3), tokens()
    plain, dropped = call(model, ids), call(model, ids, KEY)
    assert not np.allclose(plain, dropped, atol=1e-2)
    np.testing.assert_array_equal(dropped, call(model, ids, KEY))
    assert not np.allclose(dropped, call(model, ids, jax.random.key(1)), atol=1e-2)
    np.testing.assert_allclose(call(eqx.nn.inference_mode(model), ids, KEY), plain, **NEAR)
    np.testing.assert_allclose(call(make(Encoder, "bert", not stacked, dropout=0.3), ids, KEY), dropped, **NEAR)


def test_the_token_tables_dtype_is_the_streams():
    model = make(Encoder, "bert", num_layers=1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, model)
    mixed = eqx.tree_at(lambda m: m.embedding.tokens.weight, model, replace_fn=lambda w: w.astype(jnp.bfloat16))
    for changed in (half, mixed):
        hidden = call(changed, tokens())
        assert hidden.dtype == jnp.bfloat16
        assert np.abs(np.asarray(hidden, np.float32) - call(model, tokens())).max() < 0.1


def equations(jaxpr):
    """How many equations there are to compile, those inside scans and calls included."""
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(eqn.params) if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
    return len(jaxpr.eqns) + sum(equations(getattr(x, "jaxpr", x)) for x in inner)


def test_what_a_stacked_model_compiles_does_not_grow_with_its_depth():
    def count(depth, stacked, run):
        model = skeleton(Encoder, replace(CONFIGS["bert"], num_layers=depth), stacked)
        arrays, rest = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
        call = lambda arrays, ids, key: run(eqx.combine(arrays, rest), ids, key)
        return equations(jax.make_jaxpr(call)(arrays, tokens(), KEY).jaxpr)

    forward = lambda model, ids, key: model(ids, key=key)
    backward = lambda *args: jax.tree.leaves(eqx.filter_grad(lambda *args: forward(*args).sum())(*args))
    for run in (forward, backward):
        shallow = count(3, True, run)
        assert shallow > 50
        assert count(12, True, run) == shallow < count(3, False, run)


def test_no_blocks_at_all_is_the_embedding_alone():
    model = make(Encoder, "bert", num_layers=0)
    assert model.stack.num_layers == 0
    np.testing.assert_allclose(call(model, tokens()), model.embedding(jnp.asarray(tokens())), **NEAR)


# ---- the config

WRONG_FACTS = {
    "an activation nobody has": ({"activation": "swish"}, "activation = 'swish' is not one of gelu, gelu_tanh"),
    "a prediction activation": ({"prediction_activation": "x"}, "prediction_activation = 'x' is not one of"),
    "no labels": ({"labels": 0}, "labels = 0 must be at least 1"),
    "negative depth": ({"num_layers": -1}, "num_layers = -1 must not be negative"),
    "counting from no padding": ({"padding_id": None}, "need a padding_id"),
    "a misspelt word": ({"classifier": "linaer"}, "classifier = 'linaer' is not one of pooler, dense, linear"),
    "a rate of its own": ({"choice_dropout": "choice_dropout"}, "is not one of classifier_dropout, dropout"),
    "no probability": ({"attention_dropout": 1.5}, "attention_dropout = 1.5 is not a probability"),
    "hiding no padding": ({"positions": "index", "hides_padding": True, "padding_id": None}, "need a padding_id"),
}


@pytest.mark.parametrize("case", WRONG_FACTS)
def test_facts_that_make_no_model_are_refused(unchecked, case):
    facts, said = WRONG_FACTS[case]
    with pytest.raises(ValueError, match=said):
        replace(ROBERTA, **facts)


def test_a_fresh_model_is_drawn_as_its_config_says():
    config = EncoderConfig(family="bert", vocab_size=997, embed_dim=64, num_layers=1, num_heads=2, init_std=0.5)
    model = eqx.filter_jit(Encoder)(config, key=KEY)
    matrices = [x for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)) if x.ndim == 2 and len(x) > 2]
    assert len(matrices) == 2 + 6 + 1  # two tables, a block, the pooler
    assert all(abs(float(np.std(x)) - 0.5) < 0.03 for x in matrices)
    assert len({np.asarray(x).tobytes() for x in matrices}) == len(matrices)  # no key serves twice
    assert not model.embedding.tokens.weight[0].any()
    assert filled(model).config == config
