"""How a file spells its keys, and what the tables here call them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from .family import Family
else:
    Family = object  # whose file imports this one


@runtime_checkable
class Spelling(Protocol):
    """One file's way of naming tensors."""

    def names(self, keys: Collection[str]) -> dict[str, str]:
        """Every key by its name in the tables. Two keys of one name: the second stands for itself, unexpected."""
        ...

    def old(self, key: str) -> str:
        """A name of the tables that the file lacks, as it would spell it."""
        ...


def is_bare(keys: Collection[str], family: Family) -> bool:
    """Whether most of a file's backbone keys lack the family's prefix: a stray key does not decide."""
    inside = tuple(f"{family.prefix}{step}." for step in family.roots)
    inner, outer = sum(key.startswith(inside) for key in keys), sum(key.split(".")[0] in family.roots for key in keys)
    if inner == outer == 0:  # some wrapper's name may stand before all of them, which the report will say
        inner = sum(key.partition(".")[2].startswith(inside) for key in keys)
    return outer >= inner


@dataclass(frozen=True)
class Prefixed:
    """With or without the backbone's prefix, in old or new endings: files of the reference library."""

    prefix: str
    roots: tuple[str, ...]
    bare: bool
    legacy: Mapping[str, str]
    old_endings: bool

    @classmethod
    def of(cls, keys: Collection[str], family: Family) -> "Prefixed":
        old = any(key.endswith(ending) for key in keys for ending in family.legacy)
        return cls(family.prefix, family.roots, is_bare(keys, family), family.legacy, old)

    def modern(self, key: str) -> str:
        """The key as a file with a head spells it today."""
        for old, new in self.legacy.items():
            if key.endswith(old):
                key = key.removesuffix(old) + new
        return self.prefix + key if self.bare and key.split(".")[0] in self.roots else key

    def names(self, keys: Collection[str]) -> dict[str, str]:
        names: dict[str, str] = {}
        # First those that this file spells in its own way: a stray key of today's spelling must not take their place.
        for key in sorted(keys, key=lambda key: (key.endswith(tuple(self.legacy)), self.modern(key) == key)):
            name = self.modern(key)
            if name in names:
                name = key if key not in names else f"{key} (spelled in two ways)"
            names[name] = key
        return names

    def old(self, key: str) -> str:
        for old, new in self.legacy.items() if self.old_endings else ():
            if key.endswith(new):
                key = key.removesuffix(new) + old
        return key.removeprefix(self.prefix) if self.bare else key
