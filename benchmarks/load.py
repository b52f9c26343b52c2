"""How fast is a checkpoint loaded, and with how much memory, against other readers of the same file?

`python -m benchmarks.load` writes a RoBERTa checkpoint of about 500 MB with random weights in every container, and
loads each by every reader of it in a process of its own, in turns, with the file in the page cache. Seconds are those
from the start of the load until every array is there: imports and the start of the backend are before it.
`np.fromfile` of the whole file into fresh memory is the yardstick. Peak anonymous memory (RssAnon, sampled every
millisecond, less what was there before) is taken in processes of its own too, so that sampling disturbs no time.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .timing import machine, table

WEIGHTS = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin", "flax": "flax_model.msgpack"}
SPEED, MEMORY = 0.60, 1.15  # promised: of fromfile's speed, of the model's bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="A checkpoint of 500 MB loaded by several readers.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=6, help="of RoBERTa-large's, 50 MB each, beside 206 MB")
    parser.add_argument("--only", choices=list(WEIGHTS), help="this container alone")
    parser.add_argument(
        "--child", nargs=4, metavar=("CONTAINER", "READER", "DIRECTORY", "WHAT"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child)))
        return
    print(f"{machine()}, {versions()}")
    for container in [args.only] if args.only else WEIGHTS:
        compare(container, args.rounds, args.layers)


def compare(container: str, rounds: int, layers: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        run("write", container, directory, str(layers))
        size = (Path(directory) / WEIGHTS[container]).stat().st_size
        names = list(READERS[container])
        seconds = {name: [] for name in names}
        for i in range(rounds + 1):
            for name in names:
                spent = run(container, name, directory, "seconds")
                seconds[name] += [spent] if i else []  # the first round fills the page cache
        memory = {name: [run(container, name, directory, "memory") for _ in range(2)] for name in names}
    report(WEIGHTS[container], size, seconds, memory)


def report(title: str, size: int, seconds: dict[str, list[Any]], memory: dict[str, list[Any]]) -> None:
    print(f"\n{title}: {size / 1e6:.0f} MB")
    failed = {name: spent[0] for name, spent in seconds.items() if isinstance(spent[0], str)}
    median = {name: statistics.median(spent) for name, spent in seconds.items() if name not in failed}
    anonymous = {name: statistics.median(memory[name]) / size for name in median}
    ratio = lambda name: median["fromfile"] / median[name]
    row = lambda name: [
        name,
        f"{median[name]:.3f}",
        f"{size / median[name] / 1e9:.2f}",
        f"{ratio(name):.2f}",
        f"{anonymous[name]:.2f}",
    ]
    print(table(["", "seconds", "GB/s", "fromfile / it", "RssAnon / bytes"], [row(name) for name in median]))
    for name, why in failed.items():
        print(f"{name} did not run: {why}")
    verdict = lambda kept: "PASS" if kept else "FAIL"
    print(f"{verdict(ratio('ours') >= SPEED)}: ours loads at {ratio('ours'):.2f} of fromfile's speed (>= {SPEED:.2f})")
    print(f"{verdict(anonymous['ours'] <= MEMORY)}: ours takes {anonymous['ours']:.2f} of the bytes (<= {MEMORY:.2f})")


def run(*what: str) -> Any:
    """What a fresh process says: seconds, bytes, or why it could not run."""
    command = [sys.executable, "-m", "benchmarks.load", "--child", *what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def child(container: str, reader: str, directory: str, what: str) -> float | None:
    if container == "write":
        return write(reader, Path(directory), int(what))
    path = Path(directory) / WEIGHTS[container]
    load = READERS[container][reader](path)
    touch(2 * path.stat().st_size)
    if what == "seconds":
        begin = time.perf_counter()
        kept = load()
        spent = time.perf_counter() - begin
        del kept
        return spent
    before, peak, loaded = rss_anon(), [0], threading.Event()

    def sample() -> None:
        while not loaded.wait(0.001):
            peak[0] = max(peak[0], rss_anon())

    sampler = threading.Thread(target=sample)
    sampler.start()
    kept = load()
    peak[0] = max(peak[0], rss_anon())
    loaded.set()
    sampler.join()
    del kept
    return peak[0] - before


def touch(size: int) -> None:
    """Uses memory and gives it back: a virtual machine gets it from its host at the first touch, at ten times the cost
    of the load, and keeps it for a while."""
    import numpy as np

    np.empty(size, np.uint8).fill(1)


def rss_anon() -> int:
    """Bytes of this process's memory that no file stands behind."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


Load = Callable[[], Any]  # what it returns is kept until the clock has stopped


def write(container: str, directory: Path, layers: int) -> None:
    """A directory of RoBERTa-large's widths, its weights in this container."""
    import jax
    from safetensors.numpy import load_file

    import converters
    from eqx_transformers import ROBERTA, Encoder

    config = dataclasses.replace(ROBERTA, embed_dim=1024, num_heads=16, mlp_dim=4096, num_layers=layers)
    converters.export(Encoder(config, key=jax.random.key(0)), directory)
    if container == "safetensors":
        return
    held = load_file(directory / "model.safetensors")
    (directory / "peer").mkdir()
    (directory / "model.safetensors").rename(directory / "peer" / "model.safetensors")
    if container == "torch":
        import torch

        torch.save({key: torch.from_numpy(x) for key, x in held.items()}, directory / WEIGHTS[container])
    else:
        write_flax(directory / WEIGHTS[container], held)


def write_flax(path: Path, held: dict[str, Any]) -> None:
    """As flax.serialization does: maps of maps, and arrays as an extension that holds shape, dtype and bytes."""
    text = lambda s: b"\xd9" + bytes([len(s)]) + s.encode()
    many = lambda n: n.to_bytes(4, "big")

    def array(x: Any) -> bytes:
        shape = bytes([0x90 + x.ndim]) + b"".join(b"\xce" + many(n) for n in x.shape)
        held = b"\x93" + shape + text(x.dtype.name) + b"\xc6" + many(x.nbytes) + x.tobytes()
        return b"\xc9" + many(len(held)) + b"\x01" + held

    def put(tree: dict[str, Any]) -> None:
        file.write(b"\xdf" + many(len(tree)))
        for name, value in tree.items():
            file.write(text(name))
            put(value) if isinstance(value, dict) else file.write(array(value))

    tree: dict[str, Any] = {}
    for key, x in held.items():
        *modules, last = key.split(".")
        if last == "weight":
            last = "embedding" if "_embeddings" in modules[-1] else "kernel" if x.ndim == 2 else "scale"
        inner = tree
        for name in modules:
            inner = inner.setdefault(name, {})
        inner[last] = x.T if last == "kernel" else x
    with open(path, "wb") as file:
        put(tree)


Load = Callable[[], Any]  # what it returns is kept until the clock has stopped


def fromfile(path: Path) -> Load:
    import numpy as np

    return lambda: np.fromfile(path, np.uint8)


def ours(path: Path) -> Load:
    import equinox as eqx

    import converters

    jax = started_jax()
    return lambda: jax.block_until_ready(eqx.filter(converters.load(path.parent)[0], eqx.is_array))


def safetensors_flax(path: Path) -> Load:
    from safetensors.flax import load_file

    jax = started_jax()
    return lambda: jax.block_until_ready(load_file(path))


def safetensors_flax_beside(path: Path) -> Load:
    """Of the same tensors in a safetensors file: the nearest that JAX has to a reader of the other containers."""
    return safetensors_flax(path.parent / "peer" / "model.safetensors")


def safetensors_torch(path: Path) -> Load:
    from safetensors.torch import load_file

    started_torch()
    return lambda: load_file(path)


def safetensors_torch_owned(path: Path) -> Load:
    """The one above maps the file and reads nothing until a tensor is used; here each gets memory of its own."""
    load = safetensors_torch(path)
    return lambda: {name: x.clone() for name, x in load().items()}


def torch_load(path: Path) -> Load:
    import torch

    started_torch()
    return lambda: torch.load(path, weights_only=True)


def transformers_torch(path: Path) -> Load:
    import transformers

    started_torch()
    transformers.logging.disable_progress_bar()
    read = transformers.RobertaModel.from_pretrained  # the attribute imports the model's file
    return lambda: read(path.parent)


def started_jax() -> Any:
    import jax
    import jax.numpy as jnp

    jax.block_until_ready(jnp.zeros(3) + 1)
    return jax


def started_torch() -> None:
    import torch

    torch.zeros(3).add(1)


def versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("safetensors", "torch", "transformers"))


READERS: dict[str, dict[str, Callable[[Path], Load]]] = {
    "safetensors": {
        "fromfile": fromfile,
        "ours": ours,
        "safetensors.flax": safetensors_flax,
        "safetensors.torch": safetensors_torch,
        "safetensors.torch, cloned": safetensors_torch_owned,
        "transformers": transformers_torch,
    },
    "torch": {
        "fromfile": fromfile,
        "ours": ours,
        "safetensors.flax, of the same as safetensors": safetensors_flax_beside,
        "torch.load": torch_load,
        "transformers": transformers_torch,
    },
    "flax": {
        "fromfile": fromfile,
        "ours": ours,
        "safetensors.flax, of the same as safetensors": safetensors_flax_beside,
    },
}


if __name__ == "__main__":
    main()
