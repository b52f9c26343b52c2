"""config.json, fact by fact: what is read must be understood, and is written back by the same table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedConfig

MISSING: Any = object()


@dataclass(frozen=True)
class Fact:
    """One field of config.json (`theirs`) and one of our config (`ours`): `read` and `write` are each other's inverse.

    `default` stands for an absent field, as the reference library's own default does. `read` raises a `ValueError`
    for what it does not understand.
    """

    theirs: str
    ours: str
    read: Callable[[Any], Any]
    write: Callable[[Any], Any]
    default: Any = MISSING


def modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields under the names that the reference uses today; the value of an old name yields to a new one."""
    fields = dict(config)
    if "torch_dtype" in fields:
        fields.setdefault("dtype", fields["torch_dtype"])
    if fields.get("id2label") is None and isinstance(fields.get("num_labels"), int):
        fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(fields["num_labels"])}
    return fields


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
    return Fact(theirs, ours, read, lambda value: value, default)


def choice(theirs: str, ours: str, names: Mapping[str, str], default: Any = MISSING) -> Fact:
    """A fact with a vocabulary: their words to ours. Where several of theirs mean one of ours, the first is written."""
    back = {our: their for their, our in reversed(list(names.items()))}

    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return names[value]

    return Fact(theirs, ours, read, back.__getitem__, default)


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
        value = config.get(one.theirs, one.default)
        if value is MISSING:
            wrong.append(f"{one.theirs} is missing")
            continue
        try:
            ours[one.ours] = one.read(value)
        except ValueError as error:
            wrong.append(f"{one.theirs} = {value!r}: {error}")
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
    known = {one.theirs for one in facts} | fixed.keys() | irrelevant
    return sorted(name for name, value in config.items() if name not in known and value is not None)


def write(ours: Any, facts: tuple[Fact, ...], original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json's fields: the original's own where they still say the same, else as the reference spells them."""
    original = {} if original is None else original
    fields = dict(original)
    for one in facts:
        value = getattr(ours, one.ours)
        said = original.get(one.theirs, one.default if original else MISSING)
        if said is MISSING or one.read(said) != value:
            fields[one.theirs] = one.write(value)
    return fields


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
