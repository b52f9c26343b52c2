"""`load(…, sharding=…)`: every device gets its part, and of the file only these parts are read."""

import subprocess
import sys

import equinox as eqx
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file

import converters
from converters import ConversionError, filling
from eqx_transformers import MaskedLM, SequenceClassifier
from eqx_transformers.surgery import leaves_by_path

from ..reference import reference
from ..tiny import Row

# Eight devices need a process of their own: XLA reads the flag when it starts.
EIGHT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import converters
from converters import checkpoint, sharded
from eqx_transformers.surgery import leaves_by_path

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
copied, get, counted = sharded.copied, checkpoint.Checkpoint.get, []
sharded.copied = lambda x: counted.append(x.nbytes) or copied(x)
bare = lambda x: x if hasattr(x, "shape") else np.zeros(())


def sharding(path, like):
    last = like.ndim - 1 if like.shape and like.shape[-1] % 4 == 0 else None
    first = 0 if like.ndim > 1 and like.shape[0] % 2 == 0 else None
    return NamedSharding(mesh, PartitionSpec(*("model" if i == last else "data" if i == first else None
                                               for i in range(like.ndim))))


for directory in sys.argv[1:]:
    for options in ({}, {"stacked": True}, {"dtype": "bfloat16"}, {"stacked": True, "dtype": "bfloat16"}):
        checkpoint.Checkpoint.get = None  # no tensor is read whole
        counted.clear()
        parts = leaves_by_path(converters.load(directory, sharding=sharding, **options)[0])
        read = sum(counted)
        checkpoint.Checkpoint.get = get
        whole = leaves_by_path(converters.load(directory, **options)[0])
        arrays = {path: x for path, x in whole.items() if isinstance(x, jax.Array)}
        for path, x in arrays.items():
            assert parts[path].sharding == sharding(path, x), path
            assert parts[path].dtype == x.dtype and np.array_equal(np.asarray(parts[path]), np.asarray(x)), path
        held = sum(s.data.nbytes for path in arrays for s in parts[path].addressable_shards)
        assert read == held * (2 if "dtype" in options else 1), (read, held)
print("as whole")
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Widths that divide among devices."""
    import transformers

    directory = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "vocab_size": 64, "max_position_embeddings": 32}
    config = transformers.BertConfig(num_attention_heads=3, num_hidden_layers=2, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(directory, max_shard_size="20KB")
    return directory


def test_eight_devices_hold_their_parts_and_no_more_is_read(directory, tmp_path):
    script = tmp_path / "eight.py"
    script.write_text(EIGHT)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, script, directory], capture_output=True, text=True, env=flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "as whole"


@pytest.mark.parametrize("stacked", [False, True])
def test_one_device_gets_all(stacked):
    source = reference(Row("bert", MaskedLM)).directory
    place = SingleDeviceSharding(jax.devices()[0])
    assert eqx.tree_equal(
        converters.load(source, sharding=place, stacked=stacked)[0], converters.load(source, stacked=stacked)[0]
    )


@pytest.mark.parametrize("place", [None, SingleDeviceSharding(jax.devices()[0])], ids=["whole", "in parts"])
@pytest.mark.parametrize("head", [MaskedLM, SequenceClassifier], ids=["all of the file", "its backbone"])
@pytest.mark.parametrize(
    "options", [{}, {"stacked": True}, {"dtype": "bfloat16"}], ids=["plain", "stacked", "narrowed"]
)
def test_progress_counts_the_bytes_of_the_file_that_are_read(place, head, options, monkeypatch):
    monkeypatch.setattr(filling, "AT_ONCE", 4096)  # else all of a tiny model is one step
    source, seen = reference(Row("bert", MaskedLM)).directory, []
    options = options | {"sharding": place, "head": head, "key": jax.random.key(1)}
    converters.load(source, progress=lambda *at: seen.append(at), **options)
    held = load_file(source / "model.safetensors")
    total = sum(x.nbytes for key, x in held.items() if head is MaskedLM or key.startswith("bert."))
    assert seen[-1] == (total, total) and {of for _, of in seen} == {total}
    done = [one for one, _ in seen]
    assert len(done) > 4 and done[0] > 0 and done == sorted(set(done))


def test_what_is_drawn_is_placed_too():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    place, options = NamedSharding(mesh, PartitionSpec()), {"head": SequenceClassifier, "key": jax.random.key(1)}
    source = reference(Row("bert", MaskedLM)).directory
    model, _ = converters.load(source, sharding=place, **options)
    leaves = {path: x for path, x in leaves_by_path(model).items() if eqx.is_array(x)}
    assert all(x.sharding == place for x in leaves.values())
    plain = leaves_by_path(converters.load(source, **options)[0])
    assert all(np.array_equal(np.asarray(x), np.asarray(plain[path])) for path, x in leaves.items())


def test_a_loaded_array_never_changes_with_its_file(tmp_path):
    """A map of the file must not stand behind it."""
    source = reference(Row("bert", MaskedLM)).directory
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model, _ = converters.load(tmp_path, sharding=SingleDeviceSharding(jax.devices()[0]))
    before = np.array(model.backbone.embedding.tokens.weight)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(4096)
        file.write(bytes(30_000))
    np.testing.assert_array_equal(np.asarray(model.backbone.embedding.tokens.weight), before)


@pytest.mark.parametrize(
    ("sharding", "says"),
    [
        (lambda path, like: None, "sharding gave None for backbone"),
        (lambda path, like: "data", "sharding gave 'data' for backbone"),
    ],
    ids=["nothing", "text"],
)
def test_what_is_no_place_is_refused(sharding, says, unchecked):
    with pytest.raises(ConversionError, match=says):
        converters.load(reference(Row("bert", MaskedLM)).directory, sharding=sharding)
