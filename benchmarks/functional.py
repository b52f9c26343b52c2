"""How fast is a training step of the functional transformer, against a loop over its heads?

`python -m benchmarks.functional` trains both models of that name, in the sizes of the repository's quick mode (7 heads
of 13) and of its command line (8 heads of 64, 512 wide): rows of 32 characters, batches of 128; loss, gradients and the
original's Adam. Ours has one matrix for all heads and one `attend`; the loop computes the same equations head by head,
parameter by parameter, as the original spells them. Both begin with the same numbers.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformers import FUNCTIONAL_2022, FUNCTIONAL_HEAD, CausalLM, FunctionalConfig
from eqx_transformers.training import adam_uncorrected, next_token_loss

from .timing import interleaved, machine, medians, seconds, table

LEARNING_RATE, B1, B2, EPS = 0.001, 0.9, 0.99, 1e-16
QUICK = {"num_heads": 7, "head_dim": 13, "mlp_dim": 111}
VARIANTS = {
    "2022 quick": dataclasses.replace(FUNCTIONAL_2022, **QUICK, embed_dim=93),
    "head quick": dataclasses.replace(FUNCTIONAL_HEAD, **QUICK, embed_dim=91),
    "2022": FUNCTIONAL_2022,
    "head": FUNCTIONAL_HEAD,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step of the functional transformer, and a loop's.")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--layers", type=int, default=FUNCTIONAL_HEAD.num_layers)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"functional transformer, {args.layers} layers, {args.batch}x{args.length}, float32; {machine()}")
    header = [
        "model",
        "loop ms",
        "ours ms",
        "loop / ours",
        "first loss differs",
        "compile: loop s",
        "ours s",
        "first: loop ms",
    ]
    rows = [measure(name, args.layers, args.batch, args.length, args.rounds) for name in args.variants]
    print(table([*header, "ours ms"], rows))


class Step(NamedTuple):
    """A compiled step: `run` makes the next one and gives its loss."""

    run: Callable[[], Any]
    compile_s: float
    first_s: float
    first_loss: float


def measure(name: str, layers: int, batch: int, length: int, rounds: int) -> list[str]:
    """One row: medians of steps that take turns."""
    config = dataclasses.replace(VARIANTS[name], num_layers=layers)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)), jnp.int32)
    model = CausalLM(config, key=jax.random.key(0))
    ours, loop = our_step(model, tokens), loop_step(parameters(model), config, tokens)
    times = medians(interleaved({"loop": loop.run, "ours": ours.run}, rounds))
    apart = abs(ours.first_loss - loop.first_loss)
    ms = lambda s: f"{s * 1e3:.0f}"
    return [
        name,
        ms(times["loop"]),
        ms(times["ours"]),
        f"{times['loop'] / times['ours']:.2f}",
        f"{apart:.0e}",
        f"{loop.compile_s:.1f}",
        f"{ours.compile_s:.1f}",
        ms(loop.first_s),
        ms(ours.first_s),
    ]


def our_step(model: CausalLM, tokens: jax.Array) -> Step:
    optimiser = adam_uncorrected(LEARNING_RATE, B1, B2, EPS)
    arrays, rest = eqx.partition(model, eqx.is_array)

    def step(arrays, state, tokens):
        loss = lambda arrays: next_token_loss(jax.vmap(eqx.combine(arrays, rest))(tokens), tokens)
        value, gradients = jax.value_and_grad(loss)(arrays)
        updates, state = optimiser.update(gradients, state)
        return eqx.apply_updates(arrays, updates), state, value

    return compiled(step, arrays, optimiser.init(arrays), tokens)


def loop_step(params: Any, config: FunctionalConfig, tokens: jax.Array) -> Step:
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(params, state, tokens):
        loss = lambda params: jnp.mean(jax.vmap(lambda row: looped_loss(params, config, row))(tokens))
        value, gradients = jax.value_and_grad(loss)(params)
        count, m, v = state
        count = count + 1
        m = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, m, gradients)
        v = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g * g, v, gradients)
        rate = LEARNING_RATE * jnp.sqrt(1 - B2**count) / (1 - B1**count)
        params = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + EPS), params, m, v)
        return params, (count, m, v), value

    return compiled(step, params, (jnp.zeros((), jnp.int32), zeros, zeros), tokens)


def compiled(step: Callable[..., Any], params: Any, state: Any, tokens: jax.Array) -> Step:
    """The step, compiled once; it takes its parameters' memory for the new ones, as training does."""
    programs: list[Any] = []
    donated = jax.jit(step, donate_argnums=(0, 1))
    own = jax.tree.map(jnp.copy, (params, state))
    compile_s = seconds(lambda: programs.append(donated.lower(*own, tokens).compile()))
    held: list[Any] = [*own]

    def run() -> jax.Array:
        *held[:], loss = programs[0](*held, tokens)
        return loss

    losses: list[jax.Array] = []

    def first() -> Any:
        losses.append(run())
        return held

    first_s = seconds(first)
    return Step(run, compile_s, first_s, float(losses[0]))


# ---- the equations, head by head


def parameters(model: CausalLM) -> dict[str, Any]:
    """Our numbers as the loop holds them: matrices (in, out), one for every head."""
    backbone = model.backbone
    affine = lambda layer: {"w": layer.weight.T, **({} if layer.bias is None else {"b": layer.bias})}
    norm = lambda layer: {"gain": layer.weight, **({} if layer.bias is None else {"b": layer.bias})}

    def heads(attention: Any) -> list[dict[str, Any]]:
        parts = {name: affine(getattr(attention, f"{name}_proj")) for name in ("query", "key", "value")}
        cut = {name: {x: jnp.split(a, attention.num_heads, -1) for x, a in p.items()} for name, p in parts.items()}
        return [{n: {x: a[i] for x, a in p.items()} for n, p in cut.items()} for i in range(attention.num_heads)]

    layers = [
        {
            "norm_attention": norm(block.attention_norm),
            "heads": heads(block.attention),
            "norm_mlp": norm(block.mlp_norm),
            "up": affine(block.mlp.up_proj),
            "down": affine(block.mlp.down_proj),
        }
        for block in backbone.stack.blocks
    ]
    return {
        "tokens": backbone.embedding.tokens.weight,
        "positions": backbone.embedding.positions.weight,
        "layers": layers,
        "norm": norm(backbone.norm),
        "output": affine(model.head.decoder),
    }


def looped_loss(params: Any, config: FunctionalConfig, tokens: jax.Array) -> jax.Array:
    length = len(tokens)
    hidden = config.embed_dim**-0.5 * params["tokens"][tokens] + params["positions"][:length]
    mask = jnp.log(jnp.tril(jnp.ones((length, length))))
    for layer in params["layers"]:
        t, parts = normed(layer["norm_attention"], hidden), []
        for head in layer["heads"]:
            query, key, value = (linear(head[name], t) for name in ("query", "key", "value"))
            parts.append(jax.nn.softmax(config.head_dim**-0.5 * (query @ key.T + mask)) @ value)
        hidden = hidden + (sum(parts) if config.merge == "sum" else jnp.hstack(parts))
        t = normed(layer["norm_mlp"], hidden)
        hidden = hidden + linear(layer["down"], jax.nn.relu(linear(layer["up"], t)))
    logits = linear(params["output"], normed(params["norm"], hidden))
    scores = jax.nn.log_softmax(logits)[:-1]
    return -jnp.mean(jnp.take_along_axis(scores, tokens[1:, None], axis=-1))


def linear(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params.get("b", 0.0)


def normed(params: Any, x: jax.Array) -> jax.Array:
    standard = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5)
    return params["gain"] * standard + params.get("b", 0.0)


if __name__ == "__main__":
    main()
