"""Models and batches over many devices: a mesh, rules of where arrays lie, and JAX does the rest."""

from .mesh import make_mesh as make_mesh, start_processes as start_processes
from .placing import placement as placement, row_share as row_share, shard as shard, shard_batch as shard_batch
from .report import ShardedArray as ShardedArray, ShardingReport as ShardingReport, report as report
from .rules import (
    DATA_PARALLEL as DATA_PARALLEL,
    FULLY_SHARDED as FULLY_SHARDED,
    TENSOR_PARALLEL as TENSOR_PARALLEL,
    Rule as Rule,
    Rules as Rules,
    rules_for as rules_for,
)
from .specs import specs as specs
