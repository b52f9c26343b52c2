"""How fast is an encoder's forward pass, against torch and against its own matrix products?

`python -m benchmarks.forward` runs RoBERTa-base's shape with random weights (the same in both), float32, with a
tokenizer's mask. The floor is what the model's matrix products would take at the speed of a large matrix product
measured in the same run; torch / floor is what no implementation with these products can surpass.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from converters import reference_names
from eqx_transformers import ROBERTA, Encoder, EncoderConfig, stack

from . import reference
from .timing import interleaved, machine, medians, seconds, table


def main() -> None:
    parser = argparse.ArgumentParser(
        description="An encoder's forward pass against torch and against its own matrix products."
    )
    parser.add_argument("--sizes", nargs="+", default=["8x128", "4x512"], metavar="BATCHxLENGTH")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=ROBERTA.num_layers)
    args = parser.parse_args()
    config = dataclasses.replace(ROBERTA, num_layers=args.layers, pooler=False)
    model = Encoder(config, key=jax.random.key(0))
    twin = torch_twin(model, config)
    print(f"RoBERTa-base shape, {args.layers} layers, float32; {machine()}, torch {reference.version()}")
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    rows = [measure(model, config, twin, batch, length, args.rounds) for batch, length in sizes]
    header = [
        "size",
        "torch ms",
        "ours ms",
        "stacked ms",
        "floor ms",
        "torch / ours",
        "ours / floor",
        "torch / floor",
        "error",
    ]
    print(table([*header, "compile s", "stacked s", "first ms"], rows))


def measure(model: Encoder, config: EncoderConfig, twin: Any, batch: int, length: int, rounds: int) -> list[str]:
    """One row: medians of calls that take turns."""
    import torch

    ids, mask = inputs(batch, length)
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}

    @torch.inference_mode()
    def theirs():
        return twin(**given).last_hidden_state.numpy()

    ours, compile_s, first = compiled(model, ids, mask)
    stacked, stacked_compile_s, _ = compiled(stack(model), ids, mask)
    big = large_product()
    times = medians(interleaved({"torch": theirs, "ours": ours, "stacked": stacked, "big": big.call}, rounds))
    floor = products(config, batch, length) / (big.flops / times["big"])
    error = float(np.abs(np.asarray(ours()) - theirs())[mask == 1].max())
    ms = lambda name: f"{times[name] * 1e3:.0f}"
    return [
        f"{batch}x{length}",
        ms("torch"),
        ms("ours"),
        ms("stacked"),
        f"{floor * 1e3:.0f}",
        f"{times['torch'] / times['ours']:.2f}",
        f"{times['ours'] / floor:.2f}",
        f"{times['torch'] / floor:.2f}",
        f"{error:.0e}",
        f"{compile_s:.1f}",
        f"{stacked_compile_s:.1f}",
        f"{first * 1e3:.0f}",
    ]


def inputs(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens; the last row is padded for a quarter of its length, as a batch of texts would be."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, ROBERTA.vocab_size, (batch, length)), np.ones((batch, length), np.int64)
    mask[-1, -length // 4 :] = 0
    return np.where(mask == 1, ids, 1), mask  # 1 is RoBERTa's padding


def compiled(model: Encoder, ids: np.ndarray, mask: np.ndarray) -> tuple[Callable[[], Any], float, float]:
    """(call, seconds to trace and compile, seconds of the first call)."""
    forward = eqx.filter_jit(lambda model, ids, mask: jax.vmap(lambda i, m: model(i, attention_mask=m))(ids, mask))
    given = jnp.asarray(ids), jnp.asarray(mask)
    programs: list[Any] = []
    compile_s = seconds(lambda: programs.append(forward.lower(model, *given).compile()))
    call = lambda: programs[0](model, *given)
    return call, compile_s, seconds(call)


@dataclasses.dataclass(frozen=True)
class Product:
    call: Callable[[], Any]
    flops: float


def large_product(n: int = 2048) -> Product:
    """A square product, large enough to run at the machine's speed."""
    x = jax.random.normal(jax.random.key(0), (n, n))
    multiply = jax.jit(lambda x: jax.lax.dot_general(x, x, (((1,), (1,)), ((), ()))))
    multiply(x).block_until_ready()
    return Product(lambda: multiply(x), 2.0 * n**3)


def products(c: EncoderConfig, batch: int, length: int) -> float:
    """Floating-point operations of the model's matrix products."""
    dense = 4 * c.embed_dim**2 + 2 * c.embed_dim * c.mlp_dim
    return 2.0 * batch * c.num_layers * (length * dense + 2 * length**2 * c.embed_dim)


def torch_twin(model: Encoder, c: EncoderConfig) -> Any:
    """transformers' model with our numbers."""
    import torch
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=c.vocab_size,
        num_hidden_layers=c.num_layers,
        max_position_embeddings=c.max_positions,
        type_vocab_size=c.token_types,
        layer_norm_eps=c.norm_eps,
    )
    twin = transformers.RobertaModel(config, add_pooling_layer=False).eval()
    specs, get = reference_names.tensors(model)
    twin.load_state_dict({name: torch.from_numpy(np.array(get(name))) for name in specs})
    return twin


if __name__ == "__main__":
    main()
