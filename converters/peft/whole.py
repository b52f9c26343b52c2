"""Parameters that an adapter's directory holds whole: modules that were trained themselves, and biases."""

from collections.abc import Sequence

import numpy as np

from ..errors import ConversionError
from . import tree as trees
from .modules import Modules
from .targets import is_saved
from .tree import Tree


def saved_modules(modules: Modules, paths: Sequence[str]) -> tuple[str, ...]:
    """The reference's modules that hold the parameters at these paths of ours, and nothing else."""
    found: list[str] = []
    for path in paths:
        is_inside = lambda link: any(own == path or own.startswith(f"{path}.") for own in link.ours)  # noqa: B023
        names = {name for name, (link, _) in modules.parameters.items() if is_inside(link)}
        if not names:
            known = sorted({own.rpartition(".")[0] for link, _ in modules.parameters.values() for own in link.ours})
            raise ConversionError(f"modules_to_save: there are no parameters at {path!r}. There are {_few(known)}.")
        names |= {alias for alias, to in modules.ties.items() if to in names}
        found += _around(names, {*modules.parameters, *modules.ties}, path)
    return tuple(dict.fromkeys(found))


def _around(names: set[str], everything: set[str], path: str) -> list[str]:
    """The outermost modules of which all parameters are among these."""
    outermost: list[str] = []
    for name in sorted(names, key=lambda name: (name.count("."), name)):
        steps = name.split(".")[:-1]
        modules = [".".join(steps[:i]) for i in range(1, len(steps) + 1)]
        whole = [m for m in modules if {n for n in everything if is_saved(n, (m,))} <= names]
        if not whole:
            other = next(n for n in sorted(everything - names) if is_saved(n, (modules[-1],)))
            raise ConversionError(
                f"modules_to_save: {path!r} is a part of the reference's {modules[-1]!r}, which also holds {other}."
                " Name the path of all of it."
            )
        outermost.append(whole[0])
    return outermost


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def parameters(
    tree: Tree, modules: Modules, saved: tuple[str, ...], bias: str, adapted: set[str]
) -> dict[str, np.ndarray]:
    """Whole parameters, by the names that PEFT has for them."""
    keys: dict[str, str] = {}
    for name in (*modules.parameters, *modules.ties):
        module, _, last = name.rpartition(".")
        if is_saved(name, saved):
            keys[name] = name
        elif last == "bias" and (bias == "all" or (bias == "lora_only" and module in adapted)):
            keys[name] = f"{module}.base_layer.bias" if module in adapted else name
    held = trees.written(tree, modules, list(keys))
    return {key: held[name] for name, key in keys.items()}
