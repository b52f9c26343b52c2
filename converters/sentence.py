"""sentence-transformers' own files: modules.json and the configs that it names."""

import json
from pathlib import Path
from typing import Any

from .errors import MalformedCheckpoint, UnsupportedConfig

POOLING = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


def read(directory: Path) -> dict[str, Any] | None:
    """The facts `pooling` and `normalize`, or None where there is no modules.json.

    Raises an `UnsupportedConfig` for a module or a pooling that a sentence embedder here does not have.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return None
    try:
        modules = [(m["type"].rsplit(".", 1)[-1], m.get("path", "")) for m in json.loads(path.read_bytes())]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MalformedCheckpoint(f"{path} is not a list of modules ({error}).") from error
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedConfig(
            f"{path} lists {', '.join(kinds)}; supported is Transformer, Pooling and, at will, Normalize."
            " head=Encoder loads the encoder alone."
        )
    return {"pooling": _pooling(directory / modules[1][1] / "config.json"), "normalize": len(kinds) == 3}


def _pooling(path: Path) -> str:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MalformedCheckpoint(f"{path}, which modules.json names, cannot be read ({error}).") from error
    modes = config.get("pooling_mode", [k for k, v in config.items() if k.startswith("pooling_mode_") and v])
    modes = [modes] if isinstance(modes, str) else list(modes)
    ours = [name for name, theirs in POOLING.items() if modes in ([theirs], [name])]
    if not ours:
        raise UnsupportedConfig(
            f"{path} asks for the pooling {', '.join(modes) or 'none'}; supported: {', '.join(POOLING)}."
        )
    return ours[0]


def write(directory: Path, embed_dim: int, pooling: str, normalize: bool) -> None:
    """The files by which sentence-transformers finds the same embedder."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    places = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": places[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    (directory / "1_Pooling").mkdir()
    modes = {theirs: name == pooling for name, theirs in POOLING.items()}
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": embed_dim, **modes}, indent=2) + "\n"
    )
