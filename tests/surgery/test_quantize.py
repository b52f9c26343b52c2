"""Weights of 8 and 4 bits: exact bounds of their errors, the same function as of the rounded weights, reports."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import Encoder, load, nn, save, select, stack, unstack
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery import LoRA, adapter_mask, leaves_by_path
from eqx_transformers.surgery._rounding import packed, unpacked
from eqx_transformers.surgery.quantize import (
    Int4Embedding,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    QuantizationReport,
    Quantized,
    QuantizedLayer,
    dequantize,
    quantization_report,
    quantize,
)

from ..models.ours import call, tokens
from .test_select import equal, model_of

pytestmark = pytest.mark.usefixtures("strict_promotion")
LAYERS = select("Linear", under="**.{mlp,value_proj}") | select("Embedding")
widths = pytest.mark.parametrize("bits", [8, 4])
layouts = pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
RNG = np.random.default_rng(0)


def numbers(shape, dtype="float32", size=1.0):
    return jnp.asarray(size * RNG.standard_normal(shape), dtype)


def linear(out_features, in_features, dtype="float32", use_bias=True, size=1.0):
    made = nn.Linear(in_features, out_features, use_bias=use_bias, key=jax.random.key(0))
    made = eqx.tree_at(lambda x: x.weight, made, numbers((out_features, in_features), dtype, size))
    return eqx.tree_at(lambda x: x.bias, made, numbers(out_features, dtype)) if use_bias else made


def table(rows, columns, dtype="float32", padding_id=None):
    made = nn.Embedding(rows, columns, padding_id=padding_id, key=jax.random.key(0))
    return eqx.tree_at(lambda x: x.weight, made, numbers((rows, columns), dtype))


def steps_of(node):
    """The scale of every number."""
    scale = np.asarray(node.scale, np.float64)
    return scale[..., None] if node.bits == 8 else np.repeat(scale, node.group, -1)[..., : node.dense().shape[-1]]


# ---- the numbers


@widths
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1e-35, 1e-6, 1.0])
def test_every_number_is_within_half_a_scale_exactly(bits, dtype, size):
    layer = linear(50, 37, dtype, size=size)
    node = Quantized.make(bits, group=16)(layer)
    weight, steps = np.asarray(layer.weight, np.float64), steps_of(node)
    assert node.scale.dtype == jnp.dtype(dtype) and node.dense().dtype == jnp.float32
    assert (np.abs(weight - np.asarray(node.dense(), np.float64)) <= steps / 2).all()  # no tolerance
    if size >= 1.0:  # the scale is hardly larger than it must be
        groups = [weight[:, i : i + (37 if bits == 8 else 16)] for i in range(0, 37, 37 if bits == 8 else 16)]
        needed = np.stack([np.abs(group).max(-1) for group in groups], -1) / (127 if bits == 8 else 7)
        ratio = np.asarray(node.scale, np.float64).reshape(needed.shape) / needed
        assert (ratio >= 1).all() and ratio.max() < (1.0001 if dtype == "float32" else 1.01)


@widths
def test_zeros_stay_zeros_and_what_is_not_finite_is_never_plausible(bits):
    layer = linear(3, 5)
    weight = jnp.array([[0.0] * 5, [1, 2, jnp.nan, 3, 4], [1, -jnp.inf, 2, 3, 4]])
    node = Quantized.make(bits)(eqx.tree_at(lambda x: x.weight, layer, weight))
    dense = np.asarray(node.dense())
    assert (dense[0] == 0).all() and not np.isfinite(dense[1:]).any()


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_two_numbers_are_one_byte(size):
    q = jnp.asarray(RNG.integers(-8, 8, (3, size)), jnp.int8)
    assert packed(q).shape == (3, (size + 1) // 2) and packed(q).dtype == jnp.int8
    assert (unpacked(packed(q), size) == q).all()


@pytest.mark.parametrize(("group", "groups"), [(64, 1), (37, 1), (16, 3), (1, 37), (5, 8)])
def test_a_last_group_may_be_smaller(group, groups):
    layer = linear(6, 37)
    node = Quantized.make(4, group)(layer)
    assert isinstance(node, Int4Linear) and node.scale.shape == (6, groups) and node.numbers.shape == (6, 19)
    error = np.abs(np.asarray(layer.weight - node.dense()))
    if group == 1:
        assert error.max() < 1e-4  # every number is its own largest
    assert error.max() <= np.abs(layer.weight).max() / 14 * 1.001


# ---- layers


@widths
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_layer_is_called_as_it_was_and_computes_with_its_dense_matrix(bits, dtype, use_bias):
    layer = linear(11, 21, dtype, use_bias)
    node = Quantized.make(bits, group=8)(layer)
    assert type(node) is (Int8Linear if bits == 8 else Int4Linear)
    assert (node.in_features, node.out_features, node.bits) == (21, 11, bits)
    for kind in ("float32", "bfloat16"):
        x = numbers((2, 3, 21), kind)
        y = node(x)
        assert y.dtype == x.dtype and y.shape == (2, 3, 11)
        exact = np.asarray(x, np.float64) @ np.asarray(node.dense(), np.float64).T
        exact += 0 if layer.bias is None else np.asarray(layer.bias, np.float64)
        assert np.abs(np.asarray(y, np.float64) - exact).max() < (1e-5 if kind == "float32" else 0.05)
        assert equal(node(x, key=jax.random.key(0)), y)
    if dtype == "float32":
        x = numbers((4, 21))
        assert np.abs(np.asarray(node(x) - node.plain()(x))).max() < 1e-5
        assert np.allclose(jax.vmap(node)(x), node(x), atol=1e-5)
        gradient = jax.grad(lambda x: node(x).sum())(x)
        assert np.allclose(gradient, np.broadcast_to(np.asarray(node.dense()).sum(0), (4, 21)), atol=1e-5)
    plain = node.plain()
    assert type(plain) is nn.Linear and plain.weight.dtype == jnp.dtype(dtype) and equal(plain.bias, layer.bias)
    assert equal(plain.weight, node.dense().astype(dtype))


@widths
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_table_gives_rows_and_scores(bits, dtype):
    layer = table(13, 21, dtype, padding_id=3)
    node = Quantized.make(bits, group=8)(layer)
    assert type(node) is (Int8Embedding if bits == 8 else Int4Embedding)
    assert (node.vocab_size, node.embed_dim, node.padding_id) == (13, 21, 3)
    ids = jnp.array([[0, 12, 3], [5, 5, 1]])
    assert equal(node(ids), node.plain()(ids)) and node(ids).dtype == jnp.dtype(dtype)
    assert equal(jax.vmap(eqx.filter_jit(node))(ids), node(ids))
    x = numbers((4, 21), dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(node.dense(), np.float64).T
    assert node.attend(x).dtype == x.dtype
    assert np.abs(np.asarray(node.attend(x), np.float64) - exact).max() < (1e-5 if dtype == "float32" else 0.1)
    plain = node.plain()
    assert plain.padding_id == 3 and np.abs(np.asarray(plain.weight[3])).max() > 0
    with pytest.raises(ValueError, match=r"ids must be 0 to 12 \(a table of 13 rows\), but 1 of them"):
        node(jnp.array([13]))
    outside = eqx.filter_jit(node)(jnp.array([13, 2, -1]))
    assert np.isnan(outside[0]).all() and np.isnan(outside[2]).all() and np.isfinite(outside[1]).all()


@widths
def test_the_last_axis_is_checked(bits, unchecked):
    with pytest.raises(ValueError, match=r"the last axis of its input must be in_features = 21"):
        Quantized.make(bits)(linear(3, 21))(jnp.ones((2, 20)))
    with pytest.raises(ValueError, match=r"must be embed_dim = 21"):
        Quantized.make(bits)(table(3, 21)).attend(jnp.ones(20))


# ---- models


@functools.cache
def quantized(name, bits, stacked=False):
    return quantize(model_of(name, stacked), LAYERS, bits, group=8)


@pytest.mark.parametrize(("name", "bits"), [("roberta", 4), ("llama", 8)])
def test_stacked_layers_are_quantized_as_each_by_itself(name, bits):
    flat, deep = quantized(name, bits), quantized(name, bits, stacked=True)
    assert equal(stack(flat), deep) and equal(unstack(deep), flat)
    assert equal(stack(dequantize(flat)), dequantize(deep))
    assert select(Quantized).count(flat) == LAYERS.count(model_of(name))
    kinds = {str(x.dtype) for x in leaves_by_path(flat).values() if eqx.is_array(x)}
    assert kinds == {"int8", "float32"}


@pytest.mark.parametrize(("name", "bits", "stacked"), [("roberta", 8, True), ("llama", 4, False), ("t5", 8, True)])
def test_a_model_computes_what_that_of_the_rounded_weights_does(name, bits, stacked):
    model, ids = quantized(name, bits, stacked), tokens()
    inputs = (ids, ids[:5]) if name == "t5" else (ids,)
    run = lambda model: np.asarray(call_of(name)(model, *inputs))
    exact, ours = run(dequantize(model)), run(model)
    assert np.abs(ours - exact).max() <= 2e-6 * max(1, np.abs(exact).max())
    assert np.abs(ours - run(model_of(name, stacked))).max() > 1e-3  # it is lossy


def call_of(name):
    return CALL_T5 if name == "t5" else call


CALL_T5 = eqx.filter_jit(lambda model, ids, targets: model(ids, targets))


def test_the_outputs_of_a_tiny_encoder_stay_within_these_bounds():
    model, ids = model_of("roberta"), tokens()
    true = np.asarray(call(model, ids))
    error = lambda other: np.linalg.norm(np.asarray(call(other, ids)) - true) / np.linalg.norm(true)
    assert error(quantized("roberta", 8)) < 0.02
    assert 0.02 < error(quantized("roberta", 4)) < 0.3


@pytest.mark.parametrize("bits", [4])
def test_a_tied_output_is_of_the_quantized_table(bits):
    model, ids = model_of("bert"), tokens()
    only = quantize(model, select("Embedding", under="**.tokens"), bits, group=8)
    assert only.head.decoder is None and select(Quantized).count(only) == 1
    exact = np.asarray(call(dequantize(only), ids))
    assert np.abs(np.asarray(call(only, ids)) - exact).max() <= 1e-6 * np.abs(exact).max()


def test_whole_numbers_have_no_gradient_and_the_rest_has():
    model, ids = quantized("roberta", 8, stacked=True), jnp.asarray(tokens())
    gradient = eqx.filter_jit(eqx.filter_grad(lambda model: jnp.square(model(ids)).sum()))(model)
    found = leaves_by_path(gradient)
    assert not [path for path in found if path.endswith("numbers")]
    assert np.abs(found["stack.blocks.mlp.up_proj.scale"]).max() > 0
    assert np.abs(found["stack.blocks.mlp.up_proj.bias"]).max() > 0


def test_skeletons_and_saved_models(tmp_path):
    model = quantized("roberta", 4, stacked=True)
    repeat = lambda plain: quantize(plain, LAYERS, 4, group=8)
    built = repeat(skeleton(Encoder, model.config, True))
    assert equal(built, eqx.filter_eval_shape(lambda: model))
    with pytest.raises(ValueError, match="is a Int4Embedding where the config builds a Embedding"):
        save(model, tmp_path / "plain")
    save(model, tmp_path / "edited", edited=True)
    assert equal(load(tmp_path / "edited", skeleton=repeat)[0], model)


# ---- reports


@pytest.mark.parametrize(("bits", "stacked"), [(8, True), (4, False)])
def test_a_report_has_a_line_for_each_layer_and_their_sums(bits, stacked):
    model = model_of("roberta", stacked)
    report = quantization_report(model, quantized("roberta", bits, stacked))
    assert isinstance(report, QuantizationReport) and all(isinstance(x, QuantizedLayer) for x in report.layers)
    assert [line.path for line in report.layers] == LAYERS.paths(model)
    assert {line.bits for line in report.layers} == {bits}
    low, high = (0.001, 0.01) if bits == 8 else (0.04, 0.15)
    assert all(low < line.error < high for line in report.layers)
    at_up = next(line for line in report.layers if line.path.endswith("up_proj"))
    layers = 2 if stacked else 1
    assert at_up.bytes_before == layers * 4 * (37 * 21 + 37)
    assert at_up.bytes_after == layers * (37 * 21 + 8 * 37 if bits == 8 else 37 * 11 + 4 * 37 * 3 + 4 * 37)
    assert report.bytes_after == sum(line.bytes_after for line in report.layers) < report.bytes_before / 1.8
    lines = str(report).splitlines()
    assert len(lines) == len(report.layers) + 2 and len({len(line.rstrip()) for line in lines}) == 1
    assert lines[0].split() == ["path", "bits", "error", "bytes", "before", "bytes", "after"]
    assert lines[-1].split() == [
        "all",
        f"{report.worst.error:.2%}",
        f"{report.bytes_before:,}",
        f"{report.bytes_after:,}",
    ]
    assert report.worst.error == max(line.error for line in report.layers)


def test_the_error_is_that_of_the_weights():
    model = {"a": linear(5, 7)}
    node = quantize(model, select("Linear"))["a"]
    error = np.linalg.norm(model["a"].weight - node.dense()) / np.linalg.norm(model["a"].weight)
    report = quantization_report(model, {"a": node})
    assert abs(report.layers[0].error - error) < 1e-6
    zero = {"a": eqx.tree_at(lambda x: x.weight, model["a"], jnp.zeros((5, 7)))}
    assert quantization_report(zero, quantize(zero, select("Linear"))).worst.error == 0.0


# ---- errors


def test_what_cannot_be_quantized_is_an_error_that_says_why(unchecked):
    for bits in (2, 16, 0):
        with pytest.raises(ValueError, match=f"to 8 or to 4 bits, not to {bits!r}"):
            Quantized.make(bits)
    with pytest.raises(ValueError, match="group = 0: at least 1 number"):
        quantize(model_of("roberta"), select("Linear"), 4, group=0)
    with pytest.raises(TypeError, match=r"A Linear or an Embedding can be quantized, but this is a LayerNorm\."):
        quantize(model_of("roberta"), select("LayerNorm"))
    with pytest.raises(TypeError, match=r"a Int8Linear\. It is quantized already: dequantize\(model\) first"):
        quantize(quantized("roberta", 8), select("Int8Linear"), 4)
    deep = model_of("roberta", stacked=True).stack.blocks.mlp.up_proj
    with pytest.raises(ValueError, match=re.escape("The weight of this Linear is (2, 37, 21), of stacked layers")):
        Quantized.make()(deep)
    with pytest.raises(ValueError, match="none is a Quantized"):
        dequantize(model_of("roberta"))
    with pytest.raises(ValueError, match="Conv"):
        quantize(model_of("roberta"), select("Conv"))


def test_a_report_needs_the_model_that_was_quantized():
    model, small = model_of("roberta"), quantized("roberta", 8)
    with pytest.raises(ValueError, match="Nothing in this Encoder is quantized"):
        quantization_report(model, model)
    with pytest.raises(
        ValueError, match=r"At embedding\.tokens the quantized layer is of \(61, 21\).* a Int8Embedding"
    ):
        quantization_report(small, small)
    other = eqx.tree_at(lambda m: m.embedding.tokens.weight, model, jnp.zeros((60, 21)))
    with pytest.raises(ValueError, match=r"has a Embedding of \(60, 21\)"):
        quantization_report(other, small)
    with pytest.raises(ValueError, match=r"There is no node at 'embedding\.tokens'"):
        quantization_report(linear(2, 2), small)


@pytest.mark.parametrize("bits", [8, 4])
def test_training_on_stacked_small_weights_keeps_no_wide_copies_of_them(bits):
    """Of 6 layers of 256 x 256, the float32 copies would be 1.6 MB: they are no residuals of the scan."""

    class Layer(eqx.Module):
        dense: eqx.Module

        def __call__(self, x, *, key=None):
            return jnp.tanh(self.dense(x))

    layers = nn.Stack(tuple(Layer(nn.Linear(256, 256, key=jax.random.key(i))) for i in range(6)))
    model = quantize(stack(layers), select("Linear"), bits=bits)
    where = select(Quantized).on(model)
    model = eqx.tree_at(where, model, where.each(model, LoRA.adapter(2), key=jax.random.key(9)))
    learned, rest = eqx.partition(model, adapter_mask(model))
    slopes = jax.grad(lambda learned, rest, x: jnp.square(eqx.combine(learned, rest)(x)).sum())
    x = jnp.ones((4, 256))
    program = eqx.filter_jit(slopes).lower(learned, rest, x).compile()
    assert program.compiled.memory_analysis().temp_size_in_bytes < 6 * 256 * 256 * 4


def test_a_report_looks_through_adapters_on_small_weights():
    model = model_of("bert")
    small = quantize(model, LAYERS, 8)
    where = select(Quantized).on(small)
    adapted = eqx.tree_at(where, small, where.each(small, LoRA.adapter(2), key=jax.random.key(9)))
    assert quantization_report(model, adapted) == quantization_report(model, small)
