"""A child's program: one of several processes that train a model together, each on two devices of its own.

python -m tests.sharded_processes COORDINATOR PROCESSES PROCESS DIRECTORY
"""

import json
import sys

import equinox as eqx
import jax
import numpy as np

import converters
from eqx_transformers import sharding

from .sharded_training import MODELS, ROWS, as_said, bytes_per_device, classifier, losses

NAME = "gpt2"


def main(coordinator: str, processes: int, process: int, directory: str) -> None:
    sharding.start_processes(coordinator, processes, process, timeout=60)
    mesh, rules = sharding.make_mesh("data=-1,model=2"), sharding.FULLY_SHARDED | sharding.TENSOR_PARALLEL
    own = slice(process * ROWS // processes, (process + 1) * ROWS // processes)
    own_rows = lambda batch: sharding.shard_batch({name: x[own] for name, x in batch.items()}, mesh)
    model = sharding.shard(MODELS[NAME].make(), mesh, rules)
    found, state = losses(model, NAME, own_rows, jax.random.key(9))

    try:
        sharding.shard(jax.random.normal(jax.random.key(process), (4,)), mesh, sharding.DATA_PARALLEL)
        refused = ""
    except ValueError as error:
        refused = str(error)

    place, model = sharding.placement(mesh, rules), classifier()
    converters.export(model, directory)
    got = converters.load(directory, sharding=place)[0]
    parts = [(x, y) for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(model), strict=True) if eqx.is_array(x)]
    same = all(np.array_equal(part.data, np.asarray(y)[part.index]) for x, y in parts for part in x.addressable_shards)
    said = {
        "devices": jax.device_count(),
        "refused": refused,
        "losses": found,
        "misplaced": as_said(state.model, mesh, rules),
    }
    said |= {"held": bytes_per_device(state.model), "loaded": same, "loaded_held": bytes_per_device(got)}
    said |= {"reported": sharding.report(state.model, mesh, rules).bytes_per_device}
    print(json.dumps(said | {"loaded_reported": sharding.report(got, mesh, rules).bytes_per_device}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
