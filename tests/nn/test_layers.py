"""Each layer against its formula in NumPy (float64) and against torch, its dtype contract, and its errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from eqx_transformers import nn

from ..compiling import as_users_do

KEY = jax.random.key(0)
AXES = [(), (5,), (2, 5), (3, 1, 5)]
DTYPES = ["float32", "bfloat16", "float16"]
IN, OUT, INNER = 7, 11, 13


def filled(module, seed=0, dtype="float32"):
    """The module with random numbers in every array: zeros and ones hide mistakes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: cast(rng.normal(size=x.shape), dtype) if eqx.is_array(x) else x, module)


def cast(x, dtype):
    return jnp.asarray(x.astype(jnp.dtype(dtype)))  # in NumPy: JAX would compile a cast for every shape


def random(*shape, seed=1, dtype="float32"):
    return cast(np.random.default_rng(seed).normal(size=shape), dtype)


@eqx.filter_jit
def each(modules, xs):
    """Every module on its input, compiled together: what costs time in these tests is one compilation after another."""
    return [module(x) for module, x in zip(modules, xs, strict=True)]


def f64(x):
    return None if x is None else np.asarray(x).astype(np.float64)


def linear(m, x):
    return x @ f64(m.weight).T + (0 if m.bias is None else f64(m.bias))


def layer_norm(m, x):
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + m.eps) * f64(m.weight)
    return y if m.bias is None else y + f64(m.bias)


def rms_norm(m, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + m.eps) * (f64(m.weight) + m.offset)


def mlp(m, x):
    return linear(m.down_proj, np.maximum(linear(m.up_proj, x), 0))


def gated_mlp(m, x):
    return linear(m.down_proj, np.maximum(linear(m.gate_proj, x), 0) * linear(m.up_proj, x))


def as_torch(x, dtype=torch.float64):
    return None if x is None else torch.from_numpy(f64(x)).to(dtype)


def torch_linear(m, x):
    return torch.nn.functional.linear(x, as_torch(m.weight, x.dtype), as_torch(m.bias, x.dtype))


def torch_layer_norm(m, x):
    gain, bias = as_torch(m.weight, x.dtype), as_torch(m.bias, x.dtype)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], gain, bias, m.eps)


def torch_rms_norm(m, x):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], as_torch(m.weight, x.dtype) + m.offset, m.eps)


def torch_mlp(m, x):
    return torch_linear(m.down_proj, torch.relu(torch_linear(m.up_proj, x)))


def torch_gated_mlp(m, x):
    return torch_linear(m.down_proj, torch.relu(torch_linear(m.gate_proj, x)) * torch_linear(m.up_proj, x))


LAYERS = {
    "Linear": (lambda: nn.Linear(IN, OUT, key=KEY), linear, torch_linear),
    "Linear without bias": (lambda: nn.Linear(IN, OUT, use_bias=False, key=KEY), linear, torch_linear),
    "LayerNorm": (lambda: nn.LayerNorm(IN, eps=0.1), layer_norm, torch_layer_norm),
    "LayerNorm without bias": (lambda: nn.LayerNorm(IN, use_bias=False), layer_norm, torch_layer_norm),
    "RMSNorm": (lambda: nn.RMSNorm(IN, eps=0.1), rms_norm, torch_rms_norm),
    "RMSNorm with an offset": (lambda: nn.RMSNorm(IN, offset=1.0), rms_norm, torch_rms_norm),
}
DEEP = {
    "MLP": (lambda: nn.MLP(IN, INNER, nn.relu, key=KEY), mlp, torch_mlp),
    "GatedMLP": (lambda: nn.GatedMLP(IN, INNER, nn.relu, key=KEY), gated_mlp, torch_gated_mlp),
    "GatedMLP without bias": (
        lambda: nn.GatedMLP(IN, INNER, nn.relu, use_bias=False, key=KEY),
        gated_mlp,
        torch_gated_mlp,
    ),
}


@pytest.mark.parametrize("name", LAYERS | DEEP)
def test_a_layer_is_its_formula_over_the_last_axis_for_any_leading_axes(name):
    make, formula, in_torch = (LAYERS | DEEP)[name]
    layer, xs = filled(make()), [random(*axes, IN) for axes in AXES]
    for x, y in zip(xs, each([layer] * len(xs), xs), strict=True):
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, formula(layer, f64(x)), rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(y, in_torch(layer, as_torch(x)).numpy(), rtol=1e-5, atol=2e-5)


def in_every_dtype(name):
    """(layer, x, y) for every dtype of the weights and of the input."""
    layers = [filled((LAYERS | DEEP)[name][0](), dtype=dtype) for dtype in DTYPES for _ in DTYPES]
    xs = [random(5, IN, dtype=dtype) for _ in DTYPES for dtype in DTYPES]
    return zip(layers, xs, each(layers, xs), strict=True)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_wide_and_rounds_once_to_the_inputs_dtype(name):
    for layer, x, y in in_every_dtype(name):
        truth = LAYERS[name][1](layer, f64(x))
        assert y.dtype == x.dtype
        # Half a unit in the last place is what one rounding costs; summing or adding in half precision costs more.
        allowed = 0.51 * float(jnp.finfo(x.dtype).eps) * np.abs(truth) + 3e-6
        assert (np.abs(f64(y) - truth) <= allowed).all(), (layer.weight.dtype, x.dtype)


@pytest.mark.parametrize("name", ["MLP", "GatedMLP"])
def test_an_mlp_rounds_to_its_inputs_dtype_after_each_of_its_layers(name):
    for layer, x, y in in_every_dtype(name):
        truth = DEEP[name][1](layer, f64(x))
        assert y.dtype == x.dtype
        np.testing.assert_allclose(f64(y), truth, atol=4 * float(jnp.finfo(x.dtype).eps) * np.abs(truth).max() + 1e-5)


@pytest.mark.parametrize(
    ("inputs", "weights"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")]
)
def test_products_are_taken_in_the_wider_dtype(inputs, weights):
    # 1 + 2^-12 needs float32 and is all that is left after the cancellation.
    fine, coarse = jnp.asarray([1 + 2**-12, 1.0]), jnp.asarray([1.0, -1.0])
    x, w = (fine, coarse) if inputs == "float32" else (coarse, fine)
    x, w = x.astype(inputs), w.astype(weights)[None]
    layer = eqx.tree_at(lambda m: m.weight, nn.Linear(2, 1, use_bias=False, key=KEY), w)
    table = eqx.tree_at(lambda m: m.weight, nn.Embedding(1, 2, key=KEY), w)
    for y in (layer(x), table.attend(x)):
        assert y.dtype == x.dtype
        assert y.item() == 2**-12


@pytest.mark.parametrize(
    ("name", "in_torch"), [("Linear", torch_linear), ("LayerNorm", torch_layer_norm)], ids=["Linear", "LayerNorm"]
)
def test_bfloat16_is_no_further_from_the_truth_than_torch(name, in_torch):
    make = {"Linear": lambda: nn.Linear(64, 48, key=KEY), "LayerNorm": lambda: nn.LayerNorm(64)}[name]
    layers = [filled(make(), seed, "bfloat16") for seed in range(20)]
    xs = [random(16, 64, seed=seed + 100, dtype="bfloat16") for seed in range(20)]
    truths = [LAYERS[name][1](layer, f64(x)) for layer, x in zip(layers, xs, strict=True)]
    ours = [f64(layer(x)) for layer, x in zip(layers, xs, strict=True)]
    theirs = [
        in_torch(layer, as_torch(x, torch.bfloat16)).double().numpy() for layer, x in zip(layers, xs, strict=True)
    ]
    rms = lambda results: np.sqrt(np.mean(np.square(np.stack(results) - truths)))
    assert 0 < rms(ours) <= 1.1 * rms(theirs)


def resize(module, **shapes):
    where = lambda m: [getattr(m, name) for name in shapes]
    return eqx.tree_at(where, module, [jnp.ones(shape) for shape in shapes.values()])


def test_sizes_are_properties_of_the_arrays_so_tree_at_resizes():
    layer = resize(nn.Linear(IN, OUT, key=KEY), weight=(3, 2), bias=(3,))
    assert (layer.in_features, layer.out_features) == (2, 3)
    assert layer(jnp.ones((4, 2))).shape == (4, 3)

    table = resize(nn.Embedding(5, 3, padding_id=1, key=KEY), weight=(9, 4))
    assert (table.vocab_size, table.embed_dim) == (9, 4)
    assert table(jnp.array([8, 0])).shape == (2, 4)
    assert table.attend(jnp.ones(4)).shape == (9,)

    for norm in (resize(nn.LayerNorm(IN), weight=(4,), bias=(4,)), resize(nn.RMSNorm(IN), weight=(4,))):
        assert norm.dim == 4
        assert norm(jnp.ones((2, 4))).shape == (2, 4)


WRONG = {
    "Linear": (nn.Linear(IN, OUT, key=KEY), "in_features"),
    "LayerNorm": (nn.LayerNorm(IN), "dim"),
    "RMSNorm": (nn.RMSNorm(IN), "dim"),
    "Embedding": (nn.Embedding(5, IN, key=KEY).attend, "embed_dim"),
}


@pytest.mark.parametrize("shape", [(2, 6), (7, 2), ()], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_last_axis_is_named_with_what_was_expected_and_got(unchecked, name, shape):
    layer, axis = WRONG[name]
    with pytest.raises(
        ValueError, match=rf"{name}: .*{axis} = {IN}, but the input is {shape}".replace("(", r"\(").replace(")", r"\)")
    ):
        layer(jnp.ones(shape))


def test_a_wrong_last_axis_inside_a_module_carries_its_path(unchecked):
    layer = eqx.tree_at(lambda m: m.down_proj, nn.MLP(IN, INNER, nn.relu, key=KEY), nn.Linear(3, IN, key=KEY))
    with pytest.raises(ValueError, match="in_features = 3") as raised:
        layer(jnp.ones(IN))
    assert raised.value.__notes__ == ["at down_proj"]


def test_parameters_start_as_documented():
    layer = nn.Linear(400, 300, key=KEY)
    assert abs(float(layer.weight.std()) - 400**-0.5) < 1e-3
    assert not layer.bias.any()
    assert nn.Linear(2, 3, use_bias=False, key=KEY).bias is None
    assert (nn.LayerNorm(3).weight == 1).all() and not nn.LayerNorm(3).bias.any()
    assert nn.LayerNorm(3, use_bias=False).bias is None
    assert (nn.RMSNorm(3).weight == 1).all() and not nn.RMSNorm(3, offset=1.0).weight.any()
    assert abs(float(nn.Embedding(300, 40, key=KEY).weight.std()) - 1) < 2e-2
    drawn = nn.MLP(IN, IN, nn.relu, key=KEY)
    gated = nn.GatedMLP(IN, IN, nn.relu, key=KEY)
    matrices = [drawn.up_proj, drawn.down_proj], [gated.gate_proj, gated.up_proj, gated.down_proj]
    for some in matrices:  # one key must not serve two matrices
        assert len({np.asarray(layer.weight).tobytes() for layer in some}) == len(some)
    for kind in (nn.MLP, nn.GatedMLP):
        zero = kind(IN, IN, nn.relu, output_init=jax.nn.initializers.zeros, key=KEY)
        assert zero.up_proj.weight.any() and not zero.down_proj.weight.any()


@pytest.mark.parametrize("kind", [nn.MLP, nn.GatedMLP])
def test_an_mlp_drops_what_is_inside_and_nothing_without_a_key(kind):
    rate, x = 0.25, random(90, IN)
    layer = filled(kind(IN, IN, nn.relu, dropout=rate, key=KEY))
    seen = eqx.tree_at(lambda m: m.down_proj, layer, eqx.nn.Identity())  # what is inside, where it is the result
    inner, dropped, plain, result = eqx.filter_jit(lambda: (seen(x), seen(x, key=KEY), layer(x), layer(x, key=KEY)))()
    kept = np.asarray(dropped != 0) | np.asarray(inner == 0)
    np.testing.assert_allclose(dropped, np.where(kept, f64(inner) / (1 - rate), 0), rtol=1e-5)
    there = np.asarray(inner != 0)
    assert abs((~kept)[there].mean() - rate) < 0.1  # some 300 draws: four standard deviations
    np.testing.assert_allclose(result, linear(layer.down_proj, f64(dropped)), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(plain, linear(layer.down_proj, f64(inner)), rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(eqx.nn.inference_mode(layer)(x, key=KEY), layer(x))


# ---- activations

ACTIVATIONS = {
    nn.gelu: torch.nn.functional.gelu,
    nn.gelu_tanh: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    nn.relu: torch.relu,
    nn.silu: torch.nn.functional.silu,
    nn.tanh: torch.tanh,
}


@pytest.mark.parametrize("name", nn.ACTIVATIONS)
def test_an_activation_and_its_derivative_are_torchs(name):
    ours = nn.ACTIVATIONS[name]
    assert ours.__name__ == name
    x = np.linspace(-6, 6, 49).astype(np.float32)  # 0 is among them
    there = torch.from_numpy(x).double().requires_grad_()
    y = ACTIVATIONS[ours](there)
    y.sum().backward()
    np.testing.assert_allclose(ours(jnp.asarray(x)), y.detach().numpy(), atol=2e-6)
    # 1 - tanh^2 keeps no more digits than 1 has, and gelu_tanh multiplies it by up to 20.
    derivative = as_users_do(jax.grad(lambda x: ours(x).sum()))
    np.testing.assert_allclose(derivative(jnp.asarray(x)), there.grad.numpy(), atol=4e-6)


# ---- embedding

look_up = eqx.filter_jit(lambda table, ids: table(ids))
TABLE = nn.Embedding(6, 3, padding_id=1, key=KEY)


def test_an_embedding_is_rows_by_number_in_the_tables_dtype():
    for shape, dtype in [((), "float32"), ((4,), "bfloat16"), ((2, 3), "float16")]:
        ids, table = np.random.default_rng(0).integers(0, 6, shape), filled(TABLE, dtype=dtype)
        rows = look_up(table, jnp.asarray(ids))
        assert rows.dtype == dtype
        np.testing.assert_array_equal(rows, np.asarray(table.weight)[ids])


def test_attend_scores_against_every_row():
    table, x = filled(TABLE), random(2, 5, 3)
    np.testing.assert_allclose(table.attend(x), f64(x) @ f64(table.weight).T, atol=1e-5)


def test_the_padding_row_starts_at_zero_and_gets_a_gradient_from_attend_but_not_from_lookups():
    assert not TABLE.weight[1].any() and TABLE.weight[0].all()
    table, ids = filled(TABLE), jnp.array([1, 4, 1, 0, 4])
    by_lookup = jax.grad(lambda m: (m(ids) * jnp.arange(1.0, 6)[:, None]).sum())(table).weight
    np.testing.assert_array_equal(by_lookup[:, 0], [4, 0, 0, 0, 7, 0])
    by_scores = jax.grad(lambda m: m.attend(jnp.ones(3)).sum())(table).weight
    np.testing.assert_array_equal(by_scores, np.ones((6, 3)))
    whole = filled(nn.Embedding(6, 3, key=KEY))
    assert (jax.grad(lambda m: m(ids).sum())(whole).weight[1] == 2).all()


@pytest.mark.parametrize("row", [-1, 6])
def test_a_padding_row_outside_the_table_is_refused(row):
    with pytest.raises(ValueError, match=f"padding_id = {row} is not a row of a table of 6 rows"):
        nn.Embedding(6, 3, padding_id=row, key=KEY)


OUTSIDE = [6, 1000, -1, -6]


@pytest.mark.parametrize("bad", OUTSIDE)
def test_a_known_id_outside_the_table_is_refused(bad):
    with pytest.raises(ValueError, match=f"ids must be 0 to 5 .* 2 of them are outside, the first is {bad}"):
        TABLE(jnp.array([0, bad, 5, bad]))


@pytest.mark.parametrize("bad", OUTSIDE)
def test_an_id_outside_that_is_closed_over_is_refused_while_tracing(bad):
    ids = jnp.array([0, bad])
    with pytest.raises(ValueError, match=f"the first is {bad}"):
        eqx.filter_eval_shape(lambda m: m(ids), TABLE)


@pytest.mark.parametrize("bad", OUTSIDE)
def test_an_unknown_id_outside_the_table_gives_a_row_of_nan(bad):
    rows = look_up(filled(TABLE), jnp.array([0, bad, 5]))
    np.testing.assert_array_equal(np.isnan(rows).all(-1), [False, True, False])
    np.testing.assert_array_equal(np.isnan(rows).any(-1), [False, True, False])


@pytest.mark.parametrize("bad", OUTSIDE)
def test_an_unknown_id_outside_raises_at_run_time_when_checking(monkeypatch, bad):
    monkeypatch.setenv("EQX_TRANSFORMERS_CHECK", "1")
    look_up = eqx.filter_jit(lambda table, ids: table(ids))  # a fresh one: the switch is read while tracing
    np.testing.assert_array_equal(look_up(TABLE, jnp.array([0, 1, 5])), TABLE.weight[jnp.array([0, 1, 5])])
    with pytest.raises(RuntimeError, match="ids must be 0 to 5"):
        look_up(TABLE, jnp.array([0, bad, 5])).block_until_ready()
