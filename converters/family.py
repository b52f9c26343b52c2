"""What the engine knows of a family of checkpoints: data and one table, from `converters/families/`."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .config import Fact
from .errors import ConversionError
from .rules import Table
from .spelling import Prefixed, Spelling


@dataclass(frozen=True)
class Family:
    """One architecture of the reference library.

    - `model_type`: its word in config.json; `defaults`: our config with the facts that config.json does not state.
    - `architectures`: the reference's class names, and the class of ours that each is. The first is
      the bare encoder.
    - `like`: classes of ours whose tensors are another's (a sentence embedder's are the bare encoder's).
    - `carries`: further classes of ours whose heads a file of an architecture holds, or a part of them: what is there
      is read, the rest drawn.
    - `prefix`: what stands before the encoder's keys in a file with a head (`bert.`); a bare encoder's has nothing.
    - `roots`: the first steps of a bare encoder's keys.
    - `facts`, `fixed`, `irrelevant`: see `config.read`.
    - `table(config, model_class)`: rules, ties, ignored keys; keys as in a file with a head, in today's spelling.
    - `observe(config, model_class, keys, fields)`: the config with what only the tensors decide, such as a pooler.
    - `legacy`: endings of old key names and what they are called now.
    - `probes(model_class)`: our modules and theirs that compute the same, in order of execution; `{i}` is a layer.
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

    def architecture(self, model_class: type) -> str:
        """What the reference calls this class of ours. Raises a `ConversionError` where it has no such model."""
        wanted = self.like.get(model_class, model_class)
        for name, one in self.architectures.items():
            if one is wanted:
                return name
        known = ", ".join(self.models)
        raise ConversionError(f"There is no {model_class.__name__} of {self.model_type}: that has {known}.")

    def is_bare(self, model_class: type) -> bool:
        """Whether the reference's class is the encoder alone, whose keys have no prefix."""
        return next(iter(self.architectures.values())) is self.like.get(model_class, model_class)

    @property
    def models(self) -> dict[str, type]:
        """Our classes by name."""
        return {one.__name__: one for one in (*self.architectures.values(), *self.like)}
