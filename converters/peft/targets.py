"""Which modules an adapter's configuration means, by the rules of the PEFT library (its tuners_utils.py, 0.21)."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

Names = str | tuple[str, ...]
ALL_LINEAR = "all-linear"


def is_target(
    name: str,
    targets: Names,
    exclude: Names | None = None,
    saved: Iterable[str] = (),
    layers: tuple[int, ...] | None = None,
    pattern: tuple[str, ...] = (),
) -> bool:
    """Whether an adapter stands on the module of this name.

    `targets` and `exclude` are a regular expression for the whole name, or names and ends of names. What lies in a
    module of `saved` is trained itself. `layers` are those of the first number in a name, or of the number behind a
    step that is like `pattern`.
    """
    if exclude and _is_named(name, exclude):
        return False
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:  # a whole name counts in any layer
        return True
    return _is_named(name, targets) and (not layers or _layer(name, pattern) in layers)


def _is_named(name: str, names: Names) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return name in names or any(name.endswith(f".{end}") for end in names)


def _layer(name: str, patterns: tuple[str, ...]) -> int | None:
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns]
    found = found if patterns else [re.match(r".*?\.[^.]*\.(\d+)\.", name)]
    return next((int(match[1]) for match in found if match), None)


def matched(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """What the first pattern says that a name ends with, as `rank_pattern` and `alpha_pattern` mean it."""
    hits = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(hits, default)


def is_saved(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter lies in one of these modules, each the end of a module's name."""
    steps = name.split(".")[:-1]
    around = [".".join(steps[:i]) for i in range(1, len(steps) + 1)]
    return any(module.endswith(end) for module in around for end in modules)
