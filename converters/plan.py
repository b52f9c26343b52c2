"""From a directory to the complete plan of its conversion: which class, which facts, which link fills which array."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery.paths import is_array_like, leaves_by_path
from eqx_transformers.tensor_file import Spec

from . import config as configs
from .checkpoint import Checkpoint
from .errors import ConversionError, MalformedCheckpoint, UnsupportedConfig
from .examine import examine
from .family import Family
from .notes import Head, notes_of, of_shape
from .recognition import architecture_of, dotted_keys, dressed_as, family_of, model_class_of, spelling_of
from .report import Report
from .request import Request, config_of
from .rules import Ignore, Link, Table, Tie, expand
from .spelling import is_bare

FLOATS = ("F32", "F16", "BF16", "F64")
OUTPUT = "head.output."  # the layer whose size is the number of labels


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
    family = family_of(checkpoint.config) if family is None else family
    fields_ = configs.modern(checkpoint.config, family.older)
    spelling = spelling_of(checkpoint, family)
    names = _in_the_files_order(spelling.names(checkpoint.specs), checkpoint.specs)
    _expect_all_named(names, checkpoint.specs)
    dressed = dressed_as(checkpoint.directory, family, request.head)
    architecture = architecture_of(fields_, family, names, checkpoint)
    bare = bool(family.roots) and is_bare(dotted_keys(checkpoint), family)
    model_class = model_class_of(family, architecture, dressed, bare, request.head)
    stated = configs.read(
        fields_, family.facts, fixed=family.fixed, irrelevant=family.irrelevant, lenient=not request.strict
    )
    config = config_of(family, stated | (dressed or {}) | ({"tied": False} if untied else {}), request)
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
            *notes_of(checkpoint, fields_, family, request),
            *of_shape(untied, architecture, family, _head_of(bare, family, model_class, request, kept, names)),
        ),
    )
    plan = Plan(family, architecture, model_class, config, built, names, kept, table, report)
    _expect_floats(plan, checkpoint.specs)
    return plan


def _in_the_files_order(names: Mapping[str, str], keys: Collection[str]) -> dict[str, str]:
    place = {key: i for i, key in enumerate(keys)}
    return dict(sorted(names.items(), key=lambda item: place[item[1]]))


def _expect_all_named(names: Mapping[str, str], keys: Collection[str]) -> None:
    if lost := sorted(set(keys) - set(names.values())):
        raise MalformedCheckpoint(
            f"The checkpoint holds {lost[0]} and the same tensor by another name: which is right cannot be known."
            " Delete one of the two, or save the model again."
        )


def ties_in(plan: Plan) -> list[tuple[str, str]]:
    """(alias, owner), as the file spells them, of every tie of which the file has both names."""
    ties = [one for one in plan.table if isinstance(one, Tie)]
    return [(plan.names[t.theirs], plan.names[t.to]) for t in ties if t.theirs in plan.names and t.to in plan.names]


def _built(model_class: type, config: Any, request: Request, num_tensors: int) -> Any:
    """The skeleton; what cannot be built is no reason for a traceback, and millions of layers none to wait.

    Raises a `ConversionError` where blocks are to be stacked that differ.
    """
    layers = max(config.num_layers, getattr(config, "decoder_layers", 0))
    if layers > num_tensors:
        raise UnsupportedConfig(
            f"The config asks for {layers} layers, but all of the checkpoint is {num_tensors} tensors."
        )
    try:
        built = skeleton(model_class, config)
    except ValueError as error:
        raise UnsupportedConfig(f"The config describes a model that cannot be: {error}") from error
    try:
        return skeleton(model_class, config, True) if request.stacked else built
    except ValueError as error:
        raise ConversionError(
            f"stacked=True asks for one block in the place of all layers, but the layers of this model differ: {error}"
            " Load it without."
        ) from error


def _head_of(
    bare: bool,
    family: Family,
    model_class: type,
    request: Request,
    links: Sequence[Link],
    names: Collection[str],
) -> Head | None:
    """What a file whose keys are spelled as a bare model's has of its model's head; None of any other file."""
    if not bare or not family.is_prefixed(model_class) or not family.prefix or request.head is not None:
        return None
    keys = [key for link in links if not link.ours[0].startswith("backbone.") for key in link.keys]
    if not keys:
        return "tied"
    return "there" if all(key in names for key in keys) else "missing"


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
        in_head = family.in_head(model_class, path)
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
