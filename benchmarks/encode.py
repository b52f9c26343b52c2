"""How fast is a corpus embedded, against sentence-transformers and against the model's own matrix products?

`python -m benchmarks.encode` runs MiniLM over the sentences of `benchmarks/data/snippets.txt`, tokenizing included,
float32. The floor is what the matrix products over the sentences' own tokens would take at the speed of a large matrix
product measured in the same run; torch / floor is what nobody who computes these products in float32 can surpass.
"""

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

import converters
from converters.demo import source
from eqx_transformers.encode import encode, plan

from .forward import large_product, products
from .timing import interleaved, machine, medians, seconds, table

SENTENCES = Path(__file__).parent / "data" / "snippets.txt"
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description="A corpus embedded, against sentence-transformers.")
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    texts = SENTENCES.read_text(encoding="utf-8").splitlines()[: args.sentences]
    model, tokenizer, reference = ours(), rust_tokenizer(), theirs()
    embed = lambda: encode(model, tokenizer, texts)
    first, big = seconds(embed), large_product()
    calls = {"torch": lambda: reference.encode(texts), "ours": embed, "big": big.call}
    times = medians(interleaved(calls, args.rounds))
    tokens = [len(ids) for ids in reference.tokenizer(texts)["input_ids"]]
    floor = sum(products(model.config, 1, n) for n in tokens) / (big.flops / times["big"])
    computed = sum(batch.rows * batch.length for batch in plan(np.array(tokens)))
    error = float(np.abs(embed() - reference.encode(texts)).max())
    print(f"MiniLM, {len(texts)} sentences, {sum(tokens)} tokens, float32; {machine()}, {versions()}")
    rate = lambda name: [name, f"{times[name]:.2f}", f"{len(texts) / times[name]:.0f}"]
    print(table(["", "seconds", "sentences/s"], [rate("torch"), rate("ours"), ["floor", f"{floor:.2f}", ""]]))
    print(
        f"torch / ours {times['torch'] / times['ours']:.2f}, ours / floor {times['ours'] / floor:.2f},"
        f" torch / floor {times['torch'] / floor:.2f}; the large product runs at {big.flops / times['big'] / 1e9:.0f}"
        " GFLOP/s"
    )
    print(f"ours compiles for {max(0.0, first - times['ours']):.1f} s (first call less a steady one)")
    print(f"tokens computed / tokens of the sentences: {computed / sum(tokens):.3f}")
    verdict = "PASS" if error <= TOLERANCE else "FAIL"
    print(f"{verdict}: embeddings differ by at most {error:.1e} (allowed: {TOLERANCE:.0e})")


def ours() -> Any:
    return converters.load(source())[0]


def rust_tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(source() / "tokenizer.json"))


def theirs() -> Any:
    from sentence_transformers import SentenceTransformer

    with contextlib.redirect_stderr(io.StringIO()):  # its bar of loaded weights
        return SentenceTransformer(str(source()), device="cpu")


def versions() -> str:
    import sentence_transformers
    import torch

    threads = f"{torch.get_num_threads()} threads"
    return f"torch {torch.__version__} ({threads}), sentence-transformers {sentence_transformers.__version__}"


if __name__ == "__main__":
    main()
