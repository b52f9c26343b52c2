"""golden/t5_vae_flax: files that flax itself wrote, read array by array. The model is another family's."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from converters.flax_names import turned
from converters.msgpack_reader import read_header
from eqx_transformers import tensor_file

from .folder import folder, present, weights

HERE = folder("t5_vae_flax")
FILES = present(HERE, sorted(HERE.glob("*/flax_model.msgpack")))


def read(path: Path, specs) -> dict[str, np.ndarray]:
    with open(path, "rb", buffering=0) as file:
        return {name: tensor_file.read_tensor(file, spec) for name, spec in specs.items()}


def expected(path: Path) -> dict[str, np.ndarray]:
    dtype = jnp.bfloat16 if path.parent.name.endswith("bf16") else jnp.float32
    return {name: x.astype(dtype) for name, x in weights(HERE, "weights").items()}


@pytest.fixture(params=FILES)
def path(request):
    return request.param


def test_golden_t5_vae_files_hold_exactly_the_arrays(path):
    specs, metadata = read_header(path)
    found, wanted = read(path, specs), expected(path)
    assert metadata == {} and sorted(found) == sorted(wanted)
    for name, x in found.items():
        y = wanted[name]
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes()), name


def test_golden_t5_vae_files_kernels_are_turned_and_nothing_else(path):
    found, wanted = read(path, turned(read_header(path)[0])), expected(path)
    for name, x in found.items():
        y = wanted[name].T if name.endswith("/kernel") else wanted[name]
        assert x.shape == y.shape and np.array_equal(x, y), name
