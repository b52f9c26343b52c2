"""What the engine knows of a family of checkpoints: data and one table, from `converters/families/`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import Fact
from .rules import Table


@dataclass(frozen=True)
class Family:
    """One architecture of the reference library.

    - `model_type`: its word in config.json; `defaults`: our config with the facts that config.json does not state.
    - `architectures`: the reference's class names, and the class of ours that each is. The first is
      the bare encoder.
    - `like`: classes of ours whose tensors are another's (a sentence embedder's are the bare encoder's).
    - `carries`: further architectures whose files hold the tensors of these classes of ours.
    - `prefix`: what stands before the encoder's keys in a file with a head (`bert.`); a bare encoder's has nothing.
    - `facts`, `fixed`, `irrelevant`: see `config.read`.
    - `table(config, model_class)`: rules, ties, ignored keys; keys as in a file with a head, in today's spelling.
    - `observe(config, model_class, keys, fields)`: the config with what only the tensors decide, such as a pooler.
    - `legacy`: endings of old key names and what they are called now.
    - `probes(model_class)`: our modules and theirs that compute the same, in order of execution; `{i}` is a layer.
    """

    model_type: str
    defaults: Any
    architectures: Mapping[str, type]
    like: Mapping[type, type]
    carries: Mapping[str, tuple[type, ...]]
    prefix: str
    facts: tuple[Fact, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    irrelevant: frozenset[str]
    table: Callable[[Any, type], Table]
    observe: Callable[[Any, type, frozenset[str], Mapping[str, Any]], Any]
    legacy: Mapping[str, str]
    probes: Callable[[type], tuple[tuple[str, str], ...]]

    def architecture(self, model_class: type) -> str:
        """What the reference calls this class of ours."""
        wanted = self.like.get(model_class, model_class)
        return next(name for name, one in self.architectures.items() if one is wanted)

    def is_bare(self, model_class: type) -> bool:
        """Whether the reference's class is the encoder alone, whose keys have no prefix."""
        return next(iter(self.architectures.values())) is self.like.get(model_class, model_class)

    @property
    def models(self) -> dict[str, type]:
        """Our classes by name."""
        return {one.__name__: one for one in (*self.architectures.values(), *self.like)}
