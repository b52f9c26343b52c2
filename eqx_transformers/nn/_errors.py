"""Errors that say where they happened, and checks that a user can switch on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import equinox as eqx
from jaxtyping import Array, Bool, Shaped

_AT = "at "


@contextmanager
def within(step: str) -> Iterator[None]:
    """Adds `step` to the path that an exception from inside carries as its note: `at blocks.3.attention.query_proj`."""
    try:
        yield
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        # Not always the last one: JAX adds a note of its own where an exception leaves it.
        place = next((i for i, note in enumerate(notes) if note.startswith(_AT)), None)
        if place is None:
            error.add_note(f"{_AT}{step}")
        else:
            notes[place] = f"{_AT}{step}.{notes[place].removeprefix(_AT)}"
        raise


def expect_last_axis(module: eqx.Module, name: str, expected: int, shape: tuple[int, ...]) -> None:
    """Raises a ValueError when the last axis of an input is not what the module's own arrays say."""
    if not shape or shape[-1] != expected:
        kind = type(module).__name__
        raise ValueError(f"{kind}: the last axis of its input must be {name} = {expected}, but the input is {shape}.")


def checking() -> bool:
    """Whether `EQX_TRANSFORMERS_CHECK=1` asks for checks of values at run time; read while tracing."""
    return os.environ.get("EQX_TRANSFORMERS_CHECK") == "1"


def error_if(x: Shaped[Array, "..."], wrong: Bool[Array, "..."], message: str) -> Shaped[Array, "..."]:
    """`x`, which raises at run time where anything is `wrong`, if checking is on; costs nothing otherwise."""
    return eqx.error_if(x, wrong, message) if checking() else x
