"""What does it cost to trace a model into an expression, and how fast is one that was rewritten?

`python -m benchmarks.trace`: a RoBERTa of 24 layers. Tracing, with and without recognising functions, against
`jax.make_jaxpr` of the same call, on models whose blocks are a tuple and stacked. Then a forward pass and a training
step of the model with another activation: rewritten by `rewrite`, and edited by hand with `tree_at`; the numbers of
instructions in their programs; and how often a `Rewritten` model is traced in 20 training steps.
"""

import argparse
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eqx_transformers import ROBERTA, Encoder, nn, stack
from eqx_transformers.expression import Rewritten, rewrite, trace

from .timing import interleaved, machine, medians, seconds, table

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Tracing into an expression, and running what was rewritten.")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    facts = {"num_layers": args.layers, "embed_dim": args.dim, "num_heads": 4, "mlp_dim": 4 * args.dim}
    model = Encoder(dataclasses.replace(ROBERTA, **facts, dropout=0.0, attention_dropout=0.0), key=jax.random.key(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(5, 1000, args.length), jnp.int32)
    print(f"RoBERTa, {args.layers} layers of {args.dim}, {args.length} tokens, float32; {machine()}\n")
    print(tracing({"tuple": model, "stacked": stack(model)}, ids, args.rounds))
    print()
    print(running(model, ids, args.rounds))
    print(f"\nA Rewritten model is traced {traces(model, ids)} time(s) in {STEPS} training steps.")


def tracing(models: dict[str, Any], ids: jax.Array, rounds: int) -> str:
    rows = []
    for name, model in models.items():
        calls = {
            "make_jaxpr": lambda m=model: fresh_jaxpr(m, ids),
            "plain": lambda m=model: trace(m, functions=())(ids) and None,
            "recognising": lambda m=model: trace(m)(ids) and None,
        }
        found = medians(interleaved(calls, rounds))
        count = sum(1 for _ in trace(model)(ids).nodes())
        ratio = lambda what, found=found: f"{found[what] / found['make_jaxpr']:.2f}"
        times = [f"{found[what]:.2f}" for what in calls]
        rows.append([name, str(count), *times, ratio("plain"), ratio("recognising")])
    header = [
        "blocks",
        "nodes",
        "make_jaxpr s",
        "trace s",
        "recognising s",
        "trace / make_jaxpr",
        "recognising / make_jaxpr",
    ]
    return table(header, rows)


def fresh_jaxpr(model: Any, ids: jax.Array) -> None:
    """Of a function that is new each time: JAX keeps what it has traced."""
    arrays, rest = eqx.partition(model, eqx.is_array)
    jax.make_jaxpr(lambda arrays, ids: eqx.combine(arrays, rest)(ids))(arrays, ids)


def running(model: Any, ids: jax.Array, rounds: int) -> str:
    """The rewritten model against the one that was edited by hand."""
    gelus = lambda m: [block.mlp.activation for block in m.stack.blocks]
    edited = eqx.tree_at(gelus, model, replace_fn=lambda _: nn.silu)
    rewritten = lambda m, ids: rewrite(m, {"//MLP/gelu": nn.silu})(ids)
    forward = {"edited": lambda m, ids: m(ids), "rewritten": rewritten}
    given = {"edited": edited, "rewritten": model}
    slope = lambda f: eqx.filter_value_and_grad(lambda m, ids: jnp.square(f(m, ids)).mean())
    rows = []
    for what, wrap in (("forward", lambda f: f), ("value and gradient", slope)):
        programs = {}
        for name, f in forward.items():
            programs[name] = compiled(wrap(f), given[name], ids)
        calls = {name: (lambda p=program, m=given[name]: p(m, ids)) for name, (program, *_) in programs.items()}
        firsts = {name: seconds(call) for name, call in calls.items()}
        times = medians(interleaved(calls, rounds))
        counts = [programs[name][2] for name in ("edited", "rewritten")]
        compiling = [f"{programs[name][1]:.1f}" for name in ("edited", "rewritten")]
        milli = [f"{times[name] * 1e3:.1f}" for name in ("edited", "rewritten")]
        first = [f"{firsts[name] * 1e3:.1f}" for name in ("edited", "rewritten")]
        ratio = f"{times['rewritten'] / times['edited']:.2f}"
        rows.append([what, *milli, ratio, *map(str, counts), *compiling, *first])
    header = [
        "",
        "edited ms",
        "rewritten ms",
        "rewritten / edited",
        "instructions",
        "rewritten",
        "compile s",
        "rewritten",
    ]
    return table([*header, "first ms", "rewritten"], rows)


def compiled(f: Any, model: Any, ids: jax.Array) -> tuple[Any, float, int]:
    """A compiled program, how long it took, and its instructions."""
    box: list[Any] = []
    spent = seconds(lambda: box.append(eqx.filter_jit(f).lower(model, ids).compile()))
    return box[0], spent, sum(" = " in line for line in box[0].compiled.as_text().splitlines())


def traces(model: Any, ids: jax.Array) -> int:
    """How often the model's Python code runs while it is trained."""
    count = 0

    def counted(x: jax.Array) -> jax.Array:
        nonlocal count
        count += 1
        return nn.silu(x)

    first = lambda m: m.stack.blocks[0].mlp.activation
    changed = Rewritten(model, {"//MLP/gelu": nn.relu})
    changed = eqx.tree_at(lambda m: first(m.model), changed, counted)
    optimizer = optax.sgd(1e-3)
    state = optimizer.init(eqx.filter(changed, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(m: Any, state: Any) -> Any:
        slopes = eqx.filter_grad(lambda m: jnp.square(m(ids)).mean())(m)
        updates, state = optimizer.update(slopes, state)
        return eqx.apply_updates(m, updates), state

    for _ in range(STEPS):
        changed, state = step(changed, state)
    return count


if __name__ == "__main__":
    main()
