"""A directory of tokenized texts, each file under a hash of what it was made from."""

import hashlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .._files import written

FORMAT = 1  # part of every key: files of another layout are not found
DIGEST = 16


def key_of(corpus: list[Any], tokenizer: Any, options: tuple[Any, ...]) -> str:
    """Of all texts, of the tokenizer's own JSON, and of what else changes the ids."""
    told = hashlib.blake2b(json.dumps([FORMAT, _said(tokenizer), *options]).encode(), digest_size=16)
    for text in corpus:
        for part in [text] if isinstance(text, str) else text:
            raw = part.encode("utf-8", "surrogatepass")
            told.update(len(raw).to_bytes(8, "little"))
            told.update(raw)
    return told.hexdigest() if not corpus or isinstance(corpus[0], str) else f"{told.hexdigest()}-pairs"


def kept(file: Path) -> dict[str, Any] | None:
    """What a file has; None if there is none or it is damaged, of which a warning tells."""
    if not file.exists():
        return None
    raw = file.read_bytes()
    if _digest(raw[DIGEST:]) != raw[:DIGEST]:
        warnings.warn(f"The cached tokens in {file} are damaged and made anew.", stacklevel=3)
        return None
    with np.load(io.BytesIO(raw[DIGEST:]), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def keep(file: Path, arrays: dict[str, Any]) -> None:
    """Writes a digest and the arrays; no reader finds half a file."""
    raw = io.BytesIO()
    np.savez(raw, **arrays)
    written(file, _digest(raw.getvalue()) + raw.getvalue())


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=DIGEST).digest()


def _said(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise ValueError(
            f"cache needs a tokenizer that can be written as JSON, but {type(tokenizer).__name__} cannot: give a fast"
            " tokenizer, or cache=None."
        )
    facts = json.loads(backend.to_str())
    # transformers leaves in its backend how it was called last.
    cut = {name: (facts.pop("truncation", None) or {}).get(name) for name in ("direction", "strategy")}
    facts.pop("padding", None)
    if backend is not tokenizer:
        cut = {"side": tokenizer.truncation_side, "type": type(tokenizer).__name__}
    return [facts, cut, getattr(tokenizer, "model_input_names", None)]
