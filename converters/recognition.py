"""Which family, architecture and class of ours a checkpoint is of, and how it spells its keys."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from . import flax_names, sentence
from .checkpoint import Checkpoint
from .errors import ConversionError, UnsupportedConfig
from .families import DIRECTORIES, UNNAMED
from .family import Family
from .spelling import Spelling, is_bare


def family_of(fields_: Mapping[str, Any]) -> Family:
    name = fields_.get("model_type")
    by_architecture = {a: f for f in DIRECTORIES.values() for a in (*f.architectures, *f.carries)}
    named = [a for a in _list(fields_.get("architectures")) if a in by_architecture]
    if isinstance(name, str) and name in DIRECTORIES:
        return DIRECTORIES[name]
    if name is None and named:
        return by_architecture[named[0]]
    if name is None and not fields_.get("architectures"):
        for fields, family in UNNAMED.items():
            if fields <= fields_.keys():
                return family
    stated = f"model_type {name!r}" if name is not None else "no model_type"
    raise UnsupportedConfig(
        f"config.json has {stated} (architectures: {fields_.get('architectures')}); supported are:\n{supported()}"
    )


def supported() -> str:
    """The architectures that are converted, a line a family."""
    return "\n".join(f"  {name}: {', '.join(family.architectures)}" for name, family in DIRECTORIES.items())


def _list(value: Any) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list | tuple) else []


def architecture_of(fields_: Mapping[str, Any], family: Family, names: Collection[str], checkpoint: Checkpoint) -> str:
    named = _list(fields_.get("architectures"))
    if named:
        return named[0]
    if family.recognise is not None:
        return family.recognise(names)
    unnamed = "an architecture that config.json does not name"
    return next(iter(family.architectures)) if is_bare(dotted_keys(checkpoint), family) else unnamed


def model_class_of(family: Family, architecture: str, dressed: Any, bare: bool, head: type | None) -> type:
    if head is not None:
        if head not in family.models.values():
            raise ConversionError(
                f"head={getattr(head, '__name__', repr(head))} is not a model of {family.model_type}; pass one of the"
                f" classes {', '.join(family.models)}."
            )
        return head
    found = family.architectures.get(architecture)
    if found is None:
        raise UnsupportedConfig(
            f"{architecture} is not supported; supported are:\n{supported()}\n"
            f"head= loads the backbone of any {family.model_type} file under one of {', '.join(family.models)}."
        )
    # sentence-transformers leaves the name of the class that its encoder was taken from; the tensors are the encoder's.
    found = family.bare if dressed and bare else found
    return next((one for one, like in family.like.items() if dressed and like is found), found)


def dressed_as(directory: Path | None, family: Family, head: type | None) -> dict[str, Any] | None:
    """A sentence embedder's facts; one that is not understood does no harm where another model is asked for."""
    if directory is None or (not family.like and head is not None):
        return None
    if not family.like and (directory / "modules.json").is_file():
        raise UnsupportedConfig(
            f"{directory / 'modules.json'} makes a sentence embedder of a {family.model_type}, which is not had here:"
            f" head={family.bare.__name__} loads the model that it reads."
        )
    try:
        return sentence.read(directory)
    except UnsupportedConfig:
        if head is None or head in family.like:
            raise
        return None


def spelling_of(checkpoint: Checkpoint, family: Family) -> Spelling:
    if checkpoint.container == "flax":
        return flax_names.Flax.of(checkpoint.specs, family)
    return family.spell(checkpoint.specs, family)


def dotted_keys(checkpoint: Checkpoint) -> Collection[str]:
    """The file's keys, with dots between their steps."""
    return [*map(flax_names.dotted, checkpoint.specs)] if checkpoint.container == "flax" else checkpoint.specs
