"""Checkpoints: what is saved comes back bit for bit, the right ones stay, and damage is found."""

import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqx_transformers.training.checkpoint import CheckpointError, Checkpoints, Damaged, Restored, _read

from ..full import FULL
from .small_run import digest, make


def state_of(seed):
    """Arrays of several dtypes, keys, empty and NumPy arrays, and what is no array."""
    return {
        "half": jax.random.normal(jax.random.key(seed), (50, 3)).astype(jnp.bfloat16),
        "small": jnp.arange(7, dtype=jnp.int8) + jnp.int8(seed),
        "scalar": jnp.float32(seed),
        "flags": jnp.arange(4) == seed,
        "empty": jnp.zeros((0, 3)),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 2),
        "numpy": np.arange(3, dtype=np.int64) + seed,
        "function": jnp.tanh,
        "name": "model",
        "none": None,
    }


def like():
    return jax.tree.map(lambda x: x * 0 if isinstance(x, np.ndarray) else x, state_of(0))


def same(a, b):
    """Bit for bit, and of the same kinds."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if not eqx.is_array_like(x) or not hasattr(x, "dtype"):
            assert x is y or x == y
            continue
        assert x.dtype == y.dtype and isinstance(x, np.ndarray) == isinstance(y, np.ndarray)
        assert np.asarray(plain(x)).tobytes() == np.asarray(plain(y)).tobytes()
    return True


@pytest.mark.parametrize("asynchronous", [True, False])
def test_all_arrays_come_back_bit_for_bit_and_the_rest_is_that_of_like(tmp_path, asynchronous):
    history = {"steps": [{"loss": 0.1}]}
    with Checkpoints(tmp_path / "a/b", asynchronous=asynchronous) as checkpoints:
        assert checkpoints.restore(like()) is None and checkpoints.restore(like(), best=True) is None
        checkpoints.save(3, state_of(1), data=b"\x00\xff", metrics={"loss": 0.1}, history=history)
        history["steps"].append({"loss": 0.2})  # what is saved is what it was
        checkpoints.save(5, state_of(2), data={"epoch": 1, "at": [2]}, history=history)
        restored = checkpoints.restore(like())
    assert isinstance(restored, Restored) and same(restored.state, state_of(2))
    assert (restored.step, restored.data, restored.metrics) == (5, {"epoch": 1, "at": [2]}, {})
    with Checkpoints(tmp_path / "a/b") as checkpoints:
        assert checkpoints.steps == [3, 5] and checkpoints.best_step == 3
        restored = checkpoints.restore(like(), best=True)
    assert restored is not None and same(restored.state, state_of(1))
    assert (restored.data, restored.metrics) == (b"\x00\xff", {"loss": 0.1})
    assert restored.history == {"steps": [{"loss": 0.1}]}


def test_a_state_may_be_donated_at_once_while_the_one_before_is_being_written(tmp_path):
    advance = jax.jit(lambda x: jax.tree.map(lambda y: y * 2 + 1, x), donate_argnums=0)
    state, wanted = {"a": jnp.arange(500_000.0), "b": jnp.ones(3)}, {}
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for step in range(4):
            checkpoints.save(step, state)
            wanted[step] = jax.tree.map(lambda x: np.array(x), state)
            state = advance(state)
        checkpoints.wait()
        shutil.rmtree(tmp_path / "3")
        with pytest.warns(UserWarning, match="passed over"):
            restored = checkpoints.restore(state)
    assert restored is not None and restored.step == 2
    assert same(jax.tree.map(np.asarray, restored.state), wanted[2])


def test_what_was_not_a_number_is_none_of_the_best_later_either(tmp_path):
    state = {"a": jnp.ones(2)}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step, loss in {1: float("nan"), 2: 1.0, 3: 0.5}.items():
            checkpoints.save(step, state, metrics={"loss": loss})
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.best_step == 3 and checkpoints._ranked([1, 2, 3]) == [3, 2]


def test_late_readers_of_a_damaged_checkpoint_are_not_shown_and_others_are(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: shown.append(str(what.exc_value)))

    def torn():
        raise ValueError("OUT_OF_RANGE")

    with pytest.raises(Damaged, match="OUT_OF_RANGE"):
        _read(torn)
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert shown == ["another"]


@pytest.mark.parametrize("error", [MemoryError(), PermissionError("no"), RuntimeError("RESOURCE_EXHAUSTED: 9 GB")])
def test_what_is_no_fault_of_the_file_is_not_called_damage(tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2)})
        checkpoints.wait()
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(type(error)):
            checkpoints.restore({"a": jnp.ones(2)})


def test_the_last_and_the_best_stay(tmp_path):
    scores = {1: 0.3, 2: 0.9, 3: 0.9, 4: None, 5: float("nan"), 6: 0.1, 7: None}
    state = {"a": jnp.ones(2)}
    with Checkpoints(tmp_path, keep=2, best="accuracy", mode="max") as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state, metrics={} if score is None else {"accuracy": score})
            checkpoints.wait()
            best = max(
                (s for s, x in scores.items() if x == x and x is not None and s <= step), key=lambda s: (scores[s], -s)
            )
            assert checkpoints.steps == sorted({best, *range(max(1, step - 1), step + 1)})
    with Checkpoints(tmp_path, keep=1, keep_best=2, best="accuracy", mode="max") as checkpoints:
        assert (checkpoints.steps, checkpoints.best_step) == ([2, 6, 7], 2)
        checkpoints.save(8, state)
        checkpoints.wait()
        assert checkpoints.steps == [2, 6, 8]
        with pytest.raises(ValueError, match="has a checkpoint of step 8 already, of another run"):
            checkpoints.save(8, state)


def largest(directory):
    return max((file for file in directory.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def change(file):
    """One bit, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def cut(file):
    """To a half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "a bit of the numbers": lambda at: change(largest(at / "state")),
    "numbers cut off": lambda at: cut(largest(at / "state")),
    "numbers missing": lambda at: largest(at / "state").unlink(),
    "all numbers missing": lambda at: shutil.rmtree(at / "state"),
    "tree cut off": lambda at: cut(at / "state/_METADATA"),
    "a bit of the rest": lambda at: change(at / "meta/metadata"),
    "rest empty": lambda at: (at / "meta/metadata").write_bytes(b""),
    "rest missing": lambda at: shutil.rmtree(at / "meta"),
    "nothing left": lambda at: (shutil.rmtree(at), at.mkdir()),
}


# When orbax has failed on one array, tensorstore is still reading another one, for a loop that is closed by then.
noisy = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def big(seed):
    return {"a": jax.random.normal(jax.random.key(seed), (40, 50)), "b": jnp.full(3, seed)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, big(step), metrics={"loss": 1 / step})
    return directory


@noisy
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_one_is_passed_over_and_named(tmp_path, two, damage):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    DAMAGE[damage](tmp_path / "2")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.warns(UserWarning, match=rf"passed over:\n  {tmp_path / '2'}: .+\nThe run goes on from step 1"):
            restored = checkpoints.restore(big(0))
        assert restored is not None and restored.step == 1 and same(restored.state, big(1))
        checkpoints.save(2, big(5))  # in its place
        again = checkpoints.restore(big(0))
        assert again is not None and again.step == 2 and same(again.state, big(5))


@noisy
@pytest.mark.parametrize("harm", [change, cut, Path.unlink] if FULL else [cut])
def test_whichever_file_is_harmed_it_is_what_was_written_or_the_one_before(tmp_path, two, harm):
    files, passed = [file.relative_to(two) for file in (two / "2").rglob("*") if file.is_file()], 0
    for i, file in enumerate(files):
        shutil.copytree(two, tmp_path / str(i))
        harm(tmp_path / str(i) / file)
        with Checkpoints(tmp_path / str(i)) as checkpoints, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            restored = checkpoints.restore(big(0))
        assert restored is not None and restored.step == 2 - len(said) and same(restored.state, big(restored.step))
        passed += len(said)
    assert 2 <= passed <= len(files) and len(files) > 8


@noisy
def test_all_damaged_is_one_error_and_damaged_ones_go_when_there_is_a_newer(tmp_path, two):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    change(largest(tmp_path / "2/state"))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.warns(UserWarning, match="passed over"):
            checkpoints.restore(big(0), best=True)  # the best, step 2, is not what it was
        checkpoints.save(3, big(3))
        checkpoints.wait()
        assert checkpoints.steps == [1, 3]
    for step in (1, 3):
        change(largest(tmp_path / f"{step}/state"))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(big(0))
    assert str(error.value).startswith(f"Every checkpoint in {tmp_path} is damaged:\n  {tmp_path / '3'}: ")
    assert f"\n  {tmp_path / '1'}: the numbers of a are not those" in str(error.value)
    assert "To begin anew, remove the directory" in str(error.value)


def test_what_a_killed_process_left_half_written_is_removed_and_no_checkpoint(tmp_path, two):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    shutil.copytree(two / "2", tmp_path / "3.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1, 2]
        checkpoints.save(3, big(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]


def test_another_models_checkpoint_is_refused_with_what_differs(tmp_path):
    _, state = make()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        _, wider = make(width=6)
        with pytest.raises(CheckpointError, match="another model or optimizer") as error:
            checkpoints.restore(wider)
        assert "model.first.weight: float32 (7, 5) in the checkpoint, float32 (7, 6) in the state" in str(error.value)
        more = {"model": state.model, "extra": jnp.ones(1)}
        with pytest.raises(CheckpointError, match="extra: not in the checkpoint"):
            checkpoints.restore(more)
        half = eqx.tree_at(lambda s: s.model.last.bias, state, state.model.last.bias.astype(jnp.bfloat16))
        with pytest.raises(CheckpointError, match=r"last.bias: float32 \(1,\) in the checkpoint, bfloat16 \(1,\)"):
            checkpoints.restore(half)
        restored = checkpoints.restore(state)
    assert restored is not None and digest(restored.state) == digest(state)


def test_arrays_lie_where_those_of_like_do(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    state = {"a": jnp.arange(4.0), "key": jax.random.key(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        free = checkpoints.restore(state)
        placed = checkpoints.restore(jax.device_put(state, {"a": place, "key": NamedSharding(mesh, PartitionSpec())}))
        spec = {
            "a": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=place),
            "key": jax.eval_shape(lambda: state["key"]),
        }
        shapes = checkpoints.restore(spec)
    for restored in (free, placed, shapes):
        assert restored is not None and same(restored.state, state)
    assert not free.state["a"].committed and not free.state["key"].committed
    assert placed.state["a"].sharding == place == shapes.state["a"].sharding


@pytest.mark.parametrize("settings", [{"keep": 0}, {"keep_best": -1}, {"mode": "least"}])
def test_settings_out_of_range_are_refused(tmp_path, settings, unchecked):
    with pytest.raises(ValueError, match="must be at least 1, keep_best"):
        Checkpoints(tmp_path, **settings)


def test_a_tree_with_one_path_twice_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="a key of a dict in it has a dot"):
        checkpoints.save(1, {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}})


def test_without_orbax_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"need orbax-checkpoint: pip install 'eqx_transformers\[train\]'"):
        Checkpoints(tmp_path)
