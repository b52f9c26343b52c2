"""What stands on a T5: heads, where it drops, its loss, and what else is done with models: files, changed facts."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from eqx_transformers import (
    MT5,
    T5,
    T5_V1,
    UMT5,
    CausalLM,
    MaskedLM,
    QuestionAnswerer,
    SequenceClassifier,
    T5Encoder,
    T5Model,
    TokenClassifier,
    load,
    reconfigure,
    save,
    stack,
)
from eqx_transformers.nn import Dropout, kernels
from eqx_transformers.skeletons import differences, skeleton
from eqx_transformers.surgery import leaves_by_path
from eqx_transformers.training import chunked_cross_entropy, cross_entropy

from ..full import FULL
from .ours import KEY, filled
from .test_t5 import CONFIGS, NEAR, SEQ, TARGET, call, make, tokens

arrays = lambda tree: {path: x for path, x in leaves_by_path(tree).items() if eqx.is_array(x)}
END = 1
HEADS = {SequenceClassifier: T5Model, TokenClassifier: T5Encoder, QuestionAnswerer: T5Model}
SHAPES = {SequenceClassifier: (5,), TokenClassifier: (SEQ, 5), QuestionAnswerer: (SEQ, 2)}


def ended(seed=0, *ends):
    """Tokens with an end at each of these places."""
    ids = tokens(seed)
    ids[list(ends or (SEQ - 1,))] = END
    return ids


# ---- heads


@pytest.mark.parametrize("name", ["t5", "umt5"] if FULL else ["t5"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_a_head_put_on_a_t5_shares_its_arrays_and_is_what_the_config_builds(head, name):
    labels = 5 if head.takes_labels else None
    body = make(HEADS[head], name)
    model = head.of(body, labels, key=KEY)
    made = eqx.filter_eval_shape(head, replace(CONFIGS[name], labels=labels or CONFIGS[name].labels), key=KEY)
    assert differences(model) == [] == differences(made)
    assert model.config == made.config and model.backbone.config is None
    mine, theirs = arrays(model.backbone), arrays(body)
    assert mine.keys() == theirs.keys() and all(mine[path] is theirs[path] for path in mine)
    assert eqx.filter_eval_shape(lambda m, ids: m(ids), model, tokens()).shape == SHAPES[head]


@functools.cache
def classifier(**facts):
    """Biases are not zero: a mistake would show."""
    model = SequenceClassifier.of(make(T5Model, "t5", **facts), 3, key=KEY)
    return eqx.tree_at(lambda m: [m.head.dense.bias, m.head.output.bias], model, [jnp.full(21, 0.3), jnp.ones(3)])


@pytest.mark.parametrize("ends", [(12,), (7,), (0,), (2, 9), (3, 7, 12)], ids=str)
def test_a_classifier_reads_the_state_at_the_last_end(ends):
    model, ids = classifier(), ended(0, *ends)
    state = np.float64(call(model.backbone, ids)[max(ends)])
    dense, output = ((np.float64(x.weight), np.float64(x.bias)) for x in (model.head.dense, model.head.output))
    expected = output[0] @ np.tanh(dense[0] @ state + dense[1]) + output[1]
    np.testing.assert_allclose(call(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_sequence_without_an_end_is_an_error_where_it_is_known_and_nan_where_not(unchecked, monkeypatch):
    model, without = classifier(), tokens()
    with pytest.raises(ValueError, match="token_ids must hold the end token, 1: a classifier reads its state"):
        model(without)
    assert np.isnan(call(model, without)).all() and np.isfinite(call(model, ended())).all()
    rows = eqx.filter_jit(lambda m, ids: jax.vmap(m)(ids))(model, jnp.stack([ended(), without]))
    assert np.isfinite(rows[0]).all() and np.isnan(rows[1]).all()
    monkeypatch.setenv("EQX_TRANSFORMERS_CHECK", "1")
    checked = eqx.filter_jit(lambda model, ids: model(ids))  # a fresh one: the switch is read while tracing
    with pytest.raises(RuntimeError, match="must hold the end token"):
        checked(model, without).block_until_ready()
    with pytest.raises(ValueError, match="names no end_id, the token whose state a classifier reads; T5's own is 1"):
        classifier(end_id=None)(ended())


def test_padding_behind_the_end_changes_no_class_and_another_end_does():
    model, text = classifier(), ended(0, 7)
    text[8:] = 0
    there = np.arange(SEQ) < 8
    given = lambda ids, mask: call(model, ids, attention_mask=mask, decoder_attention_mask=mask)
    np.testing.assert_allclose(given(text, there), call(model, text[:8]), **NEAR)
    five = np.where(text == END, 5, np.where(text == 5, 6, text)).astype(np.int32)
    assert np.isnan(call(model, five)).all() and np.isfinite(call(classifier(end_id=5), five)).all()


def test_tokens_are_labelled_by_the_encoder_and_answers_found_by_the_decoder():
    labelled = TokenClassifier.of(make(T5Encoder, "t5"), 4, key=KEY)
    hidden = call(make(T5Encoder, "t5"), tokens())
    expected = np.float64(hidden) @ np.float64(labelled.head.output.weight).T
    np.testing.assert_allclose(call(labelled, tokens()), expected, rtol=1e-4, atol=1e-4)
    answers = QuestionAnswerer.of(make(T5Model, "t5"), key=KEY)
    ids = tokens()
    hidden = call(make(T5Model, "t5"), ids, np.concatenate([[0], ids[:-1]]).astype(np.int32))
    expected = np.float64(hidden) @ np.float64(answers.head.output.weight).T
    np.testing.assert_allclose(call(answers, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_head_on_the_wrong_half_or_an_encoders_is_one_clear_error(unchecked):
    stands = "On a T5Model stand SequenceClassifier, QuestionAnswerer"
    for head in (MaskedLM, CausalLM):
        with pytest.raises(ValueError, match=f"{head.__name__}.* expected .* T5Config.*{stands}"):
            head(CONFIGS["t5"], key=KEY)
    for head, body in ((TokenClassifier, T5Model), (SequenceClassifier, T5Encoder), (QuestionAnswerer, T5)):
        labels = 3 if head.takes_labels else None
        with pytest.raises(ValueError, match=f"{head.__name__}.of: expected .* but it is {body.__name__}"):
            head.of(make(body, "t5"), labels, key=KEY)


# ---- dropout

RATE = 0.3
TORCH = {"d_model": 21, "d_kv": 5, "d_ff": 37, "num_heads": 3, "vocab_size": 61, "dropout_rate": RATE}
TORCH |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 7, "attn_implementation": "eager"}


class Recorder(eqx.Module):
    """Writes down what a site would drop, and drops nothing."""

    p: float
    seen: list = eqx.field(static=True)
    inference: bool = False

    def __call__(self, x, *, key=None, inference=None):
        if key is not None and not inference:
            self.seen.append((x.shape, self.p, jax.random.key_data(key).tobytes()))
        return x


def ours_drops(config):
    """(shape, rate) of what is dropped, in order; no key serves twice."""
    seen: list = []

    def attend(q, k, v, mask, *, rate, key, **rest):
        if key is not None:
            seen.append(((q.shape[-2], q.shape[0], k.shape[0]), rate, jax.random.key_data(key).tobytes()))
        return kernels.plain(q, k, v, mask, **rest)

    is_site = lambda x: isinstance(x, Dropout)
    swap = lambda x: Recorder(x.p, seen) if is_site(x) else attend if x is kernels.attend else x
    model = jax.tree.map(swap, filled(skeleton(T5, config)), is_leaf=is_site)
    model(tokens(), tokens(1, TARGET))
    assert seen == []
    model(tokens(), tokens(1, TARGET), key=KEY)
    assert len({key for *_, key in seen}) == len(seen)
    return [(shape, rate) for shape, rate, _ in seen]


def torch_drops(monkeypatch, model):
    seen = []

    def record(x, p=0.5, training=True, inplace=False):
        if training:
            seen.append((tuple(x.shape[1:]), p))
        return x

    monkeypatch.setattr(torch.nn.functional, "dropout", record)
    as_torch = lambda ids: torch.from_numpy(ids.astype(np.int64))[None]
    model.train()(as_torch(tokens()), decoder_input_ids=as_torch(tokens(1, TARGET)))
    return seen


@pytest.mark.parametrize(("name", "kind"), [("t5", "T5"), ("umt5", "UMT5")])
def test_every_site_drops_as_in_transformers_in_the_same_order_and_nowhere_else(name, kind, monkeypatch):
    config = replace(CONFIGS[name], dropout=RATE)
    sizes = TORCH | {"num_layers": config.num_layers, "num_decoder_layers": config.decoder_layers}
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(getattr(transformers, f"{kind}Config")(**sizes))
    mine, theirs = ours_drops(config), torch_drops(monkeypatch, model)
    assert mine == theirs
    assert len(mine) == 2 + 2 + 4 * config.num_layers + 6 * config.decoder_layers


def test_each_rate_alone_changes_what_comes_out_and_inference_mode_wins():
    model = make(T5, "t5", num_layers=1, num_decoder_layers=1, dropout=RATE)
    paths = [path.removesuffix(".p") for path in leaves_by_path(model) if path.endswith(".p")]
    blocks = [f"{half}.stack.blocks.0.{site}" for half, sites in SITES.items() for site in sites]
    assert sorted(paths) == sorted([*(f"{h}.{s}" for h in SITES for s in ("dropout", "output_dropout")), *blocks])
    rate_of = lambda m, path: (
        functools.reduce(
            lambda node, name: node[int(name)] if name.isdigit() else getattr(node, name), path.split("."), m
        ).p
    )
    where = lambda m: [rate_of(m, path) for path in paths]
    # Rates as arrays: one program for all of them. With every rate zero, a key changes nothing.
    set_to = lambda rates: eqx.tree_at(where, model, [jnp.asarray(rate) for rate in rates])
    given = tokens(), tokens(1, TARGET)
    plain = call(model, *given)
    np.testing.assert_allclose(call(set_to([0.0] * len(paths)), *given, key=KEY), plain, **NEAR)
    for i, path in enumerate(paths):
        only = call(set_to([0.5 * (i == j) for j in range(len(paths))]), *given, key=KEY)
        assert np.abs(only - plain).max() > 1e-2, path
    dropped = call(model, *given, key=KEY)
    np.testing.assert_array_equal(call(model, *given, key=KEY), dropped)
    assert np.abs(dropped - call(model, *given, key=jax.random.key(1))).max() > 1e-2
    np.testing.assert_allclose(call(eqx.nn.inference_mode(model), *given, key=KEY), plain, **NEAR)


SITES = {
    "encoder": ("attention.dropout", "mlp.dropout", "output_dropout"),
    "decoder": ("attention.dropout", "cross_attention.dropout", "mlp.dropout", "output_dropout"),
}


def test_a_classifiers_rate_is_its_own():
    model = SequenceClassifier(replace(CONFIGS["t5"], classifier_dropout=0.25), key=KEY)
    assert (model.head.input_dropout.p, model.head.dropout.p) == (0.25, 0.25)
    labelled = TokenClassifier(replace(CONFIGS["t5"], classifier_dropout=0.25), key=KEY)
    answers = QuestionAnswerer(replace(CONFIGS["t5"], classifier_dropout=0.25), key=KEY)
    assert (labelled.head.dropout.p, answers.head.dropout.p) == (0.25, 0.0)


# ---- the output and its loss


@pytest.mark.parametrize("name", ["t5", "t5-1.1"])
def test_factors_are_the_scores_and_the_chunked_loss_is_that_of_all_at_once(name):
    model, targets = make(T5, name), tokens(2, TARGET)
    mask = np.arange(TARGET) != 4

    @eqx.filter_jit
    def run(model):
        memory = model.encode(tokens())
        scores = lambda m: m.decode(memory, tokens(1, TARGET))

        def chunked(m):
            hidden, weight, bias = m.factors(m.decoded(memory, tokens(1, TARGET), None, None))
            return chunked_cross_entropy(hidden, weight, targets, mask, bias=bias, chunk=16)

        whole = eqx.filter_value_and_grad(lambda m: cross_entropy(scores(m), targets, mask))(model)
        factors = model.factors(model.decoded(memory, tokens(1, TARGET), None, None))
        return scores(model), factors, whole, eqx.filter_value_and_grad(chunked)(model)

    scores, factors, (whole, slow), (chunked, fast) = run(model)
    assert factors.bias is None
    np.testing.assert_allclose(factors.hidden @ factors.weight.T, scores, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(chunked, whole, rtol=1e-5)
    for path, x in arrays(slow).items():
        np.testing.assert_allclose(arrays(fast)[path], x, rtol=1e-4, atol=1e-5, err_msg=path)


def test_tied_embeddings_are_one_leaf_and_an_untied_output_another():
    tables = lambda name: [path for path, x in arrays(make(T5, name)).items() if x.shape == (61, 21)]
    assert tables("t5") == tables("tied, unscaled") == ["embedding.weight"]
    assert tables("t5-1.1") == tables("umt5") == ["embedding.weight", "head.weight"]
    shared = [path for path in arrays(make(T5, "t5")) if "bias" in path]
    assert shared == ["encoder.bias.weight", "decoder.bias.weight"]
    own = [path for path in arrays(make(T5, "umt5")) if "bias" in path]
    blocks = ["encoder.stack.blocks.0", "encoder.stack.blocks.1", "decoder.stack.blocks.0"]
    assert own == [f"{block}.bias.weight" for block in blocks]
    assert not any(path.endswith(".bias") for path in arrays(make(T5, "umt5")))  # no matrix has one


# ---- drawn


def test_every_matrix_is_drawn_as_narrow_as_its_inputs_are_many():
    sizes = {"vocab_size": 499, "embed_dim": 48, "num_heads": 6, "head_dim": 16, "mlp_dim": 80, "num_layers": 1}
    config = replace(T5_V1, **sizes, num_buckets=64, tied=False, init_factor=0.5)
    found = arrays(eqx.filter_jit(T5)(config, key=KEY))
    narrow = {"query_proj": (48 * 16) ** -0.5, "output_proj": 96**-0.5, "down_proj": 80**-0.5}
    matrices = {path: np.asarray(x) for path, x in found.items() if x.ndim == 2}
    assert len({x.tobytes() for x in matrices.values()}) == len(matrices) == 2 + 2 + 6 + 10
    for path, x in matrices.items():
        name = path.split(".")[-2]
        expected = 1.0 if path in ("embedding.weight", "head.weight") else narrow.get(name, 48**-0.5)
        np.testing.assert_allclose(x.std(), 0.5 * expected, rtol=0.12, err_msg=path)
    assert all((x == 1).all() for path, x in found.items() if path.endswith("norm.weight"))


def test_published_facts():
    assert (T5_V1.tied, T5_V1.scaled, T5_V1.gated, T5_V1.decoder_layers) == (True, True, False, 6)
    assert (MT5.tied, MT5.scaled, MT5.gated, MT5.activation) == (False, False, True, "gelu_tanh")
    assert replace(MT5, family="umt5", bias_per_layer=True) == UMT5 and MT5.vocab_size == 250112


# ---- files and changed facts


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
@pytest.mark.parametrize("kind", [T5, T5Model, T5Encoder, *HEADS], ids=lambda kind: kind.__name__)
def test_save_then_load_is_the_identity_bit_for_bit(kind, stacked, tmp_path):
    names = ("t5", "umt5") if kind is T5 else ("t5",)
    for name in names:
        model = make(kind, name, stacked)
        save(model, tmp_path / name)
        loaded, _ = load(tmp_path / name)
        assert eqx.tree_equal(loaded, model, typematch=True) and loaded.config == model.config


@pytest.mark.parametrize(
    ("name", "resized"), [("t5", {"embedding.weight"}), ("umt5", {"embedding.weight", "head.weight"})]
)
def test_a_vocabulary_grows(name, resized, tmp_path):
    model = make(T5, name)
    bigger = lambda path, old, new: jnp.zeros(new.shape, new.dtype).at[: len(old)].set(old)
    with pytest.raises(ValueError, match=r"embedding\.weight: float32\[61, 21\] -> float32\[70, 21\]"):
        reconfigure(model, vocab_size=70)
    grown = reconfigure(model, bigger, vocab_size=70)
    mine, theirs = arrays(model), arrays(grown)
    assert {path for path in mine if mine[path] is not theirs[path]} == resized and differences(grown) == []
    scores = call(grown, tokens(), tokens(1, TARGET))
    np.testing.assert_allclose(scores[:, :61], call(model, tokens(), tokens(1, TARGET)), **NEAR)
    assert not scores[:, 61:].any()
    save(grown, tmp_path / "model")
    assert eqx.tree_equal(load(tmp_path / "model")[0], grown, typematch=True)


def test_facts_change_and_the_arrays_stay():
    model = make(T5, "t5")
    changed = reconfigure(model, dropout=0.7, activation="silu", norm_eps=0.5, scaled=False, start_id=4)
    mine, theirs = arrays(model), arrays(changed)
    assert all(mine[path] is theirs[path] for path in mine) and not changed.scaled and changed.start_id == 4
    block = changed.decoder.stack.blocks[2]
    assert (block.mlp.dropout.p, block.output_dropout.p, block.cross_attention.dropout.p) == (0.7,) * 3
    assert block.mlp.activation.__name__ == "silu" and block.cross_attention_norm.eps == 0.5
    deeper = eqx.filter_eval_shape(lambda m: stack(m), changed)
    assert deeper.decoder.stack.num_layers == 3


def test_a_classifier_reads_a_state_of_its_own_text(unchecked):
    """With other tokens for the decoder there is no state at the text's end."""
    model = filled(skeleton(SequenceClassifier, CONFIGS["t5"]))
    ids = np.array([5, 7, 9, 1], np.int32)
    for other in ([0], [0, 5, 7, 9, 1]):
        with pytest.raises(ValueError, match=f"one of 4 tokens, but the decoder has {len(other)}: leave"):
            call(model, ids, decoder_token_ids=np.array(other, np.int32))
