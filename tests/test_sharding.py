"""Meshes, rules and what they give; and, in child processes, training on eight devices and in two processes."""

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P

from converters.families import FAMILIES
from eqx_transformers import T5, CausalLM, MaskedLM, select
from eqx_transformers.sharding import (
    DATA_PARALLEL,
    FULLY_SHARDED,
    TENSOR_PARALLEL,
    Rule,
    Rules,
    ShardedArray,
    ShardingReport,
    make_mesh,
    placement,
    report,
    row_share,
    rules_for,
    shard,
    shard_batch,
    specs,
    start_processes,
)
from eqx_transformers.sharding.placing import _share
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery import add_adapter, leaves_by_path, quantize

from .full import FULL
from .surgery.test_families import SIZES

ROOT = Path(__file__).parent.parent
STATED = 1e-5
AUTO = (AxisType.Auto, AxisType.Auto)
VOCABULARY = 64  # no other axis has this size
EIGHT = AbstractMesh((2, 4), ("data", "model"), axis_types=AUTO)
ONE = {"axis_types": AUTO, "axis_shapes": (1, 1), "axis_names": ("data", "model")}
spec_of = lambda model, mesh, rules: leaves_by_path(specs(model, mesh, rules))


# ---- eight devices, in one child


WAYS, MODELS = ("data", "full", "tensor", "mixed", "both"), ("roberta", "gpt2", "llama", "t5", "odd", "adapted")
FEW = [("data", "gpt2"), ("full", "gpt2"), ("tensor", "gpt2"), ("both", "t5")]
TRAINED = list(itertools.product(WAYS, MODELS)) if FULL else FEW
LOADED = WAYS if FULL else ("full", "mixed")
TALKING = MODELS if FULL else ("gpt2",)
# Compiled quickly: what is said is of sums in another order, and not of the last digit.
QUICK = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def child(devices: int, module: str, *args: str) -> subprocess.Popen:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.{module}", *args],
        cwd=ROOT,
        env=os.environ | QUICK | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen, timeout: float) -> list[dict]:
    """Its lines of JSON. Fails, with what it wrote, where it does not end well or in time."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"{process.args} did not end in {timeout} s:\n{out}\n{err}")
    assert process.returncode == 0, f"{process.args}:\n{out}\n{err}"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def eight():
    """What the child says of each case."""
    models = dict.fromkeys(model for _, model in TRAINED)
    cases = [f"one/{model}" for model in models] + [f"{way}/{model}" for way, model in TRAINED]
    cases += [f"load/{way}" for way in LOADED] + [f"collectives/{model}" for model in TALKING]
    return {x["case"]: x for x in said(child(8, "sharded_training", *cases, "rows/8", "rows/6"), 3600 if FULL else 600)}


@pytest.mark.parametrize(("way", "model"), TRAINED, ids=map("-".join, TRAINED))
def test_training_on_eight_devices_has_the_losses_of_one(way, model, eight):
    one, many = eight[f"one/{model}"]["losses"], eight[f"{way}/{model}"]["losses"]
    assert len(one) == 4 and np.isfinite(one).all() and np.ptp(one) > 1e-3
    np.testing.assert_allclose(many, one, rtol=0, atol=STATED)


# What a device holds of the whole: exactly, where all sizes divide; and at most.
HELD = {"data": (1, 1), "full": (1 / 8, 1 / 8), "tensor": (1 / 8, 0.26), "mixed": (1 / 4, 0.36), "both": (1 / 8, 0.19)}


@pytest.mark.parametrize(("way", "model"), TRAINED, ids=map("-".join, TRAINED))
def test_parameters_and_moments_really_live_in_parts(way, model, eight):
    found = eight[f"{way}/{model}"]
    assert found["misplaced"] == []
    assert found["held"] == [found["reported"]] * 8
    at_least, at_most = HELD[way]
    if model not in ("odd", "adapted"):
        assert at_least <= found["reported"] / found["whole"] <= at_most
    # Adam's: two numbers for each that is trained.
    assert len(set(found["moments"])) == 1
    if model != "adapted":
        assert found["moments"][0] == 2 * found["reported"] and found["moments_whole"] == 2 * found["whole"]


@pytest.mark.parametrize("way", LOADED)
def test_a_checkpoint_is_read_into_the_parts_that_shard_makes(way, eight):
    found = eight[f"load/{way}"]
    assert found["same"] and found["misplaced"] == []
    assert found["held"] == [found["reported"]] * 8


@pytest.mark.parametrize("model", TALKING)
def test_divided_layers_add_up_and_gather_nothing(model, eight):
    """One sum behind the embedding, and one behind each of attention and MLP."""
    found = eight[f"collectives/{model}"]
    gathers = [found[kind] for kind in ("all-gather", "all-to-all", "collective-permute")]
    if model == "odd":
        assert any(gathers)  # heads that do not divide: right, and slower
    else:
        assert not any(gathers) and 3 <= found["all-reduce"] <= 6


def test_rows_that_do_not_divide_are_refused(eight):
    assert eight["rows/8"]["said"] == ""
    assert "token_ids has 6 rows, which do not divide among 4 parts of the mesh" in eight["rows/6"]["said"]


# ---- two processes


def test_two_processes_have_the_losses_of_one(eight, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for i in "01":
        (tmp_path / i).mkdir()
    pair = [child(2, "sharded_processes", f"localhost:{port}", "2", i, str(tmp_path / i)) for i in "01"]
    try:
        told = [said(process, 300)[0] for process in pair]
    finally:
        for process in pair:  # one that waits for the other, if that has failed
            process.kill()
            process.communicate()
    for found in told:
        assert found["devices"] == 4
        np.testing.assert_allclose(found["losses"], eight["one/gpt2"]["losses"], rtol=0, atol=STATED)
        assert found["misplaced"] == [] and found["held"] == [found["reported"]] * 2
        assert found["loaded"] and found["loaded_held"] == [found["loaded_reported"]] * 2
        assert "hold different models: that of process 1 is not that of process 0" in found["refused"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("localhost", 2, 0), "'localhost' must be \"host:port\""),
        (("localhost:1", 2), "process None of 2"),
        (("localhost:1", 2, 2), "process 2 of 2.*counted from 0"),
    ],
)
def test_processes_that_do_not_fit_together_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        start_processes(*given)


@pytest.mark.parametrize(
    ("processes", "process", "share"),
    [
        ([[0, 0], [1, 1]], 1, (1, 2)),
        ([[0, 1], [0, 1]], 1, (0, 1)),  # "model" reaches across: both have all rows
        ([[0, 1], [2, 3]], 2, (1, 2)),
        ([[1], [0]], 1, (0, 2)),
    ],
)
def test_processes_that_share_rows_have_the_same_share(processes, process, share):
    assert _share(np.array(processes), process) == share


def test_shares_that_overlap_and_meshes_without_rows_are_refused(unchecked):
    with pytest.raises(ValueError, match="none in common"):
        _share(np.array([[0, 0], [0, 1]]), 0)
    with pytest.raises(ValueError, match="'data', but the axes of the mesh are model=1"):
        row_share(make_mesh("model=1"))
    assert row_share(None) == row_share(make_mesh("data=1,model=1")) == (0, 1)


# ---- meshes


def test_a_mesh_is_text_or_a_mapping():
    mesh = make_mesh("data=1, model=-1")
    assert dict(mesh.shape) == {"data": 1, "model": 1} and mesh.axis_types == AUTO
    assert make_mesh({"data": -1, "model": 1}, devices=jax.devices()) == mesh


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ("data=2,model=4", r"'data=2,model=4' is no mesh of the 1 devices here: 2x4 = 8 is not their number"),
        ("data=2,model=-1", "2 does not divide their number"),
        ("data=-1,model=-1", "one axis at most may be -1"),
        ("data=1,data=1", "a name of its own"),
        ("data", "'data' is not name=size"),
        ("data=two", "'data=two' is not name=size"),
        ("", "'' is not name=size"),
        ("a b=1", "'a b' is no name of an axis"),
        ("data=0", "data=0 must be at least 1"),
        ({"data": 0.5}, "data=0.5 must be at least 1"),
        ({}, "there must be one"),
    ],
    ids=str,
)
def test_what_is_no_mesh_is_refused(axes, says, unchecked):
    with pytest.raises(ValueError, match=says):
        make_mesh(axes)


def test_a_mesh_of_explicit_axes_is_refused_and_so_is_one_without_devices(unchecked):
    explicit, x = jax.make_mesh(**ONE | {"axis_types": (AxisType.Explicit,) * 2}), jnp.zeros(4)
    for use in (lambda m: specs(x, m, DATA_PARALLEL), lambda m: shard_batch(x, m), rules_for):
        with pytest.raises(
            ValueError, match=r'must be of type Auto, but data is Explicit.*make_mesh\("data=1,model=1"'
        ):
            use(explicit)
        with pytest.raises(TypeError, match="A mesh of devices is needed"):
            use("data=1")
    for use in (lambda m: shard(x, m, DATA_PARALLEL), lambda m: placement(m, DATA_PARALLEL)):
        with pytest.raises(TypeError, match="Arrays need devices to lie on"):
            use(EIGHT)


# ---- the built-in rules hold for every family


def built(head, family, stacked):
    """Shapes alone, of sizes that four devices divide."""
    defaults, sizes = FAMILIES[family].defaults, SIZES | {"vocab_size": VOCABULARY, "max_positions": 32}
    known = {field.name for field in dataclasses.fields(defaults)} & sizes.keys() - {"embedding_dim"}
    config = dataclasses.replace(defaults, **{name: sizes[name] for name in known})
    return skeleton(head, config, stacked)


def head_of(family):
    """Of a vocabulary."""
    return next(head for head in FAMILIES[family].models.values() if head in (MaskedLM, CausalLM, T5))


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallelism_divides_every_layer_and_vocabulary_of_every_family_stacked_or_not(family):
    loose, tight = (built(head_of(family), family, stacked) for stacked in (False, True))
    found, shapes = spec_of(loose, EIGHT, TENSOR_PARALLEL), leaves_by_path(loose)
    matrices = [path for path in found if ".blocks." in path and path.endswith("_proj.weight")]
    assert len(matrices) >= 2 * 6 and all("model" in found[path] for path in matrices)
    tables = [path for path in found if VOCABULARY in shapes[path].shape]
    assert tables and all(found[path] == P("model") for path in tables)
    # A stacked array lies as one layer's does, its layer axis whole.
    one = lambda path: found[path.replace(".blocks.", ".blocks.0.")]
    for path, spec in spec_of(tight, EIGHT, TENSOR_PARALLEL).items():
        assert spec == (P(None, *one(path)) if ".blocks." in path and one(path) else one(path)), path


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("rules", [TENSOR_PARALLEL, FULLY_SHARDED | TENSOR_PARALLEL], ids=["tensor", "both"])
@pytest.mark.parametrize("family", ["roberta", "t5", "qwen3"])
def test_a_placement_knows_from_paths_what_specs_reads_off_the_model(family, rules, stacked):
    mesh, model = make_mesh("data=1,model=1"), built(head_of(family), family, stacked)
    place, found = placement(mesh, rules), spec_of(model, mesh, rules)
    shapes = {path: x for path, x in leaves_by_path(model).items() if isinstance(x, jax.ShapeDtypeStruct)}
    assert {path: place(path, x).spec for path, x in shapes.items()} == found
    assert len(found) > 10


def test_fully_sharded_divides_the_largest_axis_that_it_can_and_never_layers():
    tree = {"a": jnp.zeros((4, 6, 8)), "b": jnp.zeros((9, 7)), "c": jnp.zeros(()), "d": jnp.zeros((6, 6))}
    assert spec_of(tree, EIGHT, FULLY_SHARDED) == {"a": P(None, None, "data"), "b": P(), "c": P(), "d": P("data")}
    stacked = spec_of(built(MaskedLM, "roberta", True), EIGHT, FULLY_SHARDED)
    inside = [spec for path, spec in stacked.items() if ".blocks." in path]
    assert inside and all(spec[0] is None and "data" in spec for spec in inside)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stacked", [False, True])
def test_adapters_and_quantized_layers_are_divided_as_their_layers_are(stacked, bits):
    quantized = quantize(built(MaskedLM, "roberta", stacked), select("Linear", under="**.blocks"), bits, 4)
    adapt = lambda model: add_adapter(model, select("Quantized"), rank=2, key=jax.random.key(0))
    model = eqx.filter_eval_shape(adapt, quantized)
    found = spec_of(model, EIGHT, TENSOR_PARALLEL)
    first = (None,) if stacked else ()
    at = lambda name: next(spec for path, spec in found.items() if ".blocks" in path and path.endswith(name))
    assert at("query_proj.base.numbers") == at("query_proj.base.scale") == P(*first, "model")
    assert at("query_proj.base.bias") == at("query_proj.adapters.0.b") == P(*first, "model")
    assert at("query_proj.adapters.0.a") == at("query_proj.adapters.0.scale") == P()
    assert at("output_proj.adapters.0.a") == P(*first, None, "model")
    assert at("output_proj.adapters.0.b") == at("output_proj.base.bias") == at("output_proj.base.scale") == P()
    wide = at("output_proj.base.numbers")
    assert wide == P(*first, None, "model")


# ---- rules of one's own


TREE = {"mlp": {"up": jnp.zeros((8, 6)), "down": jnp.zeros((6, 8)), "bias": jnp.zeros(61)}, "key": jax.random.key(0)}
OWN = [("**.up", P("model")), ("mlp.down", (None, "model")), ("mlp.*", ("data", "model"))]


def test_the_first_rule_that_fits_decides_and_the_other_spellings_are_the_same():
    rules = [("**.up", "model"), ("mlp.down", (None, ("model", "data"))), ("**.bias", P(None))]
    found = specs(TREE, EIGHT, rules)
    assert found == {"mlp": {"up": P("model"), "down": P(None, ("model", "data")), "bias": P()}, "key": None}
    assert specs(TREE, EIGHT, dict(rules)) == found
    assert specs(TREE, EIGHT, Rules((Rule("**.up", P("model")),)) | rules[1:]) == found
    both = rules | FULLY_SHARDED
    assert both.axes == {"data", "model"} and both.spread == ("data",)
    assert specs(TREE, EIGHT, both)["mlp"]["up"] == P("model", "data")


def test_an_axis_that_does_not_divide_stays_whole_and_the_report_says_so():
    found = report(TREE, EIGHT, [("**.{up,bias}", "model")])
    assert isinstance(found, ShardingReport) and found.bytes == 4 * (48 + 48 + 61)
    assert found.bytes_per_device == 4 * (12 + 48 + 61)
    assert found.arrays[0] == ShardedArray("mlp.bias", (61,), P(), 244, 244, "61 not divisible by model=4")
    header, first, *_, last = str(found).splitlines()
    assert header.split() == ["path", "shape", "spec", "bytes", "per", "device"]
    assert first.split()[:4] == ["mlp.bias", "61", "replicated", "244"]
    assert last.split() == ["all,", "on", "data=2,model=4", "484", "of", "628"]


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([("**.upp", "model")], r"nothing lies at '\*\*.upp'.*nearest paths: mlp.up"),
        ([("mlp", "model")], r"No array of this dict lies at 'mlp'. It is what contains mlp.bias.*'mlp.\*\*'"),
        ([("key", "model")], "No array of this dict lies at 'key'"),
        ([("**.up", "tensor")], "divide along 'tensor', but the axes of this mesh are data=2,model=4"),
        ([("**.bias", ("data", "model"))], r"divides 2 axes .* but the array at mlp.bias has 1: \[61\]"),
        ([("mlp..up", "model")], "malformed"),
    ],
    ids=["mistyped", "a module", "a key", "no such axis", "too long", "malformed"],
)
def test_rules_that_cannot_hold_are_refused(rules, says):
    with pytest.raises(ValueError, match=says):
        specs(TREE, EIGHT, rules)


@pytest.mark.parametrize("rules", ["model", 3, [("a", 3, 4)], [3], [("mlp.up", 3)], [("mlp.up", (3,))]], ids=str)
def test_what_are_no_rules_is_refused(rules, unchecked):
    with pytest.raises(TypeError, match=r"ule|spec"):
        specs(TREE, EIGHT, rules)
    with pytest.raises(TypeError, match="is no PartitionSpec"):
        Rule("mlp.up", ("model",))


def test_a_placement_refuses_what_paths_do_not_tell():
    mesh = make_mesh("data=1,model=1")
    for pattern in ("**.blocks.[-1].**", "**.blocks.[0:-1].**"):
        with pytest.raises(ValueError, match="counts from the end of a sequence"):
            placement(mesh, [(pattern, "model")])
    place = placement(mesh, [("stack.blocks.[0:2].**", "model")])
    like = jax.ShapeDtypeStruct((4,), jnp.float32)
    assert place("stack.blocks.1.bias", like).spec == P("model") and place("stack.blocks.2.bias", like).spec == P()


def test_the_usual_rules_are_those_of_the_axes():
    assert rules_for(make_mesh("data=1")) == DATA_PARALLEL
    assert rules_for(make_mesh("data=1"), fully_sharded=True) == FULLY_SHARDED
    assert rules_for(EIGHT) == TENSOR_PARALLEL
    assert rules_for(EIGHT, fully_sharded=True) == FULLY_SHARDED | TENSOR_PARALLEL
    for axes in ("model=1", "data=1,dta=1"):
        with pytest.raises(ValueError, match=r'has the axes "data".*this one is'):
            rules_for(make_mesh(axes))


# ---- putting things there


def test_shard_changes_no_number_and_leaves_keys_and_the_rest_alone():
    mesh = make_mesh("data=1,model=1")
    tree = TREE | {"rate": 0.1, "f": jnp.tanh, "host": np.ones((2, 2), np.float32), "none": None}
    there = shard(tree, mesh, [("**.up", "model")])
    assert there["mlp"]["up"].sharding == jax.NamedSharding(mesh, P("model"))
    assert there["host"].sharding == jax.NamedSharding(mesh, P())
    assert there["key"] is tree["key"] and there["f"] is jnp.tanh and there["rate"] == 0.1 and there["none"] is None
    assert eqx.tree_equal(there["mlp"], tree["mlp"])
    shapes = shard(eqx.filter_eval_shape(lambda: tree["mlp"]), mesh, [("up", "model")])
    assert shapes["up"].sharding == there["mlp"]["up"].sharding and shapes["up"].shape == (8, 6)


def test_a_batch_lies_by_rows_and_what_has_none_is_refused():
    mesh = make_mesh("data=1,model=1")
    batch = {"token_ids": np.ones((4, 3), np.int32), "weights": jnp.ones(4)}
    there = shard_batch(batch, mesh)
    assert there["token_ids"].sharding == there["weights"].sharding == jax.NamedSharding(mesh, P("data"))
    np.testing.assert_array_equal(there["token_ids"], batch["token_ids"])
    assert shard_batch(batch, mesh, ("data", "model"))["weights"].sharding.spec == P(("data", "model"))
    with pytest.raises(ValueError, match="scale is one number"):
        shard_batch({"scale": np.float32(1)}, mesh)
    with pytest.raises(ValueError, match=r"along 'data', but the axes of this mesh are model=1: make_mesh\(\"data=1"):
        shard_batch(batch, make_mesh("model=1"))
