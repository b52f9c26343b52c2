"""What a report says beside its lists: things that are no fault, and that somebody should know."""

from collections.abc import Mapping
from typing import Any, Literal

from eqx_transformers.tensor_file import Spec

from . import config as configs, flax_names
from .checkpoint import Checkpoint
from .family import Family
from .request import Request


def notes_of(checkpoint: Checkpoint, fields_: Mapping[str, Any], family: Family, request: Request) -> tuple[str, ...]:
    """What is known before the tensors are compared with the model's."""
    flax = (flax_names.NOTE,) if checkpoint.container == "flax" else ()
    return (*flax, *_unknown(fields_, family, request), *_dtypes(fields_, checkpoint.specs))


def _unknown(fields_: Mapping[str, Any], family: Family, request: Request) -> tuple[str, ...]:
    strange = [] if request.strict else configs.unknown(fields_, family.facts, family.fixed, family.irrelevant)
    return (
        (f"fields of config.json of which nothing is known were passed over: {', '.join(strange)}",) if strange else ()
    )


# In config.json's words: the dtypes that a model is usually held in.
WORDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def _dtypes(fields_: Mapping[str, Any], specs: Mapping[str, Spec]) -> tuple[str, ...]:
    said = fields_.get("dtype")
    found = sorted({s.dtype for s in specs.values()} & set(WORDS.values()))
    if not found or not isinstance(said, str) or WORDS.get(said, found[0]) in found:
        return ()
    return (
        f"config.json says {said}, the tensors are {', '.join(found)}: they keep their own unless dtype= says more",
    )


Head = Literal["missing", "tied", "there"]


def of_shape(untied: bool, architecture: str, family: Family, head: Head | None) -> tuple[str, ...]:
    """What the tensors say of the model that config.json does not.

    `head`: what a file whose keys are spelled as a bare model's has of the head that config.json names; None of any
    other file.
    """
    notes = (UNTIED,) if untied else ()
    if head is None:
        return notes
    bare = family.bare.__name__
    if head == "missing":
        said = f"but the file holds the bare {bare} alone: head={bare} (--head {bare}) loads it"
    else:
        said = f"and the keys are a bare {bare}'s, without {family.prefix!r} before them; no head is lacking"
        said += ", for its output is the token embedding" if head == "tied" else ""
    return (f"config.json names {architecture}, {said}", *notes)


UNTIED = (
    "the file holds a decoder that differs from the token embedding, so the model is untied, as transformers 5 reads it"
)
