"""How fast is a classifier fine-tuned, and how good does it get, against transformers and torch?

`python -m benchmarks.finetune --data DIR`, where DIR has `train.tsv` and `test.tsv` with columns `label` and `text`:
MiniLM, dropout on, AdamW (decay 0.01 but for biases and norms), a warm-up of 10 % and a linear decay, gradients clipped
at 1, float32, 2 epochs at batch 32 and rate 1e-4 unless other options are given. torch runs eagerly, its batches random
and padded to their longest text; ours are the batches of the recipe `classify`, with length buckets and with one length
for all. An epoch of each takes its turn, so that a slow moment of the machine meets all. Seconds are those of training:
ours without compiling, which is *compile s* and is done once a shape; test texts are evaluated beside the clock.
Freed memory is kept by the process, as in the recipes' commands; it is so for torch too.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from converters.demo import source
from eqx_transformers.training._memory import keep_freed
from eqx_transformers.training.loop import LAG
from eqx_transformers.training.objectives import classification_loss
from eqx_transformers.training.optimizers import adamw
from eqx_transformers.training.recipes import _labelled as data
from eqx_transformers.training.recipes._options import Settled
from eqx_transformers.training.recipes._tuned import peak, ready
from eqx_transformers.training.recipes.classify import Adapter, Options, Task, prepared
from eqx_transformers.training.schedules import warmup_linear
from eqx_transformers.training.text import Records
from eqx_transformers.training.updater import Updater, compiled

from .reference import quiet, version
from .timing import machine, table


class Run(NamedTuple):
    """A training run: `epoch()` trains one, `accuracy()` is on the test texts. Tokens with padding, and real."""

    epoch: Callable[[], None]
    accuracy: Callable[[], float]
    computed: int
    real: int
    compile_s: float
    shapes: int | None


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tuning a classifier, ours and torch's by turns.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="with train.tsv and test.tsv")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=int, metavar="N", help="of the texts, for a trial")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-shapes", type=int, default=8)
    parser.add_argument("--lora", type=int, metavar="RANK", help="adapters too, at the recipe's rate for them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_freed()
    records = {
        name: limited(data.read(args.data / f"{name}.tsv", text="text", label="label"), args.limit)
        for name in ("train", "test")
    }
    training = Settled(epochs=args.epochs, batch_size=args.batch_size, learning_rate=args.learning_rate, seed=args.seed)
    shape = f"MiniLM, {len(records['train'])} texts, {args.epochs} epochs, batch {args.batch_size}"
    print(f"{shape}; {machine()}, torch {version()}")
    runs = {
        "ours": ours(records, training, args.max_shapes),
        "ours, one length": ours(records, training, 1),
        "torch": theirs(records, training),
    }
    if args.lora is not None:
        slow = replace(training, learning_rate=peak(args.lora))
        runs = {"ours, LoRA": ours(records, slow, args.max_shapes, Adapter(args.lora)), **runs}
    report(runs, args.epochs)


def limited(records: Records, limit: int | None) -> Records:
    """The first texts; of a file sorted by label, that would be one class."""
    if limit is None or records.labels is None:
        return records
    cut: dict[str, Any] = {name: getattr(records, name)[:limit] for name in ("texts", "labels", "files", "lines")}
    return replace(records, **cut)


def report(runs: dict[str, Run], epochs: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in runs}
    accuracies: dict[str, list[float]] = {name: [] for name in runs}
    for epoch in range(epochs):
        for name, run in runs.items():
            begin = time.perf_counter()
            run.epoch()
            times[name].append(time.perf_counter() - begin)
            accuracies[name].append(run.accuracy())
            spent, found = times[name][-1], accuracies[name][-1]
            print(f"epoch {epoch + 1}, {name}: {spent:.1f} s, test accuracy {found:.3f}", flush=True)
    print(
        table(
            ["", "s/epoch", "tokens/s", "computed/real", "shapes", "compile s", "accuracy"],
            list(rows(runs, times, accuracies)),
        )
    )
    total = {name: sum(spent) for name, spent in times.items()}
    for name in list(runs)[:-1]:
        whole = total["torch"] / (total[name] + runs[name].compile_s)
        each = ", ".join(f"{a / b:.2f}" for a, b in zip(times["torch"], times[name], strict=True))
        print(f"torch / {name}: {total['torch'] / total[name]:.2f} (by epoch {each}); with compiling {whole:.2f}")


def rows(runs: dict[str, Run], times: dict[str, Any], accuracies: dict[str, Any]) -> Iterator[list[str]]:
    for name, run in runs.items():
        spent = sum(times[name]) / len(times[name])
        yield [
            name,
            f"{spent:.1f}",
            f"{run.real / spent:.0f}",
            f"{run.computed / run.real:.2f}",
            "" if run.shapes is None else str(run.shapes),
            f"{run.compile_s:.1f}",
            " ".join(f"{x:.3f}" for x in accuracies[name]),
        ]


def ours(records: dict[str, Records], training: Settled, max_shapes: int, lora: Adapter | None = None) -> Run:
    """The recipe's own model, batches and optimizer, without its checkpoints and its progress."""
    made = ready(source(), records["train"].names, training.seed, lora, (), {})
    task = prepared(records, made, training, Options(max_shapes=max_shapes))
    batches, steps = task.batches, training.total(task.batches.per_epoch, 1)
    rates = warmup_linear(training.learning_rate, steps, training.warmup)
    optimizer = adamw(rates, weight_decay=training.weight_decay)
    updater = Updater(classification_loss, optimizer, trains=made.trains, clip_norm=training.clip_norm)
    call, key = compiled(updater), jax.random.key(training.seed)
    state, warm, compile_s = updater.init(made.model, key=key), updater.init(made.model, key=key), 0.0
    for batch in of_every_shape(task):
        warm, first = stepped(call, warm, batch)
        warm, again = stepped(call, warm, batch)
        compile_s += first - again
    held, iterator = [state], iter(batches)

    def epoch() -> None:
        losses = []
        for i in range(batches.per_epoch):
            held[0], metrics = call(held[0], next(iterator))
            losses.append(metrics["loss"])
            if i >= LAG:
                float(losses[i - LAG])
        jax.block_until_ready(held[0].step)

    labels = task.sets["test"].labels
    accuracy = lambda: data.told(data.logits(held[0].model, task.scored["test"]), labels)["accuracy"]
    return Run(epoch, accuracy, *batches.tokens_per_epoch, compile_s, len(batches.shapes))


def stepped(call: Callable[..., Any], state: Any, batch: Any) -> tuple[Any, float]:
    """The next state and how long it took."""
    begin = time.perf_counter()
    state, _ = call(state, batch)
    jax.block_until_ready(state.step)
    return state, time.perf_counter() - begin


def of_every_shape(task: Task) -> Iterator[dict[str, np.ndarray]]:
    seen = set()
    for i in range(task.batches.per_epoch):
        batch = task.batches[i]
        if (shape := batch["token_ids"].shape) not in seen:
            seen.add(shape)
            yield batch


def theirs(records: dict[str, Records], training: Settled) -> Run:
    """transformers' model and torch's AdamW, as a plain loop has it."""
    import torch

    transformers = quiet()
    torch.manual_seed(training.seed)
    count = len(records["train"].names)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source(), num_labels=count)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source())
    room = model.config.max_position_embeddings
    ids = {
        name: tokenizer(found.texts, truncation=True, max_length=room)["input_ids"] for name, found in records.items()
    }
    per_epoch = -(-len(ids["train"]) // training.batch_size)
    optimizer = torch.optim.AdamW(decaying(model, training.weight_decay), lr=training.learning_rate)
    steps = training.total(per_epoch, 1)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(np.ceil(steps * training.warmup)), steps)
    rng = np.random.default_rng(training.seed)

    def inputs(name: str, rows: Any) -> dict[str, Any]:
        found = tokenizer.pad({"input_ids": [ids[name][i] for i in rows]}, return_tensors="pt")
        labels = records[name].labels
        assert labels is not None
        return {**found, "labels": torch.from_numpy(labels[rows].astype(np.int64))}

    def parts(order: Any) -> list[Any]:
        return [order[i : i + training.batch_size] for i in range(0, len(order), training.batch_size)]

    def epoch() -> None:
        model.train()
        for rows in parts(rng.permutation(len(ids["train"]))):
            given = inputs("train", rows)
            optimizer.zero_grad(set_to_none=True)
            model(**given).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm or float("inf"))
            optimizer.step()
            schedule.step()

    def accuracy() -> float:
        model.eval()
        order = np.argsort([len(x) for x in ids["test"]], kind="stable")
        with torch.no_grad():
            given = [inputs("test", rows) for rows in parts(order)]
            right = [(model(**x).logits.argmax(-1) == x["labels"]).float() for x in given]
        return float(torch.cat(right).mean())

    sample = sum(
        max(len(ids["train"][i]) for i in rows) * len(rows)
        for rows in parts(np.random.default_rng(1).permutation(len(ids["train"])))
    )
    return Run(epoch, accuracy, sample, sum(map(len, ids["train"])), 0.0, None)


def decaying(model: Any, decay: float) -> list[dict[str, Any]]:
    """Parameters in the two groups of transformers' trainer."""
    free = lambda name: name.endswith("bias") or "LayerNorm" in name
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if free(name)], "weight_decay": 0.0},
        {"params": [p for name, p in named if not free(name)], "weight_decay": decay},
    ]


if __name__ == "__main__":
    main()
