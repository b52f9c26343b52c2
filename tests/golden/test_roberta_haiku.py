"""golden/roberta_haiku: the Haiku port of RoBERTa and its TensorFlow-named weights, number by number."""

import functools
import inspect
import json
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import converters
from converters import arrays as from_file
from eqx_transformers import Encoder, MaskedLM, SequenceClassifier, reconfigure
from eqx_transformers.nn import Mask
from eqx_transformers.skeletons import skeleton
from eqx_transformers.training.objectives import classification_loss
from eqx_transformers.training.originals import roberta_article, roberta_scale
from eqx_transformers.training.updater import Updater, compiled

from .folder import (
    FORWARD,
    SUMS,
    Recorded,
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

HERE = folder("roberta_haiku")
FEATURES = cases(HERE, "hidden_states", "pad_mask")
SPELLINGS = ["weights_raw_names", "weights_postprocessed_names", "haiku_featurizer_params"]
DICTIONARIES = present(HERE, [HERE / f"{name}.safetensors" for name in SPELLINGS])
EVERY_DICTIONARY = DICTIONARIES + present(HERE, [HERE / "classifier_params.safetensors"])
FILES = present(HERE, sorted(HERE.glob("*.jl")))
REFERENCE = present(HERE, [HERE / "hf"])


def read(tensors, **options):
    return converters.from_arrays("roberta-tf", tensors, config(HERE), **options)[0]


@functools.cache
def featurizer():
    return read(weights(HERE, "weights_raw_names"))


@functools.cache
def classifier():
    return read(weights(HERE, "classifier_params"))


@eqx.filter_jit
def states(model, ids):
    """The embedding's output and every block's, as the original numbers its hidden states."""

    def one(ids):
        mask = Mask(keys=ids != model.hidden_id)
        x = model.embedding(ids)
        found = [x]
        for block in model.stack.blocks:
            found.append(block(found[-1], mask))
        return jnp.stack(found), model(ids)

    return jax.vmap(one, out_axes=(1, 0))(ids)


@pytest.mark.parametrize("path", FEATURES)
def test_golden_roberta_haiku_features(path):
    """Padding on the right, left and inside, none, and a row of padding alone: nothing but the ids is given."""
    case = arrays(path)
    np.testing.assert_array_equal(case["token_ids"] == config(HERE)["mask_id"], case["pad_mask"] == 1)
    hidden, last = states(featurizer(), case["token_ids"])
    close(hidden, case["hidden_states"], FORWARD)
    close(last, case["last_hidden_state"], FORWARD)


@pytest.mark.parametrize("path", DICTIONARIES)
def test_golden_roberta_haiku_every_spelling_is_the_same_model(path):
    assert eqx.tree_equal(read(from_file.read_file(path)), featurizer())


@pytest.mark.parametrize("path", DICTIONARIES[-1:])
def test_golden_roberta_haiku_nested_parameters_are_the_same_model(path):
    nested: dict = {}
    for key, x in from_file.read_file(path).items():
        module, _, part = key.rpartition("/")
        nested.setdefault(module, {})[part] = x
    assert eqx.tree_equal(read(nested), featurizer())


@pytest.mark.parametrize("path", FILES)
def test_golden_roberta_haiku_joblib_files_are_the_same_model(path):
    """Four rows of an older vocabulary are recognised, explained, and dropped."""
    tensors = from_file.read_file(path)
    assert eqx.tree_equal(read(tensors), featurizer())
    report = from_file.inspect_arrays("roberta-tf", tensors, config(HERE))
    words = next(x for key, x in tensors.items() if "word_embeddings" in key)
    older = len(words) - config(HERE)["vocab_size"]
    assert older in (0, 4) and report.ok
    assert any("rows of an older vocabulary" in note for note in report.notes) == bool(older)
    bias = next((x for key, x in tensors.items() if "output_bias" in key), np.zeros(0))
    if older and not (len(bias) == len(words) and bias[4:].any()):
        return  # without vocab_size, the four zeros of the output bias are all that tells
    unstated = {k: v for k, v in config(HERE).items() if k != "vocab_size"}
    again = converters.from_arrays("roberta-tf", tensors, unstated)[0]
    assert eqx.tree_equal(again, featurizer()) and again.config.vocab_size == config(HERE)["vocab_size"]


@pytest.mark.parametrize("path", FILES)
def test_golden_roberta_haiku_other_words_may_be_put_in(path):
    """As the original does: the reference library's word embeddings in the place of the file's."""
    tensors = from_file.read_file(path)
    key = next(key for key in tensors if "word_embeddings" in key)
    tensors[key] = next(x for name, x in weights(HERE, "weights_raw_names").items() if "word_embeddings" in name)
    assert eqx.tree_equal(read(tensors), featurizer())


CLASSIFIED = cases(HERE, "labels", "logits", "loss")


@eqx.filter_jit
def loss_and_gradient(model, ids, labels):
    def loss(model):
        logits = jax.vmap(model)(ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    return eqx.filter_value_and_grad(loss, has_aux=True)(model)


@pytest.mark.parametrize("path", CLASSIFIED)
def test_golden_roberta_haiku_classifier_and_loss(path):
    case, model = arrays(path), classifier()
    assert isinstance(model, SequenceClassifier)
    (loss, logits), gradient = loss_and_gradient(model, case["token_ids"], case["labels"])
    close(logits, case["logits"], FORWARD)
    close(loss, case["loss"], FORWARD)
    close((jnp.argmax(logits, -1) == case["labels"]).mean(), case["accuracy"], 1e-6)
    close(norm(gradient), case["grad_global_norm"], SUMS)


def is_of(case, path):
    """Whether a file holds the gradients of a case: arrays of parameters, under the case's name."""
    parameters = any(name.endswith("linear/w") for name in np.load(path).files)
    return parameters and "_after" not in path.stem and path.stem.startswith(case.stem.removesuffix("_case"))


GRADIENTS = [p for p in sorted(HERE.glob("*.npz")) if any(is_of(case.values[0], p) for case in CLASSIFIED)]


@pytest.mark.parametrize("path", present(HERE, GRADIENTS))
def test_golden_roberta_haiku_classifier_gradients(path):
    case = arrays(next(case.values[0] for case in CLASSIFIED if is_of(case.values[0], path)))
    _, gradient = loss_and_gradient(classifier(), case["token_ids"], case["labels"])
    close_gradients(gradient, read(arrays(path)))


def sites(model):
    """The places at which the original drops, in its order of calls."""
    blocks = model.backbone.stack.blocks
    inside = [place for b in blocks for place in (b.attention_output_dropout, b.mlp_output_dropout)]
    return [model.backbone.embedding.dropout, *inside, model.head.dropout]


@pytest.mark.parametrize("path", cases(HERE, "keep_00", "rates"))
def test_golden_roberta_haiku_recorded_dropout(path):
    """Rates of its own, one for each kind of site."""
    case = arrays(path)
    names = ("embed_dropout_rate", "attention_drop_rate", "fully_connected_drop_rate", "classifier_drop_rate")
    rates = dict(zip(names, [*case["rates"][:3].tolist(), float(case["rates"][-1])], strict=True))
    model, _ = converters.from_arrays("roberta-tf", weights(HERE, "classifier_params"), config(HERE) | rates)
    keeps = [case[name] for name in sorted(name for name in case if name.startswith("keep_"))]
    assert len(keeps) == len(sites(model)) == len(case["rates"])
    close([place.p for place in sites(model)], case["rates"], 1e-7)
    assert all(b.attention.dropout.p == 0 for b in model.backbone.stack.blocks)  # none on the weights themselves
    for row, ids in enumerate(case["token_ids"]):
        recorded = [Recorded(jnp.asarray(k[row]), float(r)) for k, r in zip(keeps, case["rates"], strict=True)]
        dropped = eqx.tree_at(sites, model, recorded)
        close(eqx.filter_jit(dropped)(ids, key=jax.random.key(0)), case["logits"][row], FORWARD)


@pytest.mark.parametrize("path", cases(HERE, "losses", "total_steps"))
def test_golden_roberta_haiku_optimizer_steps(path):
    case = arrays(path)
    total, warmup = float(case["total_steps"]), float(case["warmup"])
    scale = roberta_scale(total, warmup)
    close([scale(i) for i in range(len(case["scale_at_step"]))], case["scale_at_step"], 1e-6)
    # In the original's configuration this clipping is `max_grad_norm`.
    clip = config(HERE)["max_grad_norm"]
    optimizer = roberta_article(float(case["lr"]), total, warmup=warmup, max_grad_norm=clip)
    updater = Updater(classification_loss, optimizer)
    state, step = updater.init(eqx.nn.inference_mode(classifier()), key=jax.random.key(0)), compiled(updater)
    for i, (ids, labels) in enumerate(zip(case["token_ids"], case["labels"], strict=True)):
        state, metrics = step(state, {"token_ids": ids, "labels": labels})
        close(metrics["loss"], case["losses"][i], FORWARD)
        close(metrics["gradient_norm"], case["grad_norms"][i], SUMS)
    after = sorted(path.parent.glob(f"{path.stem}_params_after*.npz"))
    assert after and all(int(re.findall(r"\d+", p.stem)[-1]) == len(case["losses"]) for p in after)
    for wanted in after:
        close_parameters(state.model, read(arrays(wanted)))


@pytest.mark.parametrize("path", cases(HERE, "scale", "steps"))
def test_golden_roberta_haiku_schedule(path):
    case = arrays(path)
    close(jax.vmap(roberta_scale(31250.0, 0.1))(case["steps"].astype(np.float32)), case["scale"], 1e-6)


@pytest.mark.parametrize("path", cases(HERE, "hf_last_hidden_state"))
def test_golden_roberta_haiku_reference_positions_are_an_input(path):
    """The reference library's file: its own positions by default, the original's where they are given."""
    case = arrays(path)
    model, _ = converters.load(HERE / "hf")
    shifted = "hf_last_hidden_state_positions_from_"
    offset = int(next(name for name in case if name.startswith(shifted)).removeprefix(shifted))
    there = np.arange(offset, offset + case["token_ids"].shape[1])
    run = eqx.filter_jit(
        lambda ids, mask, **given: jax.vmap(lambda i, m: model(i, attention_mask=m, **given))(ids, mask)
    )
    seen = case["attention_mask"].any(axis=1)  # of a row that sees nothing, each library makes its own
    default = run(case["token_ids"], case["attention_mask"])
    close(default[seen], case["hf_last_hidden_state"][seen], FORWARD)
    given = run(case["token_ids"], case["attention_mask"], position_ids=there)
    close(given[seen], case[f"{shifted}{offset}"][seen], FORWARD)


@pytest.mark.parametrize("path", REFERENCE)
def test_golden_roberta_haiku_the_reference_file_is_the_same_weights(path):
    ours, theirs = by_path(featurizer()), by_path(converters.load(path)[0])
    assert theirs.keys() - ours.keys() == {"embedding.token_types.weight"}  # in the file, and never added
    assert all(np.array_equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize("path", present(HERE, [HERE / "init_stats.json"]))
def test_golden_roberta_haiku_initialiser(path):
    """The original's one draw is too small for a deviation: the same rule drawn large is what both are drawn by."""
    deviation, cut = config(HERE)["weight_stddev"], 2 * config(HERE)["weight_stddev"]
    drawn = {name: d for name, d in json.loads(path.read_bytes()).items() if name.endswith("linear/w")}
    many = np.asarray(classifier().config.initializer(jax.random.key(0), (1000, 64)))
    assert 0.99 * cut < np.abs(many).max() <= cut
    assert abs(many.std() / deviation - 0.8796) < 0.01  # of a normal that is cut at twice its deviation
    for stats in drawn.values():
        n = np.prod(stats["shape"])
        assert abs(stats["mean"]) < 5 * deviation / np.sqrt(n) and max(stats["max"], -stats["min"]) <= cut
        assert abs(stats["std"] - many.std()) < 5 * many.std() / np.sqrt(2 * n)
    fresh = skeleton(SequenceClassifier, classifier().config).head.output
    assert drawn and all(list(fresh.weight.shape[::-1]) == stats["shape"] for stats in drawn.values())


@pytest.mark.parametrize("path", REFERENCE)
def test_golden_roberta_haiku_becomes_a_model_of_the_reference(path, tmp_path):
    """What config.json cannot say is named; with other values of these facts it is exported and is the reference's."""
    with pytest.raises(converters.ConversionError) as caught:
        converters.export(featurizer(), tmp_path / "no")
    facts = ("positions", "position_offset", "padding_rows", "hides_padding", "empty", "token_types", "classifier")
    assert all(f"{fact} = " in str(caught.value) for fact in facts)
    spread = {"embedding_dropout": None, "attention_output_dropout": None, "classifier_dropout": None}
    reference, _ = converters.load(path)
    as_reference = {fact: getattr(reference.config, fact) for fact in facts} | spread
    zeros = lambda path, old, new: jnp.zeros(new.shape, new.dtype)
    converters.export(reconfigure(featurizer(), zeros, **as_reference), tmp_path / "yes")
    ours, theirs = by_path(converters.load(tmp_path / "yes")[0]), by_path(reference)
    types = theirs.pop("embedding.token_types.weight")
    assert np.array_equal(ours.pop("embedding.token_types.weight"), np.zeros_like(types))
    assert ours.keys() == theirs.keys() and all(np.array_equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize("path", FILES)
def test_golden_roberta_haiku_masked_lm(path):
    """The port ignores these arrays; they are RoBERTa's masked-LM head."""
    tensors = from_file.read_file(path)
    model = read(tensors, head=MaskedLM)
    prefix = "model/masked-language-model/"
    held = {key.removeprefix(prefix).removesuffix(":0"): x for key, x in tensors.items() if key.startswith(prefix)}
    assert np.array_equal(model.head.dense.weight, held["dense/kernel"])  # stored (out, in), as ours is
    assert np.array_equal(model.head.norm.weight, held["LayerNorm/g"])
    assert np.array_equal(model.head.bias, held["output_bias"][-config(HERE)["vocab_size"] :])
    assert skeleton(MaskedLM, model.config).head.decoder is None


# ---- the report, by every key


@pytest.mark.parametrize("path", EVERY_DICTIONARY)
def test_golden_roberta_haiku_any_one_key_missing_or_added_is_reported_as_it_is_spelled(path):
    whole = from_file.read_file(path)
    inspect = lambda tensors: from_file.inspect_arrays("roberta-tf", tensors, config(HERE) | {"n_layers": depth})
    depth = config(HERE)["n_layers"]
    unread = set(inspect(whole).dropped)
    head = SequenceClassifier if path.stem.startswith("classifier") else Encoder
    assert inspect(whole).ok and inspect(whole).model == head.__name__
    for key in whole:
        if "linear/" in key and key.count("/") == 2 and head is SequenceClassifier:
            continue  # without it, the dictionary is a featurizer's
        report = inspect({k: x for k, x in whole.items() if k != key})
        assert list(report.missing) == ([] if key in unread else [key])
        resized = inspect(whole | {key: np.zeros((3, *whole[key].shape), np.float32)})
        assert key in unread or list(resized.mismatched) == [key]
    if path.stem == "weights_raw_names":  # each tensor under a second spelling: neither is believed silently
        both = whole | {key.removesuffix(":0"): x for key, x in whole.items()}
        assert not inspect(both).ok and len(inspect(both).unexpected) >= len(whole) - len(unread)
    added = inspect(whole | {"surprise": np.zeros(3, np.float32)})
    assert list(added.unexpected) == ["surprise"] and not added.ok


# ---- errors, and the command line


def test_golden_roberta_haiku_wrong_input_says_what_is_wrong(unchecked):
    raw = weights(HERE, "weights_raw_names")
    with pytest.raises(converters.ConversionError, match="format = 'bert-tf' is not one of roberta-tf"):
        converters.from_arrays("bert-tf", raw, {})
    narrow = {name: x[..., :10] for name, x in raw.items()}
    with pytest.raises(converters.UnsupportedConfig, match="n_heads is missing from the config"):
        converters.from_arrays("roberta-tf", narrow, {})
    wide = {name: np.zeros([64 if n == config(HERE)["hidden_size"] else n for n in x.shape]) for name, x in raw.items()}
    assert any("n_heads = 1 was assumed" in note for note in from_file.inspect_arrays("roberta-tf", wide, {}).notes)
    with pytest.raises(converters.UnsupportedConfig, match="vocab_size = None: expected a whole number"):
        converters.from_arrays("roberta-tf", raw, config(HERE) | {"vocab_size": None})
    for twice in (raw | {"a/b": np.zeros(1), "a": {"b": np.zeros(1)}}, {"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)}):
        with pytest.raises(converters.MalformedCheckpoint, match="a/b is there twice"):
            converters.from_arrays("roberta-tf", twice, config(HERE))
    with pytest.raises(converters.MalformedCheckpoint, match="None of the 1 arrays has a name of RoBERTa"):
        converters.from_arrays("roberta-tf", {"roberta.embeddings.x": np.zeros(1)}, {})
    with pytest.raises(converters.ConversionError, match="tensors must be a dictionary, but it is str"):
        inspect.unwrap(converters.from_arrays)("roberta-tf", "file.jl", {})  # as where no hook checks types
    with pytest.raises(converters.UnsupportedConfig, match="surprise = 3 is unknown"):
        converters.from_arrays("roberta-tf", raw, config(HERE) | {"surprise": 3})
    with pytest.raises(converters.MalformedCheckpoint, match="x is str of <U1; expected an array"):
        converters.from_arrays("roberta-tf", raw | {"x": "y"}, config(HERE))
    with pytest.raises(converters.Mismatch, match="word_embeddings"):
        converters.from_arrays("roberta-tf", raw, config(HERE) | {"vocab_size": 3})


def test_golden_roberta_haiku_the_arrays_are_copied():
    raw = {key: np.array(x) for key, x in weights(HERE, "weights_raw_names").items()}
    model = read(raw)
    for x in raw.values():
        x[...] = 0
    assert eqx.tree_equal(model, featurizer())


@pytest.mark.parametrize("path", FILES)
def test_golden_roberta_haiku_command_line(path: Path, tmp_path, monkeypatch, capsys):
    from converters import hf

    monkeypatch.chdir(tmp_path)
    assert hf.main(["--format", "roberta-tf", str(path)]) == 0
    assert "featurizer -> Encoder" in capsys.readouterr().out
    model, origin = converters.load(tmp_path / f"{path.stem}.eqx")
    assert eqx.tree_equal(model, featurizer()) and origin.family == "roberta-tf"
    assert hf.main(["--format", "roberta-tf", str(path), "--dry-run", "--config", str(HERE / "config.json")]) == 0
    assert hf.main(["--format", "roberta-tf", str(tmp_path / "none.jl")]) == 2
    assert "There is no file" in capsys.readouterr().err
    assert hf.main(["--format", "roberta-tf", str(path), "--verify"]) == 2
    assert hf.main([str(HERE / "hf"), "--config", "x"]) == 2
