"""Devices with named axes, and processes that have theirs in common."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

AnyMesh = Mesh | AbstractMesh
TIMEOUT = 300


def make_mesh(axes: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (of all processes), or those given, as a mesh: `"data=2,model=4"`, or a mapping of sizes.

    One size may be -1: what the others leave. The axes are of type Auto, so that the compiler decides how an operation
    is spread. Neighbouring devices are neighbours along the last axis: put the one that talks most there, "model".

    Raises a `ValueError` for text of another form, sizes below 1, and sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes(_parsed(axes, len(devices)) if isinstance(axes, str) else list(axes.items()), axes, len(devices))
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def start_processes(
    coordinator: str, processes: int | None = None, process: int | None = None, *, timeout: int = TIMEOUT
) -> None:
    """This process as number `process` of `processes`, which then see each other's devices: `jax.distributed`.

    `coordinator` is `host:port` of process 0, the same text everywhere; "auto" lets JAX ask the cluster it runs on
    (Slurm, Open MPI, Kubernetes, TPUs). On CPUs, processes exchange numbers through gloo. Call it before anything that
    asks for devices. After `timeout` seconds without the others JAX ends the process, with a message.

    Raises a `ValueError` where the three do not fit together.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator == "auto":
        jax.distributed.initialize(initialization_timeout=timeout)
        return
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit()):
        raise ValueError(f'coordinator = {coordinator!r} must be "host:port" of process 0, or "auto" on a cluster.')
    if processes is None or process is None or not 0 <= process < processes:
        raise ValueError(
            f"This is process {process} of {processes}, but with a coordinator both must be said: how many processes"
            " there are, the same number in each, and which of them this is, counted from 0."
        )
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout)


def expect_devices(mesh: Mesh) -> None:
    """Raises a `TypeError` for what is no mesh of devices, an abstract one say, and as `expect_auto` does."""
    expect_auto(mesh)
    if not isinstance(mesh, Mesh):
        raise TypeError(f"Arrays need devices to lie on, which {mesh!r} has not: make_mesh makes a mesh of them.")


def expect_auto(mesh: AnyMesh) -> None:
    """Raises a `TypeError` for what is no mesh, and a `ValueError` for axes of another type than Auto."""
    if not isinstance(mesh, AnyMesh):
        raise TypeError(f'A mesh of devices is needed, such as make_mesh("data=-1"), not {mesh!r}.')
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if other := {name: kind for name, kind in kinds.items() if kind != AxisType.Auto}:
        said = ", ".join(f"{name} is {kind.name}" for name, kind in other.items())
        raise ValueError(
            f"The axes of this mesh must be of type Auto, but {said}. On such an axis every operation of a model would"
            " have to say where its result lies; these models leave that to the compiler. jax.make_mesh makes Explicit"
            f' axes unless it is told: make_mesh("{spelled(mesh)}"), or axis_types=(AxisType.Auto,) * {len(kinds)}.'
        )


def spelled(mesh: AnyMesh) -> str:
    """`data=2,model=4`"""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def _parsed(text: str, count: int) -> list[tuple[str, Any]]:
    pairs = []
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        number = size.removeprefix("-")
        if not (number.isascii() and number.isdigit()):
            _fail(text, count, f"{part.strip()!r} is not name=size")
        pairs.append((name, int(size)))
    return pairs


def _sizes(pairs: Sequence[tuple[str, Any]], given: Any, count: int) -> dict[str, int]:
    for name, size in pairs:
        if not (isinstance(name, str) and name.isidentifier()):
            _fail(given, count, f"{name!r} is no name of an axis")
        if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size >= 1):
            _fail(given, count, f"{name}={size} must be at least 1, or -1 for what the others leave")
    sizes = dict(pairs)
    if len(sizes) < len(pairs) or not sizes:
        _fail(given, count, "every axis has a name of its own, and there must be one")
    if sum(size == -1 for size in sizes.values()) > 1:
        _fail(given, count, "one axis at most may be -1")
    return _filled(sizes, given, count)


def _filled(sizes: dict[str, int], given: Any, count: int) -> dict[str, int]:
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and count % known == 0:
        return {name: count // known if size == -1 else size for name, size in sizes.items()}
    if known != count or -1 in sizes.values():
        product = "x".join(str(size) for size in sizes.values() if size != -1)
        said = f"{product} = {known}" if "x" in product else product
        wrong = "does not divide their number" if -1 in sizes.values() else "is not their number"
        _fail(given, count, f"{said} {wrong}")
    return sizes


def _fail(given: Any, count: int, why: str) -> NoReturn:
    example = f"data={count // 2},model=2" if count % 2 == 0 else f"data={count}"
    raise ValueError(
        f"{given if isinstance(given, str) else dict(given)!r} is no mesh of the {count} devices here: {why}. The sizes"
        f' multiply to {count}, as in "{example}" or "data=-1"; `devices` takes some of them alone.'
    )
