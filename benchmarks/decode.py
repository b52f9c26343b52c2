"""How fast are tokens generated, against torch's `generate` and against reading all weights once a token?

`python -m benchmarks.decode` runs the shapes of GPT-2, of a Llama of 100M parameters and of T5-small with random
weights (the same in both), float32, the best token or the best of 4 beams, no end. *floor* is the time in which a
program reads every parameter once that a token needs, the best of the run: it cannot be had for less, whatever the
batch. Of T5 that is its decoder, without what is computed of the memory once, and the output. *products* is what a
token's matrix products alone take at so many rows, one after another as a model's depend on each other, the median of
the faster of two layouts: nobody who leaves them to XLA has a token for much less.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformers import T5, generate, nn

from .reference import converted, quiet, version
from .timing import interleaved, machine, medians, seconds, table

COMPILING = "/jax/core/compile/backend_compile_duration"
SIZES = {"gpt2-small": ["1x64", "8x64", "1x512", "8x512"], "t5-small": ["8x64"]}
SIZES["llama-100m"] = SIZES["gpt2-small"]
BEAMS = {"gpt2-small": [1], "llama-100m": [1], "t5-small": [1, 4]}
NEW = 64


class Case(NamedTuple):
    """A batch of prompts, in how many beams each, and our first call's time and its part that was compiling."""

    ids: np.ndarray
    beams: int
    compile_s: float
    first_s: float

    @property
    def name(self) -> str:
        size = f"{self.ids.shape[0]}x{self.ids.shape[1]}"
        return size if self.beams == 1 else f"{size}, {self.beams} beams"

    @property
    def rows(self) -> int:
        return len(self.ids) * self.beams


def main() -> None:
    parser = argparse.ArgumentParser(description="Generation against torch and against reading all weights.")
    parser.add_argument("--model", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--sizes", nargs="+", metavar="BATCHxPROMPT")
    parser.add_argument("--beams", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{NEW} new tokens, float32; {machine()}, torch {version()}")
    for name in args.model:
        print(f"\n{name}")
        sizes = [size.split("x") for size in args.sizes or SIZES[name]]
        report(name, [(int(a), int(b), n) for a, b in sizes for n in args.beams or BEAMS[name]], args.rounds)


def report(name: str, sizes: list[tuple[int, int, int]], rounds: int) -> None:
    reference, model = twins(name)
    cases = [first(model, prompts(reference, *size), beams) for *size, beams in sizes]
    calls = {"floor": floor(model)}
    for case in cases:
        calls |= {f"{case.rows} rows {turned}": products(model, case.rows, turned) for turned in (False, True)}
        calls |= {f"{case.name} torch {n}": theirs(reference, case.ids, n, case.beams) for n in (1, NEW)}
        calls |= {f"{case.name} ours {n}": ours(model, case.ids, n, case.beams) for n in (1, NEW)}
    times = interleaved(calls, rounds)
    least, found = min(times["floor"]), medians(times)
    header = ["size", "torch s", "ours s", "torch / ours", "torch ms/token", "ours ms/token", "torch / ours"]
    header += ["floor ms", "ours / floor", "products ms", "ours / products", "ours tokens/s", "compile s", "first s"]
    print(table(header, [row(case, found, least) for case in cases]))
    print(flatness(model, cases[0].ids, rounds))
    print(compilations(model))


def row(case: Case, found: dict[str, float], least: float) -> list[str]:
    torch_s, ours_s = (found[f"{case.name} {who} {NEW}"] for who in ("torch", "ours"))
    alone = min(found[f"{case.rows} rows {turned}"] for turned in (False, True))
    # A token's time without the prompt's: the difference of two calls.
    torch_ms, ours_ms = (
        (found[f"{case.name} {who} {NEW}"] - found[f"{case.name} {who} 1"]) / (NEW - 1) * 1e3
        for who in ("torch", "ours")
    )
    return [
        f"{case.name} -> {NEW}",
        f"{torch_s:.2f}",
        f"{ours_s:.2f}",
        f"{torch_s / ours_s:.2f}",
        f"{torch_ms:.1f}",
        f"{ours_ms:.1f}",
        f"{torch_ms / ours_ms:.2f}",
        f"{least * 1e3:.1f}",
        f"{ours_ms / least / 1e3:.2f}",
        f"{alone * 1e3:.1f}",
        f"{ours_ms / alone / 1e3:.2f}",
        f"{len(case.ids) * NEW / ours_s:.0f}",
        f"{case.compile_s:.1f}",
        f"{case.first_s:.1f}",
    ]


def flatness(model: Any, ids: np.ndarray, rounds: int) -> str:
    """Milliseconds a token, by how many were there already."""
    marks = [1, 17, 33, 49, 64]
    found = medians(interleaved({str(n): ours(model, ids, n) for n in marks}, rounds))
    spent = [(found[str(b)] - found[str(a)]) / (b - a) * 1e3 for a, b in pairwise(marks)]
    parts = [f"{a} to {b}: {ms:.1f}" for (a, b), ms in zip(pairwise(marks), spent, strict=True)]
    return f"ms a token, by the length already generated (batch {len(ids)}): {', '.join(parts)}"


def compilations(model: Any) -> str:
    lengths = np.linspace(5, 505, 20).astype(int)
    with compiling() as compiled:
        for length in lengths:
            np.asarray(generate(model, np.full((3, length), 7), max_new_tokens=2))
    return f"{len(lengths)} prompt lengths from {lengths[0]} to {lengths[-1]}: {len(compiled)} compilations"


@contextmanager
def compiling() -> Iterator[list[float]]:
    """Collects the seconds of every compilation, of whatever is compiled."""
    found: list[float] = []
    active = True

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if active and event == COMPILING:
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        active = False  # listeners cannot be taken back


def first(model: Any, ids: np.ndarray, beams: int) -> Case:
    with compiling() as compiled:
        spent = seconds(ours(model, ids, NEW, beams))
    return Case(ids, beams, sum(compiled), spent)


def ours(model: Any, ids: np.ndarray, new: int, beams: int = 1) -> Callable[[], Any]:
    # The same slots for every number of tokens, so that one program runs them all.
    return lambda: generate(model, ids, max_new_tokens=new, beams=beams)


def theirs(reference: Any, ids: np.ndarray, new: int, beams: int) -> Callable[[], Any]:
    import torch

    given = torch.from_numpy(ids)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, "num_beams": beams}

    @torch.inference_mode()
    def call():
        return reference.generate(given, attention_mask=torch.ones_like(given), **options).numpy()

    return call


def floor(model: Any) -> Callable[[], Any]:
    """Reads every parameter once that a token needs."""
    arrays = eqx.filter(needed(model), eqx.is_inexact_array)
    total = jax.jit(lambda arrays: sum(jnp.sum(x) for x in jax.tree.leaves(arrays)))
    return lambda: total(arrays)


def products(model: Any, rows: int, turned: bool) -> Callable[[], Any]:
    """Multiplies so many rows by every matrix that a token needs, in the order in which it lies or turned."""
    is_matrix = lambda node: isinstance(node, nn.Linear | nn.Embedding)
    layers = [x for x in jax.tree.leaves(needed(model), is_leaf=is_matrix) if is_matrix(x)]
    table = max((x.weight for x in layers if isinstance(x, nn.Embedding)), key=len)  # the tied output
    weights = [*(x.weight for x in layers if isinstance(x, nn.Linear)), table]
    matrices = [jnp.asarray(np.ascontiguousarray(w.T) if turned else w) for w in weights]
    inputs = {w.shape[-1]: jax.random.normal(jax.random.key(0), (rows, w.shape[-1])) for w in weights}

    @jax.jit
    def total(matrices: list[jax.Array]) -> jax.Array:
        found = jnp.zeros(())
        for w in matrices:
            x = inputs[w.shape[-2 if turned else -1]] + found
            found = jnp.sum(x @ w if turned else nn.linear.contract(x, w)) * 1e-9
        return found

    return lambda: total(matrices)


def needed(model: Any) -> Any:
    """The parts of a model that every token runs through."""
    if not isinstance(model, T5):
        return model
    remembered = lambda m: [
        part for b in m.decoder.stack.blocks for part in (b.cross_attention.key_proj, b.cross_attention.value_proj)
    ]
    return eqx.tree_at(lambda m: [m.encoder, *remembered(m)], model, replace_fn=lambda _: None)


def prompts(reference: Any, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, reference.config.vocab_size, (batch, length))


def gpt2() -> Any:
    import transformers

    return transformers.GPT2Config()


def llama() -> Any:
    """The widths of GPT-2 in Llama's way: 100 million parameters."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
        tie_word_embeddings=True,
    )


def t5() -> Any:
    import transformers

    return transformers.T5Config(decoder_start_token_id=0)


CONFIGS = {"gpt2-small": gpt2, "llama-100m": llama, "t5-small": t5}


def twins(name: str) -> tuple[Any, Any]:
    """transformers' model with random weights, and ours with the same."""
    transformers = quiet()
    config = CONFIGS[name]()
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    reference = auto.from_config(config).eval()
    model = converted(reference)
    reference.generation_config.eos_token_id = None
    return reference, model


if __name__ == "__main__":
    main()
