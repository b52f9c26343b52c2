"""How fast is a checkpoint loaded, and with how much memory, against other readers of the same file?

`python -m benchmarks.load` writes a RoBERTa checkpoint of about 500 MB with random weights and loads it by each reader
in a process of its own, in turns, with the file in the page cache. Seconds are those from the start of the load until
every array is there: imports and the start of the backend are before it. `np.fromfile` of the whole file into fresh
memory is the yardstick. Peak anonymous memory (RssAnon, sampled every millisecond, less what was there before) is
taken in processes of its own too, so that sampling disturbs no time.
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

WEIGHTS = "model.safetensors"
SPEED, MEMORY = 0.60, 1.15  # promised: of fromfile's speed, of the model's bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="A checkpoint of 500 MB loaded by several readers.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=6, help="of RoBERTa-large's, 50 MB each, beside 206 MB")
    parser.add_argument("--child", nargs=3, metavar=("READER", "DIRECTORY", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child)))
        return
    with tempfile.TemporaryDirectory() as directory:
        size = write(Path(directory), args.layers)
        seconds = {name: [] for name in READERS}
        for i in range(args.rounds + 1):
            for name in READERS:
                spent = measure(name, directory, "seconds")
                seconds[name] += [spent] if i else []  # the first round fills the page cache
        memory = {name: [measure(name, directory, "memory") for _ in range(2)] for name in READERS}
    report(size, seconds, memory)


def report(size: int, seconds: dict[str, list[Any]], memory: dict[str, list[Any]]) -> None:
    print(f"{WEIGHTS}: {size / 1e6:.0f} MB; {machine()}, {versions()}")
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


def write(directory: Path, layers: int) -> int:
    """A Hugging Face directory of RoBERTa-large's widths; the size of its weights."""
    import jax

    import converters
    from eqx_transformers import ROBERTA, Encoder

    config = dataclasses.replace(ROBERTA, embed_dim=1024, num_heads=16, mlp_dim=4096, num_layers=layers)
    converters.export(Encoder(config, key=jax.random.key(0)), directory)
    return (directory / WEIGHTS).stat().st_size


def measure(reader: str, directory: str, what: str) -> Any:
    """What a fresh process says: seconds, bytes, or why it could not run."""
    command = [sys.executable, "-m", "benchmarks.load", "--child", reader, directory, what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def child(reader: str, directory: str, what: str) -> float:
    load = READERS[reader](Path(directory))
    touch(2 * (Path(directory) / WEIGHTS).stat().st_size)
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


def fromfile(directory: Path) -> Load:
    import numpy as np

    return lambda: np.fromfile(directory / WEIGHTS, np.uint8)


def ours(directory: Path) -> Load:
    import equinox as eqx

    import converters

    jax = started_jax()
    return lambda: jax.block_until_ready(eqx.filter(converters.load(directory)[0], eqx.is_array))


def safetensors_flax(directory: Path) -> Load:
    from safetensors.flax import load_file

    jax = started_jax()
    return lambda: jax.block_until_ready(load_file(directory / WEIGHTS))


def safetensors_torch(directory: Path) -> Load:
    from safetensors.torch import load_file

    started_torch()
    return lambda: load_file(directory / WEIGHTS)


def safetensors_torch_owned(directory: Path) -> Load:
    """The one above maps the file and reads nothing until a tensor is used; here each gets memory of its own."""
    load = safetensors_torch(directory)
    return lambda: {name: x.clone() for name, x in load().items()}


def transformers_torch(directory: Path) -> Load:
    import transformers

    started_torch()
    transformers.logging.disable_progress_bar()
    read = transformers.RobertaModel.from_pretrained  # the attribute imports the model's file
    return lambda: read(directory)


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


READERS: dict[str, Callable[[Path], Load]] = {
    "fromfile": fromfile,
    "ours": ours,
    "safetensors.flax": safetensors_flax,
    "safetensors.torch": safetensors_torch,
    "safetensors.torch, cloned": safetensors_torch_owned,
    "transformers": transformers_torch,
}


if __name__ == "__main__":
    main()
