"""From a directory to the complete plan of its conversion: which class, which facts, which link fills which array."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery.paths import is_array_like, leaves_by_path
from eqx_transformers.tensor_file import Spec

from . import config as configs, sentence
from .checkpoint import Checkpoint
from .errors import ConversionError, UnsupportedConfig
from .families import FAMILIES
from .family import Family
from .report import Report, examine
from .rules import Ignore, Link, Rule, Table, Tie, expand


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

    @property
    def num_labels(self) -> int | None:
        return self.labels if self.labels is None or isinstance(self.labels, int) else len(self.labels)


@dataclass(frozen=True)
class Plan:
    """Everything about a conversion but the numbers. `names` gives a key of today as the file spells it."""

    family: Family
    architecture: str
    model_class: type
    config: Any
    skeleton: Any
    names: Mapping[str, str]
    links: tuple[Link, ...]
    table: Table
    report: Report


def make_plan(checkpoint: Checkpoint, request: Request, untied: bool = False) -> Plan:
    """Raises an `UnsupportedConfig` for what this library does not have. `untied`: the tensors contradict a tied config."""
    fields_ = configs.modern(checkpoint.config)
    family = _family(fields_)
    dressed = sentence.read(checkpoint.directory)
    architecture = _architecture(fields_, family, checkpoint)
    model_class = _model_class(family, architecture, dressed, request.head)
    stated = configs.read(
        fields_, family.facts, fixed=family.fixed, irrelevant=family.irrelevant, lenient=not request.strict
    )
    config = _config(family, stated | (dressed or {}) | ({"tied": False} if untied else {}), request)
    spelling = Spelling.of(checkpoint.specs, family)
    names = {spelling.modern(key): key for key in checkpoint.specs}
    config = family.observe(config, model_class, frozenset(names), fields_)
    built = skeleton(model_class, config, request.stacked)
    leaves = {path: leaf for path, leaf in leaves_by_path(built).items() if is_array_like(leaf)}
    table = family.table(config, model_class)
    links = expand(table, leaves)
    new = _new(links, leaves, names, family, architecture, model_class, request, stated.get("labels"))
    kept = tuple(link for link in links if not new.intersection(link.ours))
    report = examine(
        table,
        kept,
        leaves,
        {key: checkpoint.specs[actual] for key, actual in names.items()},
        lambda key: names.get(key) or spelling.old(key),
        new=new,
        allow_unexpected=request.allow_unexpected if request.strict else ("*",),
        architecture=architecture,
        model=model_class.__name__,
        notes=_notes(untied),
    )
    return Plan(family, architecture, model_class, config, built, names, kept, table, report)


def ties_in(plan: Plan) -> list[tuple[str, str]]:
    """(alias, owner), as the file spells them, of every tie of which the file has both names."""
    ties = [one for one in plan.table if isinstance(one, Tie)]
    return [(plan.names[t.theirs], plan.names[t.to]) for t in ties if t.theirs in plan.names and t.to in plan.names]


@dataclass(frozen=True)
class Spelling:
    """How a file spells keys: with or without the encoder's prefix, in old or new endings."""

    prefix: str
    bare: bool
    legacy: Mapping[str, str]
    old_endings: bool

    @classmethod
    def of(cls, specs: Mapping[str, Spec], family: Family) -> "Spelling":
        bare = not any(key.startswith(family.prefix) for key in specs)
        old = any(key.endswith(ending) for key in specs for ending in family.legacy)
        return cls(family.prefix, bare, family.legacy, old)

    def modern(self, key: str) -> str:
        """The key as a file with a head spells it today."""
        for old, new in self.legacy.items():
            if key.endswith(old):
                key = key.removesuffix(old) + new
        is_encoder = key.split(".")[0] in ("embeddings", "encoder", "pooler")
        return self.prefix + key if self.bare and is_encoder else key

    def old(self, key: str) -> str:
        """A key that the file lacks, as it would spell it."""
        for old, new in self.legacy.items() if self.old_endings else ():
            if key.endswith(new):
                key = key.removesuffix(new) + old
        return key.removeprefix(self.prefix) if self.bare else key


def _family(fields_: Mapping[str, Any]) -> Family:
    name = fields_.get("model_type")
    by_architecture = {a: f for f in FAMILIES.values() for a in (*f.architectures, *f.carries)}
    named = [a for a in _list(fields_.get("architectures")) if a in by_architecture]
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    if name is None and named:
        return by_architecture[named[0]]
    stated = f"model_type {name!r}" if name is not None else "no model_type"
    raise UnsupportedConfig(
        f"config.json has {stated} (architectures: {fields_.get('architectures')}); supported are:\n{supported()}"
    )


def supported() -> str:
    """The architectures that are converted, a line a family."""
    return "\n".join(f"  {name}: {', '.join(family.architectures)}" for name, family in FAMILIES.items())


def _list(value: Any) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list | tuple) else []


def _architecture(fields_: Mapping[str, Any], family: Family, checkpoint: Checkpoint) -> str:
    named = _list(fields_.get("architectures"))
    if named:
        return named[0]
    bare = not any(key.startswith(family.prefix) for key in checkpoint.specs)
    return next(iter(family.architectures)) if bare else "an unnamed architecture"


def _model_class(family: Family, architecture: str, dressed: Any, head: type | None) -> type:
    if head is not None:
        if head not in family.models.values():
            raise ConversionError(
                f"head={getattr(head, '__name__', head)} is not a head of {family.model_type}:"
                f" {', '.join(family.models)}."
            )
        return head
    found = family.architectures.get(architecture)
    if found is None:
        raise UnsupportedConfig(
            f"{architecture} is not supported; supported are:\n{supported()}\n"
            f"head= loads the encoder of any {family.model_type} file under one of {', '.join(family.models)}."
        )
    return next((one for one, like in family.like.items() if dressed and like is found), found)


def _config(family: Family, stated: Mapping[str, Any], request: Request) -> Any:
    override = dict(request.override or {})
    if request.num_labels is not None:
        override["labels"] = request.num_labels
    known = [f.name for f in fields(family.defaults)]
    if strange := sorted(override.keys() - set(known)):
        raise ConversionError(
            f"override: {', '.join(strange)} is not a fact of this model; its facts are {', '.join(known)}."
        )
    try:
        return replace(family.defaults, **(dict(stated) | override))
    except ValueError as error:
        raise UnsupportedConfig(f"config.json describes a model that cannot be: {error}") from error


def _new(
    links: Sequence[Link],
    leaves: Mapping[str, Any],
    names: Mapping[str, str],
    family: Family,
    architecture: str,
    model_class: type,
    request: Request,
    labels: int | None,
) -> set[str]:
    """The arrays that are drawn instead of read: a head that the file does not have, and what may be missing."""
    own = {family.architectures.get(architecture), *family.carries.get(architecture, ())}
    own |= {one for one, like in family.like.items() if like in own}
    borrowed = request.head is not None and model_class not in own
    resized = request.num_labels is not None and request.num_labels != labels
    allowed = ("*",) if not request.strict else request.allow_missing

    def is_new(link: Link, path: str) -> bool:
        absent = any(key not in names for key in link.keys)
        if borrowed and (path.startswith("head.") or (absent and ".pooler." in path)):
            return True
        if resized and path.startswith("head.output."):
            return True
        return absent and any(fnmatchcase(path, pattern) for pattern in allowed)

    return {path for link in links for path in link.ours if is_new(link, path)}


def _notes(untied: bool) -> tuple[str, ...]:
    if untied:
        return (
            "the file holds a decoder that differs from the token embedding, so the model is untied, as transformers 5 reads it",
        )
    return ()


__all__ = ["Ignore", "Plan", "Request", "Rule", "Spelling", "make_plan", "supported", "ties_in"]
