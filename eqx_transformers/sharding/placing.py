"""Arrays put where rules say, and batches divided among devices."""

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from ..surgery.paths import spell
from ..surgery.patterns import Pattern, parse
from .mesh import expect_devices, spelled
from .rules import DATA, as_rules, expect_axes
from .specs import decide, place_of, specs

Tree = TypeVar("Tree")


def shard(model: Tree, mesh: Mesh, rules: Any) -> Tree:
    """The model with every array where `specs` says; typed keys and what is no array are untouched.

    Numbers do not change. What lies there already is not copied; an optimizer's state that is made from it lies as it
    does. In several processes each must hold the same model: its checksums are compared. A skeleton's shapes get their
    `sharding`. Raises as `specs` does, and a `ValueError` where the models of
    processes differ.
    """
    expect_devices(mesh)
    places = specs(model, mesh, rules)
    if jax.process_count() > 1:
        _expect_same(model, places)
    put = lambda x, spec: x if spec is None else _put(x, NamedSharding(mesh, spec))
    return jax.tree.map(put, model, places)


def placement(mesh: Mesh, rules: Any) -> Callable[[str, jax.ShapeDtypeStruct], NamedSharding]:
    """Where each array of a checkpoint is to lie, for `converters.load(directory, sharding=placement(mesh, rules))`.

    It is told paths one by one, and cannot know that a pattern fits none of them: `report` of what was loaded does.
    Raises a `ValueError` for patterns that count from the end (`[-1]`), and otherwise as `specs` does.
    """
    expect_devices(mesh)
    rules = as_rules(rules)
    expect_axes(rules, mesh)
    patterns = [(rule, parse(rule.pattern)) for rule in rules.rules]
    for _, pattern in patterns:
        _expect_from_start(pattern)

    def place(path: str, like: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, decide(place_of(path), tuple(like.shape), patterns, rules.spread, mesh).spec)

    return place


def shard_batch(batch: Tree, mesh: Mesh, axis: str | tuple[str, ...] = DATA) -> Tree:
    """The batch with the rows of its arrays, their first axis, divided along `axis` of the mesh.

    In several processes each passes the rows of its own devices, as many as the others, and gets the arrays of all
    rows; processes whose devices share rows (the mesh has other axes that reach across them) pass the same ones.

    Raises a `ValueError` where the rows of this process do not divide among its devices, for an array without rows, and
    for an axis that the mesh has not.
    """
    expect_devices(mesh)
    axes = (axis,) if isinstance(axis, str) else axis
    if unknown := [name for name in axes if name not in mesh.axis_names]:
        raise ValueError(
            f"The rows of a batch are divided along {unknown[0]!r}, but the axes of this mesh are {spelled(mesh)}:"
            f' make_mesh("{unknown[0]}=1,{spelled(mesh)}") has the rows on every device; `axis` names another.'
        )
    sharding, parts = NamedSharding(mesh, P(axes)), _parts_here(mesh, axes)

    def put(path: Any, x: Any) -> Any:
        _expect_rows(spell(path), np.shape(x), parts)
        # What is global already stays so: its rows are of all processes.
        is_global = isinstance(x, jax.Array) and not x.is_fully_addressable
        if is_global or jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree_util.tree_map_with_path(put, batch)


def row_share(mesh: Mesh | None, axis: str = DATA) -> tuple[int, int]:
    """(which share of a batch's rows this process passes to `shard_batch`, how many shares there are).

    Processes whose devices have the same places along `axis` pass the same share. Without a mesh there is one. Raises a
    `ValueError` for an axis that the mesh has not, and where the places of two processes overlap and are not the same.
    """
    if mesh is None:
        return 0, 1
    if axis not in mesh.axis_names:
        raise ValueError(
            f"The rows of a batch are divided along {axis!r}, but the axes of the mesh are {spelled(mesh)}."
        )
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return _share(np.moveaxis(processes, mesh.axis_names.index(axis), 0), jax.process_index())


def _share(processes: np.ndarray, process: int) -> tuple[int, int]:
    """Of processes by their devices' places, the axis of the rows in front."""
    rows = processes.reshape(len(processes), -1)
    places = {i: tuple(np.flatnonzero((rows == i).any(1)).tolist()) for i in np.unique(rows).tolist()}
    shares = sorted(set(places.values()))
    if sum(map(len, shares)) != len(rows):
        raise ValueError(
            f"Of this mesh's rows, processes have the places {places}: two must have the same ones or none in common."
        )
    return shares.index(places[process]), len(shares)


def _put(x: Any, sharding: NamedSharding) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    if _is_local(x) and not sharding.is_fully_addressable:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return jax.device_put(x, sharding)


def _is_local(x: Any) -> bool:
    """Whether it is an array that this process holds alone: not the shape of one, nor one of all processes."""
    return isinstance(x, np.ndarray) or (isinstance(x, jax.Array) and x.is_fully_addressable)


def _expect_same(model: Any, places: Any) -> None:
    """Raises, in all processes, where what they hold differs: each would put its own numbers on its devices."""
    local = lambda x, spec: x if spec is not None and _is_local(x) else None
    digest = 0
    for path, x in jax.tree_util.tree_leaves_with_path(jax.tree.map(local, model, places)):
        host = np.ascontiguousarray(x)
        digest = zlib.crc32(f"{spell(path)} {host.shape} {host.dtype}".encode(), digest)
        digest = zlib.crc32(host.tobytes(), digest)
    digests = np.ravel(multihost_utils.process_allgather(np.array([digest], np.uint32)))
    if (other := np.flatnonzero(digests != digests[0])).size:
        raise ValueError(
            f"The processes hold different models: that of process {other[0]} is not that of process 0. Make it from"
            " the same key, or load the same file, in each."
        )


def _parts_here(mesh: Mesh, axes: tuple[str, ...]) -> int:
    """Among how many parts the rows of this process are divided."""
    order = [mesh.axis_names.index(name) for name in axes]
    here = jax.process_index()
    return len({tuple(at[i] for i in order) for at, d in np.ndenumerate(mesh.devices) if d.process_index == here})


def _expect_rows(path: str, shape: tuple[int, ...], parts: int) -> None:
    name = path or "The array"
    if not shape:
        raise ValueError(f"{name} is one number, but every array of a batch has rows as its first axis.")
    if shape[0] % parts:
        raise ValueError(
            f"{name} has {shape[0]} rows, which do not divide among {parts} parts of the mesh: take a batch size"
            f" that is a multiple of {parts}, and fill the last batch up with rows of weight 0."
        )


def _expect_from_start(pattern: Pattern) -> None:
    ends = [x for step in pattern.steps if step.indices for x in (step.indices.start, step.indices.stop)]
    if any(x is not None and x < 0 for x in ends):
        raise ValueError(
            f"{pattern.text!r} counts from the end of a sequence, whose length a path does not tell: count from the"
            " start, or load the model and shard it."
        )
