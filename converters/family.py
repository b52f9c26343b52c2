"""What the engine knows of a family of checkpoints: data and one table, from `converters/families/`."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from .config import OLDER, Fact, Older
from .errors import ConversionError
from .rules import Table
from .spelling import Prefixed, Spelling


@dataclass(frozen=True)
class Family:
    """One architecture of the reference library.

    - `model_type`: its word in config.json; `defaults`: our config with the facts that config.json does not state.
    - `architectures`: the reference's class names, and the class of ours that each is. The first is
      the bare encoder or decoder.
    - `like`: classes of ours whose tensors are another's (a sentence embedder's are the bare encoder's).
    - `carries`: further classes of ours whose heads a file of an architecture holds, or a part of them: what is there
      is read, the rest drawn.
    - `prefix`: what stands before the backbone's keys in a file with a head (`bert.`); a bare one's has nothing.
    - `unprefixed`: our classes whose files have none although there is more than a backbone in them.
    - `roots`: the first steps of a bare backbone's keys.
    - `facts`, `fixed`, `irrelevant`: see `config.read`; `older`: see `config.modern`.
    - `table(config, model_class)`: rules, ties, ignored keys; keys as in a file with a head, in today's spelling.
    - `observe(config, model_class, keys, fields)`: the config with what only the tensors decide, such as a pooler.
    - `legacy`: endings of old key names and what they are called now.
    - `flax`: what the reference's Flax models call the weight of a module, by endings of its name; all others' is a
      kernel. None where the reference had none, so that the names in such a file would be guessed.

    To run the reference beside it:

    - `probes(model_class)`: our modules and theirs that compute the same, in order of execution; `{i}` is a layer.
    - `inputs(model, ids, mask, rng)`: what both are called with beside ids and mask, or in their place; `called`: what
      the reference calls those of our inputs that it has other words for.
    - `options(model)`: what the reference must be told of a model that config.json does not say; `settle(reference,
      model)`: what must be changed in it once it is there.
    - `reads`: which token's state stands for a sequence.

    Of a dictionary of arrays, or where files differ in more than a prefix:

    - `spell(keys, family)`: how a file with these keys names tensors.
    - `recognise(keys)`: the architecture of a file whose config does not name one, by the tables' names.
    """

    model_type: str
    defaults: Any
    architectures: Mapping[str, type]
    like: Mapping[type, type]
    carries: Mapping[str, tuple[type, ...]]
    prefix: str
    roots: tuple[str, ...]
    facts: tuple[Fact, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    irrelevant: frozenset[str]
    table: Callable[[Any, type], Table]
    observe: Callable[[Any, type, frozenset[str], Mapping[str, Any]], Any]
    legacy: Mapping[str, str]
    probes: Callable[[type], tuple[tuple[str, str], ...]]
    spell: Callable[[Collection[str], "Family"], Spelling] = Prefixed.of
    recognise: Callable[[Collection[str]], str] | None = None
    older: tuple[Older, ...] = OLDER
    flax: Mapping[str, str] | None = None
    inputs: Callable[[Any, np.ndarray, np.ndarray, np.random.Generator], dict[str, np.ndarray]] = (
        lambda model, ids, mask, rng: {}
    )
    called: Mapping[str, str] = field(default_factory=dict)
    options: Callable[[Any], dict[str, Any]] = lambda model: {}
    settle: Callable[[Any, Any], None] = lambda reference, model: None
    unprefixed: tuple[type, ...] = ()
    reads: Literal["first", "last"] = "first"

    def architecture(self, model_class: type) -> str:
        """What the reference calls this class of ours. Raises a `ConversionError` where it has no such model."""
        wanted = self.like.get(model_class, model_class)
        for name, one in self.architectures.items():
            if one is wanted:
                return name
        known = ", ".join(self.models)
        raise ConversionError(f"There is no {model_class.__name__} of {self.model_type}: that has {known}.")

    def is_bare(self, model_class: type) -> bool:
        """Whether the reference's class is the backbone alone, whose keys have no prefix."""
        return self.bare is self.like.get(model_class, model_class)

    def is_prefixed(self, model_class: type) -> bool:
        """Whether `prefix` stands before the backbone's keys in the reference's files of this class."""
        return not self.is_bare(model_class) and model_class not in self.unprefixed

    def in_head(self, model_class: type, path: str) -> bool:
        """Whether an array of this class is one that the backbone alone does not have."""
        first = path.partition(".")[0]
        return not self.is_bare(model_class) and first not in ("backbone", *(f.name for f in fields(self.bare)))

    @property
    def bare(self) -> type:
        """Our class of the backbone alone."""
        return next(iter(self.architectures.values()))

    @property
    def models(self) -> dict[str, type]:
        """Our classes by name."""
        return {one.__name__: one for one in (*self.architectures.values(), *self.like)}
