"""The laws of a training step: pure, compiled once, the same in micro-batches, and never made of what is not finite."""

import functools
import subprocess
import sys
import textwrap
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_transformers import nn, select
from eqx_transformers.surgery import LoRA, adapter_mask, quantize, shared_leaves
from eqx_transformers.training.objectives import masked_lm_loss
from eqx_transformers.training.updater import TrainState, Updater, compiled

from ..surgery.adapted import KEY, LINEAR, small

pytestmark = pytest.mark.usefixtures("strict_promotion")
ROOT = Path(__file__).parents[2]


class Mini(eqx.Module):
    """Scores of its own table: one projection, so that a step is compiled quickly."""

    embedding: nn.Embedding
    dense: nn.Linear

    def __call__(self, ids, *, key=None):
        return self.embedding.attend(jnp.tanh(self.dense(self.embedding(ids))))


@functools.cache
def mini():
    table, dense = jax.random.split(jax.random.key(1))
    return Mini(nn.Embedding(11, 7, key=table), nn.Linear(7, 7, key=dense))


def batch(rows=8, seed=0):
    """Rows with unlike numbers of targets; the last two only fill the shape."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 11, (rows, 5)).astype(np.int32)
    targets = np.where(rng.random(ids.shape) < np.linspace(0.2, 1, rows)[:, None], ids, -100).astype(np.int32)
    weights = np.array([1] * (rows - 2) + [0, 0], np.float32)
    return {"token_ids": ids, "targets": targets, "weights": weights}


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))]


def close(ours, theirs, atol):
    for x, y in zip(arrays(ours), arrays(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def equal(ours, theirs):
    return all(np.array_equal(x, y) for x, y in zip(arrays(ours), arrays(theirs), strict=True))


def updated(updater, state, batch):
    """The pure update, compiled without donation: one by one, its operations take seconds."""
    return eqx.filter_jit(updater.update)(state, batch)


def counted(loss):
    """A loss, and a list that grows by one each time it is traced."""
    traces = []

    def called(model, batch, *, key=None):
        traces.append(key)
        return loss(model, batch, key=key)

    return called, traces


@pytest.mark.parametrize("stacked", [False, True])
def test_it_is_compiled_once_and_its_own_state_alone_is_donated(stacked):
    """Also where arrays of the model are of a weak type, as `jnp.full` makes them."""
    loss, traces = counted(masked_lm_loss)
    bias = lambda model: (model.stack.blocks if stacked else model.stack.blocks[0]).fused.bias
    model = eqx.tree_at(bias, small(stacked), replace_fn=lambda x: jnp.full(x.shape, 0.5))
    assert bias(model).weak_type
    before = arrays(model)
    updater = Updater(loss, optax.adamw(1e-2), clip_norm=1.0)
    state, step = updater.init(model, key=KEY), compiled(updater)
    first, losses = state, []
    for i in range(20):
        state, metrics = step(state, batch(seed=i % 3))
        losses.append(float(metrics["loss"]))
    assert len(traces) == 1 and traces[0] is not None
    assert first.step.is_deleted() and first.model.embedding.weight.is_deleted()
    assert all(np.array_equal(x, y) for x, y in zip(arrays(model), before, strict=True)) and not KEY.is_deleted()
    assert int(state.step) == 20 and int(state.skipped) == 0 and losses[-1] < 0.8 * losses[0]
    assert state.model.head is None  # tied, and so it stays
    step(state, batch(6))
    assert len(traces) == 2  # another shape


def test_an_update_is_pure_and_the_compiled_one_is_the_same():
    updater = Updater(masked_lm_loss, optax.adam(1e-2))
    state = updater.init(mini(), key=KEY)
    new, metrics = updated(updater, state, batch())
    again, _ = updated(updater, state, batch())
    assert isinstance(new, TrainState) and equal(new, again) and int(state.step) == 0 and int(new.step) == 1
    on_host = jax.tree.map(lambda x: np.array(x) if eqx.is_inexact_array(x) else x, state)  # as it may have been saved
    fast, said = compiled(updater)(on_host, batch())
    assert equal(on_host, state)
    close(fast, new, 1e-5)  # of Adam's first step, which is the gradient's sign, rounding may make more
    assert {*said} == {*metrics} == {"loss", "gradient_norm", "weight", "tokens", "finite"}
    assert all(jnp.shape(x) == () for x in metrics.values()) and bool(metrics["finite"])
    assert int(metrics["weight"]) == (batch()["targets"][:6] >= 0).sum() and int(metrics["tokens"]) == 6 * 5


@functools.cache
def whole_step():
    """The gradient of the whole batch, as a step of gradient descent."""
    updater = Updater(masked_lm_loss, optax.sgd(1.0))
    return updated(updater, updater.init(mini(), key=KEY), batch())


@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_have_the_gradient_of_the_batch(count):
    """Also with unlike numbers of tokens, and, of four, one that has no row that counts."""
    assert not batch()["weights"][6:].any()
    order = np.argsort(batch()["weights"], kind="stable") if count == 4 else np.arange(8)
    given = {name: x[order].reshape(2, 4, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape) for name, x in batch().items()}
    given = given if count == 4 else batch()
    updater = Updater(masked_lm_loss, optax.sgd(1.0), accumulate=count)
    state, metrics = updated(updater, updater.init(mini(), key=KEY), given)
    whole, said = whole_step()
    close(state.model, whole.model, 1e-6)
    assert {*said} == {*metrics}
    for name, x in said.items():
        np.testing.assert_allclose(metrics[name], x, rtol=1e-6)


def test_a_batch_that_cannot_be_divided_says_so():
    updater = Updater(masked_lm_loss, optax.sgd(1.0), accumulate=3)
    with pytest.raises(ValueError, match=r"accumulate = 3 micro-batches cannot .* arrays are \(8, 5\)"):
        updater.update(updater.init(mini(), key=KEY), batch())


def drawn(model, batch, *, key=None):
    """A loss that says what it drew."""
    return jnp.square(model.embedding.weight).mean(), {"drawn": jax.random.uniform(key)}


def test_keys_are_folded_from_the_step_and_the_micro_batch():
    folded = lambda *n: jax.random.uniform(functools.reduce(jax.random.fold_in, n, KEY))
    for count in (1, 2):
        updater = Updater(drawn, optax.sgd(0.1), accumulate=count)
        state, step = updater.init(mini(), key=KEY), compiled(updater)
        for t in range(2):
            state, metrics = step(state, batch())
            wanted = folded(t) if count == 1 else (folded(t, 0) + folded(t, 1)) / 2
            np.testing.assert_allclose(metrics["drawn"], wanted, rtol=1e-6)
        assert jnp.array_equal(jax.random.key_data(state.key), jax.random.key_data(KEY))


def test_a_loss_is_told_the_step_if_it_asks_and_the_key_if_it_takes_any_word():
    asks = lambda model, batch, *, key=None, step: (jnp.square(model.embedding.weight).mean() * 0 + step, {})
    any_word = lambda model, batch, **options: drawn(model, batch, **options)
    updater = Updater(lambda *a, key=None, step=None: asks(*a, step=step.astype(jnp.float32)), optax.sgd(0.1))
    state = updater.init(mini(), key=KEY)
    state, metrics = updater.update(state, batch())
    assert metrics["loss"] == 0 and updater.update(state, batch())[1]["loss"] == 1
    assert "drawn" in Updater(any_word, optax.sgd(0.1)).update(state, batch())[1]
    value = Updater(lambda model, batch: jnp.square(model.embedding.weight).mean(), optax.sgd(0.1))
    assert value.update(state, {"x": np.ones((3, 2))})[1]["weight"] == 3  # rows, where nothing is said


def test_the_loss_sees_bfloat16_and_all_that_is_kept_is_float32():
    seen = []

    def loss(model, batch, *, key=None):
        seen.extend(x.dtype for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
        return masked_lm_loss(model, batch, key=key)

    updater = Updater(loss, optax.sgd(1.0), trains=select(under="dense"), compute_dtype=jnp.bfloat16)
    state, metrics = updated(updater, updater.init(mini(), key=KEY), batch())
    assert {*seen} == {jnp.dtype(jnp.bfloat16)} and len(seen) == len(arrays(mini()))  # what is frozen too
    assert {x.dtype for x in arrays(state)} == {np.dtype(np.float32)} and metrics["loss"].dtype == jnp.float32
    exact = Updater(masked_lm_loss, optax.sgd(1.0), trains=select(under="dense"))
    wanted, _ = updated(exact, exact.init(mini(), key=KEY), batch())
    step = max(np.abs(x - y).max() for x, y in zip(arrays(wanted.model), arrays(mini()), strict=True))
    assert not equal(state.model, wanted.model)
    close(state.model, wanted.model, 0.02 * step)
    assert equal(state.model.embedding, mini().embedding)


def test_gradients_are_clipped_by_their_norm_which_is_told_as_it_was():
    whole, said = whole_step()
    norm = float(said["gradient_norm"])
    wanted = np.sqrt(sum(np.square(x - y).sum() for x, y in zip(arrays(whole.model), arrays(mini()), strict=True)))
    np.testing.assert_allclose(norm, wanted, rtol=1e-5)
    for limit, share in ((norm / 4, 0.25), (norm * 4, 1.0)):
        updater = Updater(masked_lm_loss, optax.sgd(1.0), clip_norm=limit)
        state, metrics = updated(updater, updater.init(mini(), key=KEY), batch())
        assert metrics["gradient_norm"] == said["gradient_norm"]
        old, new = arrays(mini()), arrays(whole.model)
        for x, before, after in zip(arrays(state.model), old, new, strict=True):
            np.testing.assert_allclose(x, before + share * (after - before), rtol=0, atol=1e-6)


def broken(model, batch, *, key=None):
    """Finite and with a finite gradient, but for what the batch makes of it."""
    value = jnp.square(model.embedding.weight).sum()
    return value * batch["loss"].sum() + jnp.sqrt(value * batch["gradient"].sum())


@pytest.mark.parametrize("wrong", [{"loss": np.nan}, {"loss": np.inf}, {"gradient": 0.0}], ids=str)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(wrong):
    """The root of 0 is 0, with an infinite gradient."""
    right = {"loss": np.ones(2, np.float32), "gradient": np.ones(2, np.float32)}
    bad = right | {name: np.full(2, x, np.float32) for name, x in wrong.items()}
    updater = Updater(broken, optax.adam(1e-2))
    step = compiled(updater)
    state, _ = step(updater.init(mini(), key=KEY), right)
    before = jax.tree.map(lambda x: jnp.array(x, copy=True) if eqx.is_array(x) else x, state)
    state, metrics = step(state, bad)
    assert equal(state.model, before.model) and equal(state.optimizer_state, before.optimizer_state)
    assert (int(state.step), int(state.skipped), bool(metrics["finite"])) == (2, 1, False)
    assert int(state.optimizer_state[0].count) == 1
    state, metrics = step(state, right)
    assert bool(metrics["finite"]) and int(state.skipped) == 1 and not equal(state.model, before.model)
    careless = Updater(broken, optax.sgd(1e-2), skip_nonfinite=False)
    state, metrics = updated(careless, careless.init(mini(), key=KEY), bad)
    assert not np.isfinite(arrays(state.model)[0]).all() and int(state.skipped) == 0 and not bool(metrics["finite"])


def adapted(stacked=False, bits=None):
    model = small(stacked)
    if bits is not None:
        model = quantize(model, LINEAR, bits, group=1)
    where = select("Linear" if bits is None else "Quantized")
    return eqx.tree_at(where, model, where.each(model, LoRA.adapter(2), key=KEY))


@pytest.mark.parametrize(("stacked", "bits"), [(False, None), (True, 8)])
def test_adapters_train_alone_on_any_base(stacked, bits):
    model = adapted(stacked, bits)
    mask = adapter_mask(model)
    narrow = {} if bits is None else {"compute_dtype": jnp.bfloat16}
    updater = Updater(masked_lm_loss, optax.adam(1e-1), trains=adapter_mask, **narrow)
    state, step = updater.init(model, key=KEY), compiled(updater)
    by_tree = Updater(masked_lm_loss, optax.adam(1e-1), trains=mask).init(model, key=KEY)
    assert jax.tree.structure(by_tree) == jax.tree.structure(state)
    for _ in range(2):
        state, _ = step(state, batch())
    learned, rest = eqx.partition(state.model, mask)
    assert eqx.tree_equal(rest, eqx.partition(model, mask)[1])
    before = arrays(eqx.filter(model, mask))
    assert all(not np.array_equal(x, y) for x, y in zip(arrays(learned), before, strict=True))
    assert len(arrays(state.optimizer_state)) == 2 * len(before)


def test_selections_train_what_they_find_and_arrays_that_are_one_are_separated():
    model = small()
    shared = eqx.tree_at(lambda m: m.stack.blocks[1].fused.weight, model, model.stack.blocks[0].fused.weight)
    assert shared_leaves(shared)
    updater = Updater(masked_lm_loss, optax.sgd(0.1), trains=select(under="stack.blocks.0"))
    state = updater.init(shared, key=KEY)
    assert not shared_leaves(state.model)
    state, _ = compiled(updater)(state, batch())
    same = [eqx.tree_equal(a, b) for a, b in zip(state.model.stack.blocks, shared.stack.blocks, strict=True)]
    assert same == [False, True] and eqx.tree_equal(state.model.embedding, shared.embedding)


def test_optimizers_that_look_at_the_loss_are_told_it():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=0, cooldown=0, atol=1e9)
    updater = Updater(masked_lm_loss, optax.chain(optax.sgd(0.0), plateau))
    state, step = updater.init(mini(), key=KEY), compiled(updater)
    for _ in range(4):
        state, _ = step(state, batch())
    assert state.optimizer_state[1].scale < 1


def test_what_is_wrong_is_said(unchecked):
    model = mini()
    init = lambda **options: Updater(masked_lm_loss, optax.sgd(0.1), **options).init(model, key=KEY)
    with pytest.raises(ValueError, match=r"Nothing would be trained: .* Mini that `trains` chooses"):
        init(trains=lambda model: jax.tree.map(lambda _: False, model))
    with pytest.raises(ValueError, match="trains must be None, a tree of bools like the Mini"):
        init(trains={"stack": True})
    with pytest.raises(ValueError, match="trains must be None"):
        init(trains=lambda model: jax.tree.map(lambda _: "yes", model))
    for options, said in (
        ({"accumulate": 0}, "accumulate = 0 must be a whole number"),
        ({"clip_norm": 0.0}, "clip_norm = 0.0 must be above 0"),
        ({"compute_dtype": jnp.int8}, "must be of floating point"),
    ):
        with pytest.raises(ValueError, match=said):
            init(**options)
    update = lambda loss: Updater(loss, optax.sgd(0.1)).update(init(), batch())
    with pytest.raises(ValueError, match=r"its value is an array \(11, 7\)"):
        update(lambda model, batch: model.embedding.weight)
    with pytest.raises(ValueError, match=r"its each is an array \(7,\)"):
        update(lambda model, batch: (model.embedding.weight.sum(), {"each": jnp.ones(7)}))
    with pytest.raises(ValueError, match="A loss said 'finite' in aux"):
        update(lambda model, batch: (model.embedding.weight.sum(), {"finite": 1.0}))


SHARDED = """
    import jax, numpy as np, optax, equinox as eqx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from eqx_transformers.training.updater import Updater, compiled

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    traces = []

    def loss(model, batch, *, key=None):
        traces.append(1)
        return ((jax.vmap(model)(batch["x"]) - batch["x"]) ** 2).mean()

    def run(place, accumulate):
        model = jax.tree.map(place, eqx.nn.Linear(16, 16, key=jax.random.key(0)))
        updater = Updater(loss, optax.adamw(1e-2), accumulate=accumulate)
        state, step, losses = updater.init(model, key=jax.random.key(1)), compiled(updater), []
        for i in range(4):
            x = place(np.random.default_rng(i).normal(size=(16, 16)).astype(np.float32))
            state, metrics = step(state, {"x": x})
            losses.append(float(metrics["loss"]))
        return state, losses

    spread = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    _, alone = run(lambda x: x, 1)
    traces.clear()
    state, losses = run(spread, 2)
    assert len(traces) == 1, traces
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    moments = state.optimizer_state[0]
    for x in (state.model.weight, moments.mu.weight, moments.nu.bias):
        assert len(x.addressable_shards) == 8 and x.addressable_shards[0].data.size == x.size // 8
    print("as alone")
"""


@pytest.mark.full
def test_arrays_stay_where_they_lie_on_eight_devices():
    """Also with micro-batches, and without compiling anything a second time."""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": ""}
    command = [sys.executable, "-c", textwrap.dedent(SHARDED)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "as alone", done.stderr
