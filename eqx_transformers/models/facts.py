"""What every config checks of itself, for those that are read from files and those that are written by hand."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args

from ..nn import ACTIVATIONS


def expect_activations(config: Any, names: Iterable[str]) -> None:
    for name in names:
        chosen = getattr(config, name)
        if chosen is not None and chosen not in ACTIVATIONS:
            raise ValueError(f"{name} = {chosen!r} is not one of {', '.join(ACTIVATIONS)}.")


def expect_at_least(least: int, config: Any, names: Iterable[str]) -> None:
    said = "must be at least 1" if least == 1 else "must not be negative"
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) < least:
            raise ValueError(f"{name} = {getattr(config, name)} {said}.")


def expect_words(config: Any) -> None:
    """Every word is one of those that the field's annotation allows."""
    for f in fields(config):
        value, allowed = getattr(config, f.name), _words(f.type)
        if allowed and isinstance(value, str) and value not in allowed:
            raise ValueError(f"{f.name} = {value!r} is not one of {', '.join(allowed)}.")


def expect_rates(config: Any) -> None:
    """Every dropout rate is a probability."""
    for site in (f.name for f in fields(config) if f.name.endswith("dropout")):
        rate = getattr(config, site)
        if isinstance(rate, int | float) and not isinstance(rate, bool) and not 0 <= rate <= 1:
            raise ValueError(f"{site} = {rate} is not a probability, from 0 to 1.")


def _words(kind: Any) -> tuple[str, ...]:
    """The words that an annotation allows, in a `Literal` of its own or as a part of a union."""
    parts = get_args(kind)
    return tuple(x for x in parts if isinstance(x, str)) or tuple(word for part in parts for word in _words(part))
