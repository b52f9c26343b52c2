"""Patterns of paths: `**.attention.{query,value}_proj`, `stack.blocks.[0:6].mlp`.

A pattern is a path as printed, its steps joined by dots, in which a step may be

| step | is |
|---|---|
| `name` | this one |
| `*` | any one |
| `**` | any number of steps, also none |
| `*_proj` | one whose name fits, `*` standing for any characters |
| `{query,value}_proj` | one of the alternatives, which may be empty: `{,cross_}attention` |
| `[0:6]`, `[-2:]`, `[-1]` | an index of a sequence: a Python slice of its length, or one index |

The empty pattern is the tree itself. A key of a dict that has dots is one step, which only `*` can stand for.
"""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import product
from typing import Any, NoReturn

from jax.tree_util import FlattenedIndexKey, SequenceKey

from .paths import spell

ANY_STEPS = "**"
INDICES = re.compile(r"\[(-?\d+)\]|\[(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?\]")


@dataclass(frozen=True)
class Step:
    """One step of a pattern: its text, and the names that it may have (`*` inside them), or its indices."""

    text: str
    names: tuple[str, ...] = ()
    indices: slice | None = None

    @property
    def is_any_steps(self) -> bool:
        return self.text == ANY_STEPS

    @property
    def is_index(self) -> bool:
        """Whether it says which elements of a sequence, and not merely that there is one."""
        return self.indices is not None or any(name.strip("*").isdigit() for name in self.names)

    def fits(self, key: Any, length: int) -> bool:
        """Whether it is the step that `key` takes, into a node that has `length` children."""
        if self.indices is not None:
            index = _index(key)
            return index is not None and index in range(length)[self.indices]
        name = spell((key,))
        return any(_fits(pattern, name) for pattern in self.names)

    def likeness(self, key: Any) -> float:
        """How much the name of `key` is like one of those it may have, for messages."""
        name = spell((key,))
        ratio = lambda wanted: SequenceMatcher(None, wanted.replace("*", ""), name).ratio()
        return max(map(ratio, self.names), default=0.0)


def _index(key: Any) -> int | None:
    if isinstance(key, SequenceKey):
        return key.idx
    return key.key if isinstance(key, FlattenedIndexKey) else None


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name, re.DOTALL) is not None


@dataclass(frozen=True)
class Pattern:
    """Follows a path step by step. `reached` are the places in the pattern that the path may have come to."""

    text: str
    steps: tuple[Step, ...]

    @property
    def start(self) -> frozenset[int]:
        """What the tree itself has reached."""
        return self._reach({0})

    def after(self, reached: frozenset[int], key: Any, length: int) -> frozenset[int]:
        """What is reached one step further, by `key` into a node that has `length` children."""
        ahead = [(i, self.steps[i]) for i in reached if i < len(self.steps)]
        staying = {i for i, step in ahead if step.is_any_steps}
        return self._reach(staying | {i + 1 for i, step in ahead if not step.is_any_steps and step.fits(key, length)})

    def matches(self, reached: frozenset[int]) -> bool:
        """Whether a path that reached this is one of the pattern's."""
        return len(self.steps) in reached

    def index(self, reached: frozenset[int]) -> Step | None:
        """The step that asks for an index next, if one does."""
        ahead = [self.steps[i] for i in sorted(reached) if i < len(self.steps)]
        return next((step for step in ahead if step.is_index), None)

    def and_below(self) -> "Pattern":
        """The same, and all that lies below."""
        return Pattern(self.text, (*self.steps, Step(ANY_STEPS)))

    def _reach(self, places: set[int]) -> frozenset[int]:
        """`**` may be no step at all."""
        reached = set()
        for i in places:
            reached.add(i)
            while i < len(self.steps) and self.steps[i].is_any_steps:
                i += 1
                reached.add(i)
        return frozenset(reached)


def parse(text: str) -> Pattern:
    """The pattern that is spelled so. Raises a `ValueError` that points to the place where it is malformed."""
    steps, place = [], 0
    for step in text.split(".") if text else []:
        steps.append(_step(text, step, place))
        place += len(step) + 1
    return Pattern(text, tuple(steps))


def _step(pattern: str, text: str, place: int) -> Step:
    if not text:
        _fail(pattern, place, "there is no step before, between or behind these dots")
    if text == ANY_STEPS:
        return Step(text)
    if ANY_STEPS in text:
        _fail(pattern, place + text.index(ANY_STEPS), "** is a step of its own; within a name, * is any characters")
    if "[" in text or "]" in text:
        return Step(text, indices=_slice(pattern, text, place))
    return Step(text, names=_names(pattern, text, place))


def _slice(pattern: str, text: str, place: int) -> slice:
    found = INDICES.fullmatch(text)
    if found is None:
        _fail(pattern, place, "a step with brackets is [start:stop], [start:stop:step] or [index], of whole numbers")
    one, *ends = (None if n is None else int(n) for n in found.groups())
    if ends[-1] == 0:
        _fail(pattern, place, "the step of a slice is not 0")
    return slice(*ends) if one is None else slice(one, one + 1 or None)  # [-1] has no end


def _names(pattern: str, text: str, place: int) -> tuple[str, ...]:
    choices = []
    for piece in re.split(r"(\{[^{}]*\})", text):
        is_group = len(piece) > 1 and piece[0] == "{" and piece[-1] == "}"
        if piece == "{}":
            _fail(pattern, place, "there are no alternatives between these braces")
        if not is_group and (wrong := re.search("[{},]", piece)):
            _fail(
                pattern, place + wrong.start(), "alternatives are {a,b} within one step; braces close and do not nest"
            )
        choices.append(piece[1:-1].split(",") if is_group else [piece])
        place += len(piece)
    return tuple(map("".join, product(*choices)))


def _fail(pattern: str, place: int, why: str) -> NoReturn:
    raise ValueError(f"This pattern of paths is malformed: {why}.\n  {pattern}\n  {' ' * place}^")
