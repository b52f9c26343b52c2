"""A child's program: training on eight devices against training on one of them, a line of JSON for each case.

python -m tests.sharded_training CASE…
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import optax

import converters
from eqx_transformers import (
    LLAMA,
    ROBERTA,
    T5,
    T5_V1_1,
    CausalLM,
    GPT2Config,
    SequenceClassifier,
    select,
    sharding,
    stack,
)
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery import adapter_mask, add_adapter, leaves_by_path, quantize, spell
from eqx_transformers.training.objectives import (
    classification_loss,
    language_model_loss,
    sequence_to_sequence_loss,
)
from eqx_transformers.training.updater import Updater, compiled

STEPS, ROWS, SEQ = 4, 8, 16
SEED = 3  # no key yet: what asks for devices comes after `start_processes`
# What eight devices divide exactly; and what they do not.
SIZES: dict[str, Any] = {"vocab_size": 64, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48}
ODD: dict[str, Any] = {"vocab_size": 61, "embed_dim": 28, "num_layers": 2, "num_heads": 4, "mlp_dim": 37}
HALVES = {"num_decoder_layers": 2, "num_buckets": 8, "max_distance": 7, "head_dim": 8, "dropout": 0.0}


def adapted() -> Any:
    """Adapters on a stacked classifier of whole numbers."""
    model = quantize(classifier(), select("Linear", under="**.blocks") | select("Embedding", under="**.tokens"))
    return stack(add_adapter(model, select("Quantized", under="**.blocks"), rank=8, key=jax.random.key(SEED)))


def classifier(stacked: bool = False) -> Any:
    return made(SequenceClassifier, replace(ROBERTA, **SIZES, max_positions=32, labels=8), stacked)


def made(head: Any, config: Any, stacked: bool = False) -> Any:
    """Random numbers in every array, drawn without compiling anything."""
    rng = np.random.default_rng(SEED)

    def draw(path: Any, x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        gain = spell(path).endswith("norm.weight")
        return jax.device_put((gain + 0.2 * rng.normal(size=x.shape)).astype(np.float32))

    return jax.tree_util.tree_map_with_path(draw, skeleton(head, config, stacked))


class Model(NamedTuple):
    make: Callable[[], Any]
    loss: Callable[..., Any]
    trains: Any = None


MODELS = {
    "roberta": Model(lambda: classifier(stacked=True), classification_loss),
    "gpt2": Model(lambda: made(CausalLM, GPT2Config(**SIZES, max_positions=32), True), language_model_loss),
    "llama": Model(
        lambda: made(CausalLM, replace(LLAMA, **SIZES, num_kv_heads=4, head_dim=8, attention_dropout=0.1)),
        language_model_loss,
    ),
    "t5": Model(lambda: made(T5, replace(T5_V1_1, **SIZES, **HALVES), True), sequence_to_sequence_loss),
    # Two key heads on four devices, and sizes that they do not divide.
    "odd": Model(lambda: made(CausalLM, replace(LLAMA, **ODD, num_kv_heads=2, head_dim=6)), language_model_loss),
    "adapted": Model(adapted, classification_loss, adapter_mask),
}
WAYS: dict[str, tuple[str, sharding.Rules]] = {
    "data": ("data=8", sharding.DATA_PARALLEL),
    "full": ("data=8", sharding.FULLY_SHARDED),
    "tensor": ("data=1,model=8", sharding.TENSOR_PARALLEL),
    "mixed": ("data=2,model=4", sharding.TENSOR_PARALLEL),
    "both": ("data=2,model=4", sharding.FULLY_SHARDED | sharding.TENSOR_PARALLEL),
}


def batches(count: int = STEPS) -> list[dict[str, np.ndarray]]:
    """Of any model: rows of unlike length, ids that none reads as padding, and one row that does not count."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, SEQ + 1, (count, ROWS, 1))
    ids = rng.integers(3, 60, (count, ROWS, SEQ), dtype=np.int32)
    mask = (np.arange(SEQ) < lengths).astype(np.int32)
    weights = np.ones((count, ROWS), np.float32)
    weights[:, -1] = 0
    labels = rng.integers(0, 8, (count, ROWS), dtype=np.int32)
    every = {"token_ids": ids, "attention_mask": mask, "targets": ids[..., ::-1].copy(), "labels": labels}
    return [{name: x[i] for name, x in (every | {"weights": weights}).items()} for i in range(count)]


def losses(model: Any, name: str, put: Callable[[Any], Any], key: Any = None) -> tuple[list[float], Any]:
    """Of every step, dropout on, and the state after the last one."""
    key = jax.random.key(9) if key is None else key
    # With the usual eps of 1e-8, Adam makes whole steps of the few gradients that are nothing but rounding, whose sign
    # depends on the order of sums: T5's losses then differ by 6e-5, with an eps of 1e-5 by 1e-5, with 1e-3 by 2e-6.
    optimizer = optax.adamw(3e-3, eps=1e-3)
    updater = Updater(MODELS[name].loss, optimizer, trains=MODELS[name].trains, clip_norm=1.0)
    state, step, found = updater.init(model, key=key), compiled(updater), []
    for batch in batches():
        state, metrics = step(state, put(batch))
        found.append(float(metrics["loss"]))
    return found, state


def bytes_per_device(tree: Any) -> list[int]:
    """What each device of this process really holds."""
    held: dict[int, int] = dict.fromkeys((d.id for d in jax.local_devices()), 0)
    for x in filter(eqx.is_array, jax.tree.leaves(tree)):
        if not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            for part in x.addressable_shards:
                held[part.device.id] += part.data.nbytes
    return list(held.values())


def as_said(model: Any, mesh: Any, rules: Any) -> list[str]:
    """The arrays that do not lie where they should."""
    said, arrays = leaves_by_path(sharding.specs(model, mesh, rules)), leaves_by_path(model)
    at = {path: jax.NamedSharding(mesh, spec) for path, spec in said.items()}
    return [path for path, place in at.items() if not arrays[path].sharding.is_equivalent_to(place, arrays[path].ndim)]


def trained(name: str, way: str) -> dict[str, Any]:
    text, rules = WAYS[way]
    mesh = sharding.make_mesh(text)
    model = sharding.shard(MODELS[name].make(), mesh, rules)
    found, state = losses(model, name, lambda batch: sharding.shard_batch(batch, mesh))
    moments = [x for x in jax.tree.leaves(state.optimizer_state) if eqx.is_array(x) and x.ndim]
    whole = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree) if eqx.is_array(x))
    return {
        "losses": found,
        "misplaced": as_said(state.model, mesh, rules) + as_said(state.optimizer_state, mesh, _lenient(rules)),
        "held": bytes_per_device(state.model),
        "whole": whole(model),
        "reported": sharding.report(model, mesh, rules).bytes_per_device,
        "moments": bytes_per_device(moments),
        "moments_whole": whole(moments),
    }


def loaded(way: str) -> dict[str, Any]:
    """A checkpoint read by its parts, and what it has of the model that was written."""
    text, rules = WAYS[way]
    mesh, model = sharding.make_mesh(text), classifier()
    with tempfile.TemporaryDirectory() as directory:
        converters.export(model, directory)
        got = converters.load(directory, sharding=sharding.placement(mesh, rules), stacked=True)[0]
    pairs = zip(jax.tree.leaves(stack(model)), jax.tree.leaves(got), strict=True)
    return {
        "misplaced": as_said(got, mesh, rules),
        "same": all(np.array_equal(a, b) for a, b in pairs if eqx.is_array(a)),
        "held": bytes_per_device(got),
        "reported": sharding.report(stack(model), mesh, rules).bytes_per_device,
    }


def collectives(name: str) -> dict[str, Any]:
    """What devices say to each other in a forward pass whose layers are divided: names of operations, and how often."""
    text, rules = WAYS["mixed"]
    mesh, model = sharding.make_mesh(text), MODELS[name].make()
    ids = np.full((ROWS, SEQ), 7, np.int32)
    args = (ids, ids) if name == "t5" else (ids,)
    run = eqx.filter_jit(lambda model, *args: jax.vmap(model)(*args))
    program = run.lower(sharding.shard(model, mesh, rules), *sharding.shard_batch(args, mesh)).compile().compiled
    words = program.as_text().split()
    kinds = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce")
    return {kind: sum(word.startswith((f"{kind}(", f"{kind}-start(")) for word in words) for kind in kinds}


def refused(rows: int) -> dict[str, Any]:
    """What is said of a batch of so many rows."""
    try:
        sharding.shard_batch({"token_ids": np.zeros((rows, 3), np.int32)}, sharding.make_mesh("data=4,model=2"))
    except ValueError as error:
        return {"said": str(error)}
    return {"said": ""}


def _lenient(rules: sharding.Rules) -> sharding.Rules:
    """For an optimizer's state, where there may be nothing at a path."""
    return replace(rules, rules=tuple(replace(rule, optional=True) for rule in rules.rules))


def main(cases: list[str]) -> None:
    """`one/MODEL`: on one device. `WAY/MODEL`, `load/WAY`, `collectives/MODEL`, `rows/NUMBER`."""
    for kind, name in (case.split("/") for case in cases):
        if kind == "one":
            found: Any = {"losses": losses(MODELS[name].make(), name, lambda batch: batch)[0]}
        elif kind == "load":
            found = loaded(name)
        elif kind == "rows":
            found = refused(int(name))
        else:
            found = collectives(name) if kind == "collectives" else trained(name, kind)
        print(json.dumps({"case": f"{kind}/{name}"} | found), flush=True)


if __name__ == "__main__":
    assert jax.device_count() == 8, os.environ.get("XLA_FLAGS")
    main(sys.argv[1:])
