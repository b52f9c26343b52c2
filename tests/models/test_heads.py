"""Heads: made from a config, or put on an encoder that is there."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import (
    CausalLM,
    Encoder,
    MaskedLM,
    MultipleChoice,
    PreTraining,
    PreTrainingLogits,
    QuestionAnswerer,
    SentenceEmbedder,
    SequenceClassifier,
    TokenClassifier,
)
from eqx_transformers.skeletons import differences, skeleton

from .ours import CONFIGS, HEADS, KEY, LENGTH, SHAPES, SIZES, call, make, tokens, train

ON_ENCODERS = [head for head in HEADS if head is not Encoder]
FAMILIES = ["bert", "roberta"]
LABELS = {SequenceClassifier: 5, TokenClassifier: 5}
arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))
name = lambda head: head.__name__


def put(head, encoder, key=KEY):
    return head.of(encoder, LABELS.get(head), key=key)


# ---- from a config, and on an encoder


def shaped(shape):
    """The shape with its words replaced by sizes."""
    sizes = {"seq": LENGTH, "labels": 3}
    return tuple(shaped(x) if isinstance(x, tuple) else sizes.get(x, x) for x in shape)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("head", SHAPES, ids=name)
def test_a_head_from_a_config_is_what_its_config_builds(head, family):
    model = eqx.filter_eval_shape(head, replace(CONFIGS[family], labels=3), key=KEY)
    assert differences(model) == []
    assert head is Encoder or model.backbone.config is None  # the top-level model alone carries it
    output = eqx.filter_eval_shape(lambda m, ids: m(ids), model, tokens())
    found = tuple(x.shape for x in output) if isinstance(output, tuple) else output.shape
    assert found == shaped(SHAPES[head])


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ON_ENCODERS, ids=name)
def test_a_head_on_an_encoder_holds_the_encoders_own_arrays(head, family, stacked):
    encoder = make(Encoder, family, stacked)
    model = put(head, encoder)
    for part in ("embedding", "stack"):
        mine, theirs = arrays(getattr(model.backbone, part)), arrays(getattr(encoder, part))
        assert len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))
    assert model.backbone.stack.is_stacked == stacked
    assert differences(model) == []
    assert encoder.config == CONFIGS[family]  # the encoder itself is as it was


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_go_into_the_config(family):
    model = SequenceClassifier.of(make(Encoder, family), 5, key=KEY)
    assert model.config.labels == 5 and model.head.output.out_features == 5
    assert model.config == replace(CONFIGS[family], labels=5, pooler=family == "bert")


def test_a_bert_classifier_keeps_the_pooler_or_makes_one_and_a_roberta_classifier_drops_it():
    bert, roberta = make(Encoder, "bert"), make(Encoder, "roberta")
    assert put(SequenceClassifier, bert).backbone.pooler is bert.pooler
    bare = make(Encoder, "bert", pooler=False)
    assert bare.pooler is None and put(SequenceClassifier, bare).backbone.pooler.dense.weight.any()
    assert roberta.pooler is not None and put(SequenceClassifier, roberta).backbone.pooler is None
    # The others: a masked-LM never reads it, a sentence embedder carries it along for the way back.
    assert put(MaskedLM, bert).backbone.pooler is None
    assert put(SentenceEmbedder, bert).backbone.pooler is bert.pooler
    assert put(SentenceEmbedder, bare).backbone.pooler is None


def test_a_fresh_head_is_drawn_from_its_key():
    encoder = make(Encoder, "roberta")
    one, same, other = (put(SequenceClassifier, encoder, jax.random.key(i)).head for i in (1, 1, 2))
    assert eqx.tree_equal(one, same) and not eqx.tree_equal(one, other)
    assert not np.array_equal(one.dense.weight[:5], one.output.weight)


WRONG = {
    "no labels": (lambda e: SequenceClassifier.of(e, None, key=KEY), r"labels = None: say how many\."),
    "labels for a masked LM": (lambda e: MaskedLM.of(e, 3, key=KEY), r"labels = 3: this head has none\."),
    "labels for embeddings": (lambda e: SentenceEmbedder.of(e, 3), r"labels = 3: this head has none\."),
    "zero labels": (lambda e: SequenceClassifier.of(e, 0, key=KEY), "labels = 0 must be at least 1"),
    "labels by name": (lambda e: SequenceClassifier.of(e, ["a", "b"], key=KEY), r"labels = \['a', 'b'\]: say how many"),
    "a head on a head": (lambda e: MaskedLM.of(SentenceEmbedder.of(e), key=KEY), "expected an Encoder, but it is Sent"),
    "a part of a model": (lambda e: MaskedLM.of(MaskedLM.of(e, key=KEY).backbone, key=KEY), r"encoder=model\.backbone"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_refused(unchecked, case):
    use, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        use(make(Encoder, "bert"))


def test_another_head_moves_onto_a_models_backbone_as_the_error_says():
    language_model = make(MaskedLM, "roberta")
    config = replace(language_model.config, labels=4)
    model = SequenceClassifier(config, encoder=language_model.backbone, key=KEY)
    assert differences(model) == []
    assert model.backbone.embedding.tokens.weight is language_model.backbone.embedding.tokens.weight


# ---- what they compute


def numpy_linear(layer, x):
    return np.asarray(x) @ np.asarray(layer.weight).T + np.asarray(layer.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_reads_the_first_token(family):
    model = make(SequenceClassifier, family, num_layers=0)
    x = call(model.backbone, tokens())[0]
    dense = model.backbone.pooler.dense if family == "bert" else model.head.dense
    expected = numpy_linear(model.head.output, np.tanh(numpy_linear(dense, x)))
    np.testing.assert_allclose(call(model, tokens()), expected, atol=1e-5)


TIED = {tied: make(MaskedLM, "roberta", num_layers=1, tied=tied) for tied in (True, False)}


def test_a_tied_decoder_is_one_leaf_and_an_untied_one_is_two():
    vocabulary = lambda model: [x for x in arrays(model) if x.shape == (SIZES["vocab_size"], SIZES["embed_dim"])]
    assert TIED[True].head.decoder is None
    assert len(vocabulary(TIED[True])) == 1 and len(vocabulary(TIED[False])) == 2
    assert len(arrays(TIED[False])) == len(arrays(TIED[True])) + 1
    spare = make(MaskedLM, "bert", num_layers=0, tied=False, spare_bias=True)
    assert spare.head.spare_bias.shape == (SIZES["vocab_size"],)
    ignored = eqx.tree_at(lambda m: m.head.spare_bias, spare, replace_fn=lambda b: b + 1)
    np.testing.assert_array_equal(call(spare, tokens()), call(ignored, tokens()))


def test_the_gradient_of_a_tied_embedding_has_both_parts():
    # Untied, with the same numbers in both tables, the two parts come apart.
    tied = TIED[True]
    where = lambda m: (m.backbone, m.head.dense, m.head.norm, m.head.bias, m.head.decoder.weight)
    parts = (tied.backbone, tied.head.dense, tied.head.norm, tied.head.bias, tied.backbone.embedding.tokens.weight)
    untied = eqx.tree_at(where, TIED[False], parts)
    (y, one), (y_untied, two) = train(tied, tokens(), {}), train(untied, tokens(), {})
    np.testing.assert_allclose(y_untied, y, atol=1e-5)
    looked_up, scored = two.backbone.embedding.tokens.weight, two.head.decoder.weight
    assert np.abs(looked_up).max() > 1 and np.abs(scored).max() > 1
    both = looked_up + scored
    np.testing.assert_allclose(one.backbone.embedding.tokens.weight, both, atol=1e-5 * np.abs(both).max())


POOLINGS = [("mean", True), ("mean", False), ("cls", True), ("cls", False)]
LEFT = (np.arange(LENGTH) >= 5).astype(np.int32)


@pytest.mark.parametrize(("kind", "unit"), POOLINGS)
def test_pooling_reads_the_keys_that_exist(kind, unit):
    model = make(SentenceEmbedder, "roberta", num_layers=0, pooling=kind, normalize=unit)
    ids = np.where(LEFT, tokens(), 1).astype(np.int32)
    for mask in (LEFT, None):
        hidden = np.asarray(call(model.backbone, ids, attention_mask=mask), np.float64)
        hidden = hidden if mask is None else hidden[mask != 0]
        expected = hidden.mean(0) if kind == "mean" else hidden[0]
        expected = expected / np.linalg.norm(expected) if unit else expected
        np.testing.assert_allclose(call(model, ids, attention_mask=mask), expected, atol=1e-5)


@pytest.mark.parametrize(("head", "facts"), [
    *((SentenceEmbedder, {"num_layers": 0, "pooling": kind, "normalize": unit}) for kind, unit in POOLINGS),
    (MaskedLM, {"num_layers": 0}),
    (SequenceClassifier, {"num_layers": 0}),
], ids=str)  # fmt: skip
def test_a_row_of_padding_alone_has_finite_outputs_and_gradients(head, facts):
    model, ids = make(head, "roberta", **facts), np.full(LENGTH, 1, np.int32)
    y, gradient = train(model, ids, {"attention_mask": 0 * LEFT})
    assert all(np.isfinite(x).all() for x in [y, *arrays(gradient)])


def test_a_mean_needs_to_know_which_keys_exist(unchecked):
    square = np.ones((LENGTH, LENGTH), int)
    with pytest.raises(ValueError, match=r"attention_mask must be 'seq' .* not \(13, 13\)"):
        make(SentenceEmbedder, "bert", num_layers=0)(tokens(), attention_mask=square)


def test_a_mean_in_half_precision_is_taken_in_float32():
    pooling = make(SentenceEmbedder, "bert", normalize=False).pooling
    # In bfloat16, 256 + 1 is 256: a running sum would stand still.
    hidden = jnp.ones((512, 3), jnp.bfloat16)
    assert pooling(hidden).dtype == jnp.bfloat16
    np.testing.assert_array_equal(pooling(hidden), np.ones(3))


def line(output):
    """Every number of an output."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(output)])


@pytest.mark.parametrize("head", ON_ENCODERS, ids=name)
def test_a_key_switches_dropout_on_in_a_head_and_inference_mode_wins(head):
    model, ids = make(head, "roberta", num_layers=0, classifier_dropout=0.5), tokens()
    ids = np.stack([ids, ids]) if head is MultipleChoice else ids
    plain, dropped = line(call(model, ids)), line(call(model, ids, KEY))
    assert not np.allclose(plain, dropped, atol=1e-3)
    np.testing.assert_array_equal(dropped, line(call(model, ids, KEY)))
    np.testing.assert_array_equal(plain, line(call(eqx.nn.inference_mode(model), ids, KEY)))
    if head is MultipleChoice:
        assert dropped[0] != dropped[1]  # each choice draws its own


class Doubled(eqx.Module):
    """A dropout that is seen: it doubles."""

    def __call__(self, x, *, key=None, inference=None):
        return 2 * x


def test_a_projected_embedding_drops_before_its_projection():
    model, ids = make(Encoder, "electra"), jnp.asarray(tokens())
    embedding = model.embedding
    doubled = eqx.tree_at(lambda m: m.dropout, embedding, Doubled())
    normed = eqx.tree_at(lambda m: m.projection, embedding, None)(ids)
    np.testing.assert_allclose(doubled(ids), embedding.projection(2 * normed), rtol=0, atol=1e-5)


# ---- what the further heads mean


def test_a_causal_model_sees_no_future():
    model, ids = make(CausalLM, "bert"), tokens()
    changed = np.concatenate([ids[:7], tokens(1)[7:]])
    ours, theirs = call(model, ids), call(model, changed)
    np.testing.assert_array_equal(ours[:7], theirs[:7])
    assert not np.allclose(ours[7:], theirs[7:], atol=1e-3)
    assert model.config.causal and not make(MaskedLM, "bert").config.causal
    made = CausalLM.of(make(Encoder, "bert"), key=KEY)
    assert made.config.causal and made.backbone.causal and differences(made) == []


def test_pre_training_gives_both_logits_and_each_is_its_own_heads():
    model, ids = make(PreTraining, "bert"), tokens()
    output = call(model, ids)
    assert isinstance(output, PreTrainingLogits)
    masked = MaskedLM(model.config, key=KEY, encoder=model.backbone)
    masked = eqx.tree_at(lambda m: m.head, masked, model.head)
    np.testing.assert_allclose(output.prediction, call(masked, ids), rtol=0, atol=1e-5)
    assert output.next_sentence.shape == (2,)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_multiple_choice_scores_each_choice_alone(family):
    model = make(MultipleChoice, family)
    ids, mask = np.stack([tokens(i) for i in range(3)]), np.ones((3, LENGTH), np.int32)
    mask[1, 5:] = 0
    together = call(model, ids, attention_mask=mask)
    assert together.shape == (3,)
    for i in range(3):
        alone = call(model, ids[i : i + 1], attention_mask=mask[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], rtol=0, atol=1e-5)


def test_multiple_choice_wants_every_input_for_every_choice(unchecked):
    model, ids = make(MultipleChoice, "bert"), np.stack([tokens(0), tokens(1)])
    with pytest.raises(ValueError, match=r"token_ids must be 'choices seq', but it is \(13,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"attention_mask must be 'choices seq', but it is \(13,\)"):
        model(ids, attention_mask=np.ones(LENGTH, int))


def test_a_head_with_parameters_needs_a_key_to_draw_them():
    with pytest.raises(ValueError, match=r"QuestionAnswerer has parameters of its own to draw: pass key="):
        QuestionAnswerer.of(make(Encoder, "bert"))


def test_an_encoder_without_token_types_refuses_them(unchecked):
    with pytest.raises(ValueError, match="token_type_ids were given, but this model has no token types"):
        make(Encoder, "distilbert")(tokens(), token_type_ids=np.zeros(LENGTH, int))


def test_where_padding_hides_itself_no_mask_is_needed():
    model = make(Encoder, "bert", hides_padding=True)
    ids = np.where(np.arange(LENGTH) < 8, tokens(), model.config.padding_id)
    mask = (ids != model.config.padding_id).astype(np.int32)
    np.testing.assert_array_equal(call(model, ids), call(model, ids, attention_mask=mask))
    seen = call(model, ids, attention_mask=np.ones(LENGTH, np.int32))  # a mask that is given is believed
    assert not np.allclose(seen, call(model, ids), atol=1e-3)
    embedder = SentenceEmbedder.of(model)
    np.testing.assert_array_equal(call(embedder, ids), call(embedder, ids, attention_mask=mask))


def test_positions_may_start_at_an_offset():
    model, ids = make(Encoder, "bert", position_offset=2), tokens()
    there = np.arange(2, 2 + LENGTH)
    np.testing.assert_array_equal(call(model, ids), call(model, ids, position_ids=there))
    with pytest.raises(ValueError, match=r"30 tokens is longer .* which is 29 \(31 rows, the first 2 not for tokens\)"):
        model(tokens(length=30))


def test_a_truncated_initialiser_stops_at_two_deviations():
    config = replace(CONFIGS["bert"], init="truncated", init_std=0.02, embed_dim=60, mlp_dim=500)
    weight = Encoder(config, key=KEY).stack.blocks[0].mlp.up_proj.weight
    assert 0.038 < float(jnp.abs(weight).max()) <= 0.04
    assert abs(float(weight.std()) - 0.0176) < 2e-4  # the deviation of a normal that is cut at twice its own


def test_a_classifier_has_its_own_dropout_or_the_models():
    rate = lambda **facts: (
        skeleton(SequenceClassifier, replace(CONFIGS["roberta"], dropout=0.3, **facts)).head.dropout.p
    )
    assert rate() == 0.3
    assert rate(classifier_dropout=0.0) == 0.0
