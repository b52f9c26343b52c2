"""What does a training step with LoRA cost, against the full step and against torch with PEFT?

`python -m benchmarks.lora`: a classifier of RoBERTa-base's shape with random weights (the same in torch), rank 8
on queries and values, the classifier trained whole, AdamW, float32, no dropout. *state* is the optimizer's. *memory* is
what the compiled step needs beside the model: temporaries, results that take no argument's place, and the state.
*products* is what the matrix products of the blocks' layers alone take, each of them compiled by itself: of a step with
LoRA those of the outputs and of the inputs' gradients, of the full step those of the matrices' gradients too.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eqx_transformers import SequenceClassifier, select
from eqx_transformers.surgery import LoRA, adapter_mask

from .reference import converted, quiet, version
from .timing import interleaved, machine, medians, seconds, table

RANK, RATE = 8, 1e-4


class Run(NamedTuple):
    """A training step that is repeated: `call` gives the loss; sizes in bytes."""

    call: Callable[[], Any]
    state: int
    memory: int | None
    compile_s: float
    trained: int


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA's training step against the full one and against PEFT's.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", default="8x128", metavar="BATCHxLENGTH")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    batch, length = map(int, args.size.split("x"))
    reference, model = twins(args.layers)
    ids, labels = examples(reference.config.vocab_size, batch, length)
    print(f"RoBERTa-base shape, {args.layers} layers, {args.size}, float32; {machine()}, torch {version()}")
    runs = {
        "ours full": ours(model, eqx.is_inexact_array, ids, labels),
        "ours LoRA": ours(*adapted(model), ids, labels),
        "torch full": theirs(reference, ids, labels),
        "torch LoRA": theirs(with_peft(reference), ids, labels),
    }
    firsts = {name: seconds(run.call) for name, run in runs.items()}
    floors = {name: products(model, batch, length, full=name == "full") for name in ("full", "LoRA")}
    calls = {name: run.call for name, run in runs.items()} | {f"products {name}": f for name, f in floors.items()}
    times = medians(interleaved(calls, args.rounds))
    print(table(["", "ms", "state MB", "memory MB", "trained", "compile s", "first s"], rows(runs, times, firsts)))
    over = lambda a, b: f"{times[a] / times[b]:.2f}"
    print(f"LoRA / full: ours {over('ours LoRA', 'ours full')}, torch {over('torch LoRA', 'torch full')}")
    print(f"torch / ours: full {over('torch full', 'ours full')}, LoRA {over('torch LoRA', 'ours LoRA')}")
    for name in floors:
        alone = f"products {name}"
        print(f"{alone}: {times[alone] * 1e3:.0f} ms; ours / products {over(f'ours {name}', alone)},", end=" ")
        print(f"torch / products {over(f'torch {name}', alone)}")


def rows(runs: dict[str, Run], times: dict[str, float], firsts: dict[str, float]) -> list[list[str]]:
    mega = lambda size: "" if size is None else f"{size / 1e6:.1f}"
    return [
        [
            name,
            f"{times[name] * 1e3:.0f}",
            mega(run.state),
            mega(run.memory),
            f"{run.trained:,}",
            f"{run.compile_s:.1f}",
            f"{firsts[name]:.1f}",
        ]
        for name, run in runs.items()
    ]


def twins(layers: int) -> tuple[Any, Any]:
    """transformers' classifier with random weights, and ours with the same."""
    transformers = quiet()
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    config = transformers.RobertaConfig(
        num_hidden_layers=layers, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2, **off
    )
    reference = transformers.RobertaForSequenceClassification(config).train()
    return reference, converted(reference)


def examples(vocab: int, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(3, vocab, (batch, length)), rng.integers(0, 2, batch)


def adapted(model: SequenceClassifier) -> tuple[SequenceClassifier, Any]:
    """With adapters, and which of its leaves train."""
    where = select("Linear", under="**.attention.{query,value}_proj")
    adapters = where.each(model, LoRA.adapter(RANK, 2 * RANK), key=jax.random.key(0))
    model = eqx.tree_at(where, model, adapters)
    return model, adapter_mask(model, also=select(under="head"))


def ours(model: Any, trains: Any, ids: np.ndarray, labels: np.ndarray) -> Run:
    """A step in which the trained leaves and the optimizer's state are donated."""
    trained, frozen = eqx.partition(model, trains)
    trained = jax.tree.map(jnp.array, trained)  # a copy, for it is donated
    optimizer = optax.adamw(RATE)
    state = optimizer.init(trained)

    def loss(trained: Any, frozen: Any, ids: Any, labels: Any) -> jax.Array:
        logits = jax.vmap(eqx.combine(trained, frozen))(ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @eqx.filter_jit(donate="all-except-first")
    def step(fixed: Any, trained: Any, state: Any) -> Any:
        value, slopes = eqx.filter_value_and_grad(loss)(trained, *fixed)
        updates, state = optimizer.update(slopes, state, trained)
        return value, eqx.apply_updates(trained, updates), state

    fixed = (frozen, jnp.asarray(ids), jnp.asarray(labels))
    box: list[Any] = []
    compile_s = seconds(lambda: box.append(step.lower(fixed, trained, state).compile()))
    held = [trained, state]
    size = bytes_of(state)

    def call() -> jax.Array:
        value, held[0], held[1] = box[0](fixed, *held)
        return value

    return Run(call, size, size + beside(box[0]), compile_s, count(trained))


def products(model: Any, batch: int, length: int, *, full: bool) -> Callable[[], Any]:
    """The products of a step's dense layers, one after another, each by itself."""
    layers = select("Linear", under="backbone.stack").get(model)
    widths = {n for layer in layers for n in layer.weight.shape}
    rng = np.random.default_rng(0)
    rows = {n: jnp.asarray(rng.standard_normal((batch, length, n), dtype=np.float32)) for n in widths}
    product = lambda a, b: jax.jit(lambda x, y: jax.lax.dot_general(x, y, ((a, b), ((), ()))))
    forward, backward, matrix = product((2,), (1,)), product((2,), (0,)), product((0, 1), (0, 1))

    def call() -> None:
        for weight in (layer.weight for layer in layers):
            outer, inner = (rows[n] for n in weight.shape)
            found = [forward(inner, weight), backward(outer, weight)]
            jax.block_until_ready([*found, matrix(outer, inner)] if full else found)

    return call


def beside(program: Any) -> int:
    """Bytes that a compiled step needs in addition to its arguments."""
    found = program.compiled.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def bytes_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if eqx.is_array(x))


def count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree) if eqx.is_array(x))


def with_peft(reference: Any) -> Any:
    import copy

    import peft

    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"], lora_dropout=0.0
    )
    return peft.get_peft_model(copy.deepcopy(reference), config)


def theirs(reference: Any, ids: np.ndarray, labels: np.ndarray) -> Run:
    import torch

    trained = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=1e-4)
    given = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        found = reference(**given).loss
        found.backward()
        optimizer.step()
        return float(found.detach())

    numbers = sum(p.numel() for p in trained)
    return Run(call, 8 * numbers, None, 0.0, numbers)


if __name__ == "__main__":
    main()
