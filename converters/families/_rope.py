"""How config.json says how rotary positions turn: in one field today, in two that older files have."""

from collections.abc import Mapping
from typing import Any

from ..config import Fact, Older, number, some

# The kinds of scaling that are had here, and what each is said by.
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
OURS = ("factor", "low_freq_factor", "high_freq_factor")
ABSENT = {"factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # what our config has where nothing is said


def positive(value: Any) -> float:
    if number(value) <= 0:
        raise ValueError("expected a number above 0")
    return number(value)


def read(value: Any) -> tuple[Any, ...]:
    """Base, kind, factors and original positions, as `LlamaConfig` has them."""
    if not isinstance(value, Mapping):
        raise ValueError("expected a dictionary that says how rotary positions turn")
    kind = value.get("rope_type", value.get("type", "default"))
    if kind not in KINDS:
        raise ValueError(f"rotary positions of the kind {kind!r} are not had here, only {', '.join(KINDS)}")
    said = {k: v for k, v in value.items() if k not in ("rope_type", "type", "rope_theta") and v is not None}
    said = {k: v for k, v in said.items() if (k, v) != ("partial_rotary_factor", 1.0)}  # all of a head is turned
    if strange := sorted(said.keys() - set(KINDS[kind])):
        raise ValueError(f"{', '.join(strange)} is unknown of the kind {kind!r}")
    if missing := [name for name in OURS if name in KINDS[kind] and name not in said]:
        raise ValueError(f"the kind {kind!r} needs {', '.join(missing)}")
    factors = [positive(said.get(name, ABSENT[name])) for name in OURS]
    if factors[2] <= factors[1]:
        raise ValueError("high_freq_factor must be above low_freq_factor")
    original = said.get("original_max_position_embeddings")
    return positive(value.get("rope_theta", 10000.0)), kind, *factors, None if original is None else some(original)


def write(base: float, kind: str, *scaling: Any) -> tuple[dict[str, Any]]:
    """The inverse of `read`; what the kind is not said by is left out."""
    named: dict[str, Any] = dict(zip((*OURS, "original_max_position_embeddings"), scaling, strict=True))
    said = {name: named[name] for name in KINDS[kind] if named[name] is not None}
    return ({"rope_type": kind, "rope_theta": base, **said},)


FACT = Fact(
    ("rope_parameters",),
    (
        "rope_base",
        "rope_scaling",
        "rope_factor",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
        "rope_original_positions",
    ),
    read,
    write,
    ({},),
)


def _merged(fields: Mapping[str, Any]) -> Any:
    """As the reference merges them: what `rope_scaling` says counts, and a base inside counts before one beside it."""
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or fields.get("rope_theta") is None:
        return given
    return {"rope_theta": fields["rope_theta"], **given}


OLDER = Older("rope_parameters", ("rope_scaling", "rope_theta"), _merged)
