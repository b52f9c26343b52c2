"""Whether an adapter fits a model: all that is missing, unexpected or of another shape, and what is behind it."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from eqx_transformers.tensor_file import Spec

from ..errors import ConversionError, Mismatch
from ..origin import Origin
from ..report import Report, nearest
from .expected import FACTORS, PREFIX, Layer, Shape, ends, is_extra, parameter_of, wanted
from .modules import WEIGHT, Modules
from .settings import Settings

Shapes = dict[str, tuple[Shape, Shape]]


@dataclass(frozen=True)
class Offer:
    """What a directory has for a model, from headers: `specs` by names without the prefix (`?` before other names)."""

    where: str
    settings: Settings
    modules: Modules
    layers: list[Layer]
    specs: Mapping[str, Spec]


def expect_fit(offer: Offer, shape_of: Callable[[str], Shape], model: Any, origin: Origin | None) -> None:
    """Raises a `Mismatch` that says all of it. `shape_of` gives that of a parameter of the model."""
    need = wanted(offer.settings, offer.modules, offer.layers)
    missing = {PREFIX + name: "" for name in sorted(need.keys() - offer.specs.keys())}
    stray = [n for n in offer.specs if n not in need and not is_extra(n, offer.settings, offer.modules, offer.layers)]
    wrong = _wrong(offer, need, stray, shape_of)
    if not offer.specs and not missing:
        raise ConversionError(f"{offer.where} holds no tensors of an adapter.")
    if missing or stray or wrong:
        known = [PREFIX + name for name in {*need, *offer.modules.sites, *offer.modules.ties}]
        unexpected = {_shown(name): nearest(_shown(name), known) for name in stray}
        causes = tuple(_causes(offer, need, wrong, model, origin))
        of = f"{offer.settings.kind} of {offer.settings.model_class or offer.settings.base or 'a base without a name'}"
        name, size = type(model).__name__, len(offer.specs)
        report = Report(of, name, missing, unexpected, wrong, num_tensors=size, causes=causes)
        raise Mismatch(_message(offer.where, report), report)


def _wrong(
    offer: Offer, need: Mapping[str, Shape | None], stray: list[str], shape_of: Callable[[str], Shape]
) -> Shapes:
    """(expected, found) of what is there in another shape."""
    found: Shapes = {}
    for name, spec in offer.specs.items():
        if name in stray or not (name in need or is_parameter(offer.modules, name)):
            continue
        shape = need.get(name) or shape_of(parameter_of(name))
        if shape != spec.shape:
            found[PREFIX + name] = shape, spec.shape
    return found


def is_parameter(modules: Modules, name: str) -> bool:
    """Whether a tensor is a parameter of the base, under an adapter or not."""
    return parameter_of(name) in modules.parameters or parameter_of(name) in modules.ties


def _shown(name: str) -> str:
    return name[1:] if name.startswith("?") else PREFIX + name


def _message(where: str, report: Report) -> str:
    lines = [f"The adapter in {where} does not fit this {report.model}."]
    lines += [f"  likely cause: {cause}" for cause in report.causes]
    sections = {
        "missing": list(report.missing),
        "unexpected": [f"{key}{near}" for key, near in report.unexpected.items()],
        "mismatched": [f"{key}: expected {list(a)}, found {list(b)}" for key, (a, b) in report.mismatched.items()],
    }
    for name, found in sections.items():
        lines += [f"  {name:<11} {len(found):>4}", *(f"      {line}" for line in found[:12])]
        lines += [f"      … and {len(found) - 12} more"] if len(found) > 12 else []
    return "\n".join(lines)


def _causes(offer: Offer, need: Iterable[str], wrong: Shapes, model: Any, origin: Origin | None) -> Iterator[str]:
    if any(name.startswith("?") for name in offer.specs):
        yield f"PEFT's tensors begin with {PREFIX!r}; these are of another program, or of a part of a model."
    tables = [key for key in wrong if is_parameter(offer.modules, key.removeprefix(PREFIX))]
    if tables and wrong[tables[0]][0][1:] == wrong[tables[0]][1][1:]:
        yield (
            f"the vocabulary or the labels were resized to {wrong[tables[0]][1][0]} before the training. Do the same to"
            " the base first: reconfigure(model, grow, vocab_size=…), or load(…, labels=…)."
        )
    ours = {*offer.modules.sites, *(alias.removesuffix(WEIGHT) for alias in offer.modules.ties)}
    theirs = _modules(offer.specs)
    if theirs and not any(name in ours for name in theirs):
        yield _of_another(offer, theirs, ours, type(model).__name__, origin)
    elif sizes := [*_widths(wrong), *_depths(theirs, _modules(need))]:
        base = f", {offer.settings.base!r}" if offer.settings.base else ""
        yield f"it is an adapter of another base{base}: {'; '.join(sizes)}.{_came(origin)}"


def _of_another(offer: Offer, theirs: list[str], ours: set[str], model: str, origin: Origin | None) -> str:
    """What an adapter is of whose modules are all unknown."""
    prefix = offer.modules.prefix
    if any(name.removeprefix(prefix) in ours or prefix + name in ours for name in theirs):
        return (
            f"it is of another class than {model}, with or without {prefix!r} before its names: load the base with the"
            " head that it was trained with (head=…)."
        )
    kind = f", a {offer.settings.model_class}" if offer.settings.model_class else ""
    return (
        f"it is an adapter for another architecture: {', '.join(theirs[:3])}{', …' if len(theirs) > 3 else ''} do not"
        f" exist here. Its base is {offer.settings.base!r}{kind}.{_came(origin)}"
    )


def _came(origin: Origin | None) -> str:
    return "" if origin is None else f" This model came from {origin.source!r}."


def _widths(wrong: Shapes) -> Iterator[str]:
    """Of the first factor that is for a layer of another size, both sizes; not of one that has another rank."""
    for name, shapes in wrong.items():
        if name.endswith(FACTORS) and not name.endswith(ends(True)[0]):  # whose size is the vocabulary's
            ours, theirs = (max(x) if name.endswith(".ia3_l") else x[name.endswith(ends(False)[0])] for x in shapes)
            if ours != theirs:
                yield f"{_module(name.removeprefix(PREFIX))} has {theirs} numbers there and {ours} here"
                return


def _depths(theirs: Iterable[str], needed: Iterable[str]) -> Iterator[str]:
    """Where the last layer is another one: how many there are on both sides."""
    ours = _counts(needed)
    for stem, count in _counts(theirs).items():
        if count != ours.get(stem, count):
            yield f"{stem} has {count} layers there and {ours[stem]} here"


def _counts(modules: Iterable[str]) -> dict[str, int]:
    numbered = [found for name in modules if (found := re.match(r"(.*?)\.(\d+)\.", name))]
    return {stem: 1 + max(int(x[2]) for x in numbered if x[1] == stem) for stem in sorted({x[1] for x in numbered})}


def _modules(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(_module(name) for name in names if name.endswith(FACTORS)))


def _module(name: str) -> str:
    return next(name.removesuffix(end) for end in FACTORS if name.endswith(end))
