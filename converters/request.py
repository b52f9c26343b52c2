"""What `load` is asked for, and the config of ours that this and a config.json make together."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from .errors import ConversionError, UnsupportedConfig
from .family import Family


@dataclass(frozen=True)
class Request:
    """What `load` was asked for, beside the source."""

    head: type | None = None
    labels: int | Sequence[str] | None = None
    override: Mapping[str, Any] | None = None
    stacked: bool = False
    strict: bool = True
    allow_missing: Collection[str] = ()
    allow_unexpected: Collection[str] = ()

    def __post_init__(self):
        labels = self.labels
        if isinstance(labels, str | bool) or not isinstance(labels, int | Sequence | None):
            raise ConversionError(f"labels = {labels!r}: expected how many, or a list of their names.")
        if self.num_labels is not None and self.num_labels < 1:
            raise ConversionError(f"labels = {labels!r}: expected how many (at least 1), or a list of their names.")
        if not isinstance(labels, int | None) and len(set(labels)) != len(labels):
            raise ConversionError(f"labels = {list(labels)}: two labels have one name.")

    @property
    def num_labels(self) -> int | None:
        return self.labels if self.labels is None or isinstance(self.labels, int) else len(self.labels)


def config_of(family: Family, stated: Mapping[str, Any], request: Request) -> Any:
    override = dict(request.override or {})
    known = {f.name: f.type for f in fields(family.defaults)}
    if strange := sorted(override.keys() - known.keys()):
        raise ConversionError(
            f"override: {', '.join(strange)} is not a fact of this model; its facts are {', '.join(known)}."
        )
    for name, value in override.items():
        if not _fits(value, known[name]):
            kind = known[name].__name__ if isinstance(known[name], type) else known[name]
            raise ConversionError(f"override: {name} = {value!r}, expected {kind}.")
    if request.num_labels is not None:
        override["labels"] = request.num_labels
    try:
        return replace(family.defaults, **(dict(stated) | override))
    except ValueError as error:
        if override:
            raise ConversionError(f"config.json with {override} describes a model that cannot be: {error}") from error
        raise UnsupportedConfig(f"config.json describes a model that cannot be: {error}") from error


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: the checks that the test suite switches on, for users too."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in args
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, args[0]) for one in value)
    return isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
