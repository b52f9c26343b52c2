"""The README's Python runs as it stands, on a small model under the name that it asks for."""

import dataclasses

import jax

import converters
from eqx_transformers import ROBERTA, MaskedLM

from .examples import run_examples


def test_every_python_block_of_the_readme_runs_in_order(tmp_path, monkeypatch):
    small = dataclasses.replace(ROBERTA, embed_dim=21, num_heads=3, num_layers=4, mlp_dim=37)
    converters.export(MaskedLM(small, key=jax.random.key(0)), tmp_path / "FacebookAI" / "roberta-base")
    monkeypatch.chdir(tmp_path)
    count, names = run_examples("README.md")
    assert count == 7 and names["embeddings"].shape == (3, 384)
    assert names["tokens"].shape == names["sampled"].shape == (2, 8)
    assert names["logits"].shape == (2, 2) and names["grown"].backbone.embedding.tokens.vocab_size == 50270
    assert names["calm"].config.dropout == 0.0 and (tmp_path / "my-model" / "config.json").is_file()
    assert len(names["activations"]) == 4 and names["with_silu"].shape == names["output"].shape
    assert any(x.any() for x in jax.tree.leaves(names["gradient"]))
    assert float(names["metrics"]["loss"]) > 0 and int(names["state"].step) == 1
