"""Every container, one file or several, in every dtype: what was read is written, bit for bit, and loads there.

Of the six ways (four, where there is no Flax) to keep the tensors of a row in a dtype, two are tried, others for the
next dtype: every row comes in every container, whole and in shards, and in every dtype. EQX_TRANSFORMERS_FULL=1 tries
all of them.

Also which of several checkpoints in one directory is read, and what is said of the others.
"""

import itertools
import json
import shutil

import equinox as eqx
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import converters
from converters.containers import CONTAINERS
from converters.families import FAMILIES
from eqx_transformers import MaskedLM

from ..full import FULL
from ..reference import reference
from ..tiny import CONFIGS, MIXED, ROWS, Row
from .writers import HEADS_OF_TWO_BIASES, WRITERS

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tensors(row, dtype):
    """The reference's, in this dtype; of a bias that torch lists twice, one value: Flax has one."""
    held = load_file(reference(row).directory / "model.safetensors")
    held |= {
        f"{head}.bias": held[f"{head}.decoder.bias"] for head in HEADS_OF_TWO_BIASES if f"{head}.decoder.bias" in held
    }
    return {key: x.astype(dtype) for key, x in held.items()}


def directory(row, place, dtype, fields=None):
    """Everything but the weights, and a field and a file of which we know nothing."""
    source = reference(row).directory
    shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_bytes())
    (place / "config.json").write_text(json.dumps(config | {"dtype": dtype} | (fields or {})))
    (place / "tokenizer.json").write_text('{"version": "1.0"}')
    return place


def exported(place):
    return {key: x for path in place.glob("*.safetensors") for key, x in load_file(path).items()}


def assert_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert found[key].dtype == x.dtype and found[key].shape == x.shape and found[key].tobytes() == x.tobytes(), key


def ways(row, dtype):
    """Those of the full table that are tried: over the three dtypes every container, whole or in shards by turns."""
    known = [name for name in WRITERS if name != "flax" or FAMILIES[row.family].flax is not None]
    turn = list(DTYPES).index(dtype) + ROWS.index(row)
    picked = [(known[turn % len(known)], (1, 3)[turn % 2])]
    return list(itertools.product(known, (1, 3))) if FULL else picked


# Of a decoder's files, what a bare one or a classifier's is in one dtype it is in all.
ROUND = [
    (row, dtype) for i, row in enumerate(ROWS) for dtype in DTYPES if row in CONFIGS or i % 3 == [*DTYPES].index(dtype)
]


@pytest.mark.parametrize(("row", "dtype"), ROUND, ids=lambda x: x if isinstance(x, str) else x.id)
def test_what_is_read_is_written(row, dtype, tmp_path):
    held = tensors(row, DTYPES[dtype])
    for number, (container, shards) in enumerate(ways(row, dtype)):
        source = directory(row, tmp_path / f"{container}-{shards}", dtype)
        WRITERS[container](source, held, shards)
        model, origin = converters.load(source, stacked=number % 2 == 1 and row != MIXED)
        out = tmp_path / f"{container}-{shards}-again"
        converters.export(model, out, origin, max_shard_size="10KB" if shards > 1 else "5GB")
        assert_bits(exported(out), held)
        assert len(list(out.glob("*.safetensors"))) == 1 or shards > 1
        assert json.loads((out / "config.json").read_bytes()) == json.loads((source / "config.json").read_bytes())
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        if number == 0:  # all the others wrote the same
            _, info = getattr(transformers, row.architecture).from_pretrained(
                out, dtype="auto", output_loading_info=True
            )
            assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info


def test_unknown_fields_survive_where_they_are_let_through(tmp_path):
    row, fields = Row("bert", MaskedLM), {"our_own_field": {"a": [1, None]}, "another": "ä"}
    source = directory(row, tmp_path / "source", "float32", fields)
    WRITERS["safetensors"](source, tensors(row, np.float32), 1)
    with pytest.raises(converters.UnsupportedConfig, match="our_own_field"):
        converters.load(source)
    model, origin = converters.load(source, strict=False)
    converters.export(model, tmp_path / "again", origin)
    assert json.loads((tmp_path / "again" / "config.json").read_bytes()).items() >= fields.items()


ORDER = [(one.name, shards) for one in CONTAINERS for shards in (1, 3)]


@pytest.mark.parametrize("preferred", range(len(ORDER)), ids=lambda i: f"{ORDER[i][0]}-{ORDER[i][1]}")
def test_of_several_checkpoints_the_first_in_order_is_read_and_the_others_are_named(preferred, tmp_path):
    """The order is transformers', then Flax; the others hold other numbers."""
    row = Row("roberta", MaskedLM)
    held = tensors(row, np.float32)
    source = directory(row, tmp_path / "source", "float32")
    for i, (container, shards) in list(enumerate(ORDER))[preferred:]:
        WRITERS[container](source, {key: x + np.float32(i - preferred) for key, x in held.items()}, shards)
    model, _ = converters.load(source)
    assert eqx.tree_equal(model, converters.load(reference(row).directory)[0])
    notes = converters.inspect(source).notes
    first = CONTAINERS[[one.name for one in CONTAINERS].index(ORDER[preferred][0])]
    read = first.weights if ORDER[preferred][1] == 1 else f"the shards of {first.index}"
    if preferred == len(ORDER) - 1:
        assert not any("not read" in note for note in notes)
    else:
        assert sum(f"read from {read};" in note and "there too, and not read" in note for note in notes) == 1


def test_a_shard_that_no_index_names_is_said_to_lie_there(tmp_path):
    row = Row("roberta", MaskedLM)
    source = directory(row, tmp_path / "source", "float32")
    WRITERS["safetensors"](source, tensors(row, np.float32), 2)
    (source / "model-00003-of-00002.safetensors").write_bytes(b"an older save")
    assert any("model-00003-of-00002.safetensors is there too" in note for note in converters.inspect(source).notes)
    assert converters.inspect(source).ok


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.bin", "README.md"])
def test_what_is_no_checkpoint_is_no_matter(name, tmp_path):
    row = Row("roberta", MaskedLM)
    source = directory(row, tmp_path / "source", "float32")
    WRITERS["torch"](source, tensors(row, np.float32), 1)
    (source / name).write_bytes(b"x")
    assert converters.inspect(source).notes == ()


def test_transformers_reads_the_pickle_that_we_read(tmp_path):
    """The same tensors as torch gives, also of views into one storage."""
    row = Row("roberta", MaskedLM)
    source = directory(row, tmp_path / "source", "float32")
    held = {key: torch.from_numpy(x) for key, x in tensors(row, np.float32).items()}
    whole = torch.cat([x.reshape(-1) for x in held.values()])  # one storage for all, and every tensor a part of it
    ends = np.cumsum([x.numel() for x in held.values()])
    views = {k: whole[end - x.numel() : end].view(x.shape) for (k, x), end in zip(held.items(), ends, strict=True)}
    views["roberta.encoder.layer.0.output.dense.weight"] = (
        held["roberta.encoder.layer.0.output.dense.weight"].T.contiguous().T
    )
    torch.save(views, source / "pytorch_model.bin")
    assert eqx.tree_equal(converters.load(source)[0], converters.load(reference(row).directory)[0])
    theirs = transformers.RobertaForMaskedLM.from_pretrained(source)
    assert all(torch.equal(theirs.state_dict()[key], x) for key, x in held.items())
