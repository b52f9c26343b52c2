"""sentence-transformers' own files: modules.json and the configs that it names."""

import json
from pathlib import Path
from typing import Any

from .errors import MalformedCheckpoint, UnsafeCheckpoint, UnsupportedConfig
from .files import is_one_component, read_json

# What `write` writes. Other files of sentence-transformers state no facts of the model and are copied.
FILES = ("modules.json", "1_Pooling/config.json")

POOLING = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


def read(directory: Path) -> dict[str, Any] | None:
    """The facts `pooling` and `normalize`, or None where there is no modules.json.

    Raises an `UnsupportedConfig` for a module or a pooling that a sentence embedder here does not have.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return None
    modules = read_json(path, list)
    if not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules):
        raise MalformedCheckpoint(f"{path} is not a list of modules, each with a type and a path.")
    kinds = [m["type"].rsplit(".", 1)[-1] for m in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedConfig(
            f"{path} lists {', '.join(kinds) or 'nothing'}; supported is Transformer, Pooling and, at will, Normalize."
            " head=Encoder loads the encoder alone."
        )
    return {"pooling": _pooling(directory / _inside(path, modules[1]) / "config.json"), "normalize": len(kinds) == 3}


def _inside(path: Path, module: dict[str, Any]) -> str:
    place = module.get("path")
    # One path component, as for shards: a list of modules cannot make us read files from elsewhere.
    if not isinstance(place, str) or (place and not is_one_component(place)):
        raise UnsafeCheckpoint(f"{path} puts a module at {place!r}; it must be the name of a directory beside it.")
    return place


def _pooling(path: Path) -> str:
    config = read_json(path)
    modes = config.get("pooling_mode", [k for k, v in config.items() if k.startswith("pooling_mode_") and v])
    modes = modes if isinstance(modes, list) else [modes]
    ours = [name for name, theirs in POOLING.items() if modes in ([theirs], [name])]
    if not ours:
        raise UnsupportedConfig(
            f"{path} asks for the pooling {', '.join(map(str, modes)) or 'none'}; supported: {', '.join(POOLING)}."
            " head=Encoder loads the encoder alone."
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
