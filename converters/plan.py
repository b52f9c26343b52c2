"""From a directory to the complete plan of its conversion: which class, which facts, which link fills which array."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery.paths import is_array_like, leaves_by_path
from eqx_transformers.tensor_file import Spec

from . import config as configs, flax_names, sentence
from .checkpoint import Checkpoint
from .errors import ConversionError, MalformedCheckpoint, UnsupportedConfig
from .examine import examine
from .families import FAMILIES
from .family import Family
from .report import Report
from .rules import Ignore, Link, Table, Tie, expand
from .spelling import Spelling, is_bare

FLOATS = ("F32", "F16", "BF16", "F64")
OUTPUT = "head.output."  # the layer whose size is the number of labels


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


def make_plan(
    checkpoint: Checkpoint,
    request: Request,
    untied: bool = False,
    family: Family | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Raises an `UnsupportedConfig` for what is not had here.

    `untied`: the tensors contradict a tied config. `family`: where the config does not name it. `notes` go into the
    report.
    """
    fields_ = configs.modern(checkpoint.config)
    family = _family(fields_) if family is None else family
    spelling = _spelling(checkpoint, family)
    names = spelling.names(checkpoint.specs)
    _expect_all_named(names, checkpoint.specs)
    dressed = _dressed(checkpoint.directory, family, request.head)
    architecture = _architecture(fields_, family, names, checkpoint)
    bare = bool(family.roots) and is_bare(_keys(checkpoint), family)
    model_class = _model_class(family, architecture, dressed, bare, request.head)
    stated = configs.read(
        fields_, family.facts, fixed=family.fixed, irrelevant=family.irrelevant, lenient=not request.strict
    )
    config = _config(family, stated | (dressed or {}) | ({"tied": False} if untied else {}), request)
    _expect_classifier(model_class, request)
    config = family.observe(config, model_class, frozenset(names), fields_)
    built = _built(model_class, config, request, len(checkpoint.specs))
    config = built.config  # a head has its own say: whether there is a pooler, how many labels
    leaves = {path: leaf for path, leaf in leaves_by_path(built).items() if is_array_like(leaf)}
    table = family.table(config, model_class)
    links = expand(table, leaves)
    new = _new(links, leaves, names, family, architecture, model_class, request, stated.get("labels"))
    kept = tuple(link for link in links if not new.intersection(link.ours))
    table = _with_surplus(table, kept, [link for link in links if new.intersection(link.ours)])
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
        config=config,
        notes=(
            *checkpoint.notes,
            *notes,
            *([flax_names.NOTE] if checkpoint.container == "flax" else []),
            *_unknown_note(fields_, family, request),
            *_dtype_note(fields_, checkpoint.specs),
            *_notes(untied, architecture, bare and not family.is_bare(model_class) and not request.head),
        ),
    )
    plan = Plan(family, architecture, model_class, config, built, names, kept, table, report)
    _expect_floats(plan, checkpoint.specs)
    return plan


def _spelling(checkpoint: Checkpoint, family: Family) -> Spelling:
    if checkpoint.container == "flax":
        return flax_names.Flax.of(checkpoint.specs, family)
    return family.spell(checkpoint.specs, family)


def _expect_all_named(names: Mapping[str, str], keys: Collection[str]) -> None:
    if lost := sorted(set(keys) - set(names.values())):
        raise MalformedCheckpoint(
            f"The checkpoint holds {lost[0]} and the same tensor by another name: which is right cannot be known."
            " Delete one of the two, or save the model again."
        )


def _keys(checkpoint: Checkpoint) -> Collection[str]:
    """The file's keys, with dots between their steps."""
    return [*map(flax_names.dotted, checkpoint.specs)] if checkpoint.container == "flax" else checkpoint.specs


def ties_in(plan: Plan) -> list[tuple[str, str]]:
    """(alias, owner), as the file spells them, of every tie of which the file has both names."""
    ties = [one for one in plan.table if isinstance(one, Tie)]
    return [(plan.names[t.theirs], plan.names[t.to]) for t in ties if t.theirs in plan.names and t.to in plan.names]


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


def _architecture(fields_: Mapping[str, Any], family: Family, names: Collection[str], checkpoint: Checkpoint) -> str:
    named = _list(fields_.get("architectures"))
    if named:
        return named[0]
    if family.recognise is not None:
        return family.recognise(names)
    unnamed = "an architecture that config.json does not name"
    return next(iter(family.architectures)) if is_bare(_keys(checkpoint), family) else unnamed


def _model_class(family: Family, architecture: str, dressed: Any, bare: bool, head: type | None) -> type:
    if head is not None:
        if head not in family.models.values():
            raise ConversionError(
                f"head={getattr(head, '__name__', repr(head))} is not a model of {family.model_type}; pass one of the"
                f" classes {', '.join(family.models)}."
            )
        return head
    found = family.architectures.get(architecture)
    if found is None:
        raise UnsupportedConfig(
            f"{architecture} is not supported; supported are:\n{supported()}\n"
            f"head= loads the encoder of any {family.model_type} file under one of {', '.join(family.models)}."
        )
    # sentence-transformers leaves the name of the class that its encoder was taken from; the tensors are the encoder's.
    found = next(iter(family.architectures.values())) if dressed and bare else found
    return next((one for one, like in family.like.items() if dressed and like is found), found)


def _config(family: Family, stated: Mapping[str, Any], request: Request) -> Any:
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


def _built(model_class: type, config: Any, request: Request, num_tensors: int) -> Any:
    """The skeleton; what cannot be built is no reason for a traceback, and millions of layers none to wait."""
    if config.num_layers > num_tensors:
        raise UnsupportedConfig(
            f"The config asks for {config.num_layers} layers, but all of the checkpoint is {num_tensors} tensors."
        )
    try:
        return skeleton(model_class, config, request.stacked)
    except ValueError as error:
        raise UnsupportedConfig(f"The config describes a model that cannot be: {error}") from error


def _dressed(directory: Path | None, family: Family, head: type | None) -> dict[str, Any] | None:
    """A sentence embedder's facts; one that is not understood does no harm where another model is asked for."""
    if directory is None:
        return None
    try:
        return sentence.read(directory)
    except UnsupportedConfig:
        if head is None or head in family.like:
            raise
        return None


def _expect_classifier(model_class: type, request: Request) -> None:
    if request.labels is not None and not getattr(model_class, "takes_labels", False):
        raise ConversionError(
            f"labels={request.labels} is for a classifier, and {model_class.__name__} is none; head= chooses one."
        )


def _expect_floats(plan: Plan, specs: Mapping[str, Spec]) -> None:
    """Every tensor that will be read holds numbers that an array of the model can hold."""
    read = [plan.names[key] for link in plan.links for key in link.keys if key in plan.names]
    read += [key for tie in ties_in(plan) for key in tie]
    if wrong := [f"{key} is {specs[key].dtype}" for key in dict.fromkeys(read) if specs[key].dtype not in FLOATS]:
        raise MalformedCheckpoint(
            f"{len(wrong)} tensors do not hold numbers that are read as weights: {', '.join(wrong[:3])}"
            f"{', …' if len(wrong) > 3 else ''}; expected {', '.join(FLOATS)}. If the checkpoint is quantized,"
            " convert the original one, or dequantize it first."
        )


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
    own = {family.architectures.get(architecture)}
    own |= {one for one, like in family.like.items() if like in own}
    borrowed = request.head is not None and model_class not in own
    related = model_class in family.carries.get(architecture, ())
    resized = request.num_labels is not None and request.num_labels != labels
    allowed = ("*",) if not request.strict else request.allow_missing

    def is_new(link: Link, path: str) -> bool:
        absent = any(key not in names for key in link.keys)
        in_head = not family.is_bare(model_class) and not path.startswith("backbone.")
        if borrowed and ((in_head and (absent or not related)) or (absent and ".pooler." in path)):
            return True
        if resized and path.startswith(OUTPUT):
            return True
        return absent and any(fnmatchcase(path, pattern) for pattern in allowed)

    return {path for link in links for path in link.ours if is_new(link, path)}


def _with_surplus(table: Table, read: Sequence[Link], drawn: Sequence[Link]) -> Table:
    """What is dropped is another head's. Beside keys that are read, one that no rule knows is a misspelling."""
    own = [key for link in read for key in link.keys]
    others = [one for one in table if not (isinstance(one, Ignore) and one.parameter and any(map(one.matches, own)))]
    replaced = [Ignore(key, "its array is drawn from the key instead", parameter=True) for k in drawn for key in k.keys]
    return (*others, *replaced)


def _unknown_note(fields_: Mapping[str, Any], family: Family, request: Request) -> tuple[str, ...]:
    strange = [] if request.strict else configs.unknown(fields_, family.facts, family.fixed, family.irrelevant)
    return (
        (f"fields of config.json of which nothing is known were passed over: {', '.join(strange)}",) if strange else ()
    )


# In config.json's words: the dtypes that a model is usually held in.
WORDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def _dtype_note(fields_: Mapping[str, Any], specs: Mapping[str, Spec]) -> tuple[str, ...]:
    said = fields_.get("dtype")
    found = sorted({s.dtype for s in specs.values() if s.dtype in FLOATS})
    if not isinstance(said, str) or WORDS.get(said, found[0]) in found or not found:
        return ()
    return (
        f"config.json says {said}, the tensors are {', '.join(found)}: they keep their own unless dtype= says more",
    )


def _notes(untied: bool, architecture: str, headless: bool) -> tuple[str, ...]:
    if headless:
        return (
            f"config.json names {architecture}, but the file holds the encoder alone: head=Encoder (--head Encoder)"
            " loads it",
        )
    if untied:
        return (
            "the file holds a decoder that differs from the token embedding, so the model is untied,"
            " as transformers 5 reads it",
        )
    return ()
