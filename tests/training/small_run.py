"""A run that is small in every respect: a model with dropout, data with a position, an updater.

As a program it is the child that the tests of interruptions end: `python -m tests.training.small_run DIRECTORY STEPS`.
"""

import sys
import time
import zlib
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eqx_transformers.training.checkpoint import Checkpoints
from eqx_transformers.training.loop import Interrupted, fit
from eqx_transformers.training.updater import Updater

ROWS, WIDTH = 8, 5


class Model(eqx.Module):
    """Two layers with dropout between them."""

    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, width: int = WIDTH, *, key):
        first, last = jax.random.split(key)
        self.first = eqx.nn.Linear(width, 7, key=first)
        self.dropout = eqx.nn.Dropout(0.3)
        self.last = eqx.nn.Linear(7, "scalar", key=last)

    def __call__(self, x, *, key=None):
        return self.last(self.dropout(jnp.tanh(self.first(x)), key=key, inference=key is None))


def loss(model, batch, *, key=None):
    """The mean square of what is missed."""
    rows = batch["x"].shape[0]
    keys = None if key is None else jax.random.split(key, rows)
    found = jax.vmap(lambda x, key: model(x, key=key), in_axes=(0, None if key is None else 0))(batch["x"], keys)
    return jnp.square(found - batch["y"]).mean(), {"tokens": jnp.int32(rows)}


class Rows:
    """Batches of numbers that are a function of their position alone; `bad` ones are not finite."""

    def __init__(self, batches=10**9, bad=(), batch=None):
        self.batches, self.bad, self.at = batches, bad, 0

    def __iter__(self):
        return Rows(self.batches, self.bad)

    def __next__(self):
        if self.at >= self.batches:
            raise StopIteration
        x = np.random.default_rng(self.at).standard_normal((ROWS, WIDTH), np.float32)
        self.at += 1
        y = x.sum(1) + (np.float32(np.nan) if self.at in self.bad else np.float32(0))
        return {"x": x, "y": y}

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def make(rate=0.01, width=WIDTH, **settings):
    """(updater, state)."""
    updater = Updater(loss, optax.adamw(rate), **settings)
    return updater, updater.init(Model(width, key=jax.random.key(0)), key=jax.random.key(1))


def held_out(model):
    """The loss on rows that are not trained on."""
    x = np.random.default_rng(10**6).standard_normal((32, WIDTH), np.float32)
    return {"loss": float(loss(model, {"x": x, "y": x.sum(1)})[0])}


def digest(state):
    """One number of all bits of a state."""
    found = 0
    for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_array)):
        plain = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        found = zlib.crc32(np.ascontiguousarray(plain).tobytes(), found)
    return found


def slowly(batch):
    """So that who watches from outside can keep up."""
    time.sleep(0.03)
    return batch


def main(directory: Path, steps: int) -> None:
    """Trains, or goes on, and writes the digest of the last state."""
    updater, state = make()
    with Checkpoints(directory / "checkpoints", keep=2) as checkpoints:
        fitted = fit(
            updater,
            state,
            Rows(),
            steps=steps,
            evaluate=held_out,
            evaluate_every=7,
            checkpoints=checkpoints,
            checkpoint_every=1,
            log=directory / "log.jsonl",
            place=slowly,
        )
    (directory / "digest").write_text(str(digest(fitted.state)))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except Interrupted as error:
        sys.exit(128 + error.signal)
