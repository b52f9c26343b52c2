"""config.json, fact by fact: what is read must be understood, and is written back by the same table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedConfig

MISSING: Any = object()


@dataclass(frozen=True)
class Fact:
    """Fields of config.json (`theirs`) that say fields of our config (`ours`): mostly one each, or some together.

    `read` makes our values of theirs, in order, and `write` theirs of ours; they are each other's inverse. `default`
    stands for absent fields, as the reference library's own defaults do. `read` raises a `ValueError` for what it does
    not understand.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Callable[..., tuple[Any, ...]]
    write: Callable[..., tuple[Any, ...]]
    default: tuple[Any, ...]

    def stated(self, fields: Mapping[str, Any]) -> tuple[Any, ...]:
        """Their values in a config; `MISSING` where neither it nor the default says one."""
        return tuple(fields.get(name, default) for name, default in zip(self.theirs, self.default, strict=True))


@dataclass(frozen=True)
class Older:
    """The field `new` as older configs spell it: `read` makes it of all fields where one of `old` is among them."""

    new: str
    old: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Any]


def renamed(new: str, old: str) -> Older:
    """A field that had another name; where a config has both, the new one counts."""
    return Older(new, (old,), lambda fields: fields[old] if fields.get(new) is None else fields[new])


def aliases(names: Mapping[str, str]) -> tuple[Older, ...]:
    """Names that the reference's config takes for its own, by the other one: where it has both, the alias counts."""
    return tuple(Older(own, (alias,), lambda fields, alias=alias: fields[alias]) for alias, own in names.items())


def _names(fields: Mapping[str, Any]) -> Any:
    count = fields["num_labels"]
    counted = {str(i): f"LABEL_{i}" for i in range(count)} if isinstance(count, int) else None
    return counted if fields.get("id2label") is None else fields["id2label"]


OLDER = (renamed("dtype", "torch_dtype"), Older("id2label", ("num_labels",), _names))


def modern(config: Mapping[str, Any], older: tuple[Older, ...] = OLDER) -> dict[str, Any]:
    """The fields under the names that the reference uses today; a null under an old name says nothing."""
    fields = dict(config)
    for one in older:
        if any(config.get(name) is not None for name in one.old):
            value = one.read(config)
            fields = {k: v for k, v in fields.items() if k not in one.old}
            fields |= {} if value is None else {one.new: value}
    return fields


def respelled(
    fields: Mapping[str, Any], original: Mapping[str, Any], older: tuple[Older, ...] = OLDER
) -> dict[str, Any]:
    """Today's fields with what `original` says too in the words that it has for it: the way back from `modern`."""
    today, back = modern(original, older), dict(fields)
    for one in older:
        said = {name: original[name] for name in (one.new, *one.old) if name in original}
        if said and back.get(one.new) == today.get(one.new):
            back = {k: v for k, v in back.items() if k != one.new} | said
    return back


def whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**31:
        raise ValueError("expected a whole number (of 32 bits)")
    return value


def some(value: Any) -> int:
    """A whole number that is not zero."""
    if whole(value) < 1:
        raise ValueError("expected 1 or more")
    return value


def number(value: Any) -> float:
    # Python's JSON has NaN and Infinity, and a whole number may be too large to be a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError("expected a number")
    return float(value)


def size(value: Any) -> float:
    """A number that is not negative."""
    if number(value) < 0:
        raise ValueError("expected 0 or more")
    return number(value)


def rate(value: Any) -> float:
    """A probability."""
    if not 0 <= number(value) <= 1:
        raise ValueError("expected a number from 0 to 1")
    return number(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def fact(theirs: str, ours: str, read: Callable[[Any], Any], default: Any = MISSING) -> Fact:
    """A fact that is spelled alike on both sides."""
    return Fact((theirs,), (ours,), lambda value: (read(value),), lambda value: (value,), (default,))


def choice(theirs: str, ours: str, names: Mapping[str, str], default: Any = MISSING) -> Fact:
    """A fact with a vocabulary: their words to ours. Where several of theirs mean one of ours, the first is written."""
    back = {our: their for their, our in reversed(list(names.items()))}

    def read(value: Any) -> tuple[str]:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return (names[value],)

    return Fact((theirs,), (ours,), read, lambda value: (back[value],), (default,))


def read(
    config: Mapping[str, Any],
    facts: tuple[Fact, ...],
    *,
    fixed: Mapping[str, tuple[Any, ...]],
    irrelevant: frozenset[str],
    lenient: bool = False,
) -> dict[str, Any]:
    """Our facts. Raises one `UnsupportedConfig` that names every field which is not understood.

    `fixed` fields may have these values only (the first is the reference's default); `irrelevant` ones may have any,
    since they do not change the function. A null says nothing and is ignored. `lenient` lets unknown fields pass.
    """
    wrong, ours = [], {}
    for one in facts:
        values = one.stated(config)
        if any(value is MISSING for value in values):
            wrong += [f"{name} is missing" for name, x in zip(one.theirs, values, strict=True) if x is MISSING]
            continue
        try:
            ours |= zip(one.ours, one.read(*values), strict=True)
        except ValueError as error:
            said = ", ".join(f"{name} = {value!r}" for name, value in zip(one.theirs, values, strict=True))
            wrong.append(f"{said}: {error}")
    for name, allowed in fixed.items():
        value = config.get(name)
        if value is not None and value not in allowed:
            wrong.append(f"{name} = {value!r} is not supported (only {' or '.join(map(repr, allowed))})")
    strange = [] if lenient else unknown(config, facts, fixed, irrelevant)
    wrong += [f"{name} = {_short(config[name])} is unknown" for name in strange]
    if wrong:
        hint = (
            " strict=False (--no-strict) ignores unknown fields, if you know that they change nothing."
            if strange
            else ""
        )
        lines = "\n  ".join(wrong)
        raise UnsupportedConfig(f"config.json has facts that are not understood:\n  {lines}\n{hint}".rstrip())
    return ours


def unknown(
    config: Mapping[str, Any], facts: tuple[Fact, ...], fixed: Mapping[str, Any], irrelevant: frozenset[str]
) -> list[str]:
    """The fields of which nothing is known; a null says nothing."""
    known = {name for one in facts for name in one.theirs} | fixed.keys() | irrelevant
    return sorted(name for name, value in config.items() if name not in known and value is not None)


def write(ours: Any, facts: tuple[Fact, ...], original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json's fields: the original's own where they still say the same, else as the reference spells them."""
    original = {} if original is None else original
    fields = dict(original)
    for one in facts:
        values = tuple(getattr(ours, name) for name in one.ours)
        said = one.stated(original) if original else (MISSING,)
        if any(value is MISSING for value in said) or one.read(*said) != values:
            fields |= zip(one.theirs, one.write(*values), strict=True)
    return fields


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
