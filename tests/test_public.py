"""Every public name has a docstring, and a test that uses it."""

import ast
import functools
import inspect
import sys
from pathlib import Path

import pytest

import converters
import eqx_transformers
import eqx_transformers.nn
import eqx_transformers.sharding
import eqx_transformers.training

HERE = Path(__file__)
OURS = ("eqx_transformers", "converters")


def exported(package) -> list[str]:
    """The names that a package's `__init__` exports: those it imports as themselves, `X as X`."""
    tree = ast.parse(Path(package.__file__).read_text())
    aliases = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    return [alias.asname for alias in aliases if alias.asname == alias.name]


def used(source: str) -> set[str]:
    """What code reads of our packages, by dotted name. Importing something is no use of it, nor is a string."""
    nodes = list(ast.walk(ast.parse(source)))
    local = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            local |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            local |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return local.get(node.id)
        base = dotted(node.value) if isinstance(node, ast.Attribute) else None
        return base and f"{base}.{node.attr}"

    names = {dotted(node) for node in nodes if isinstance(getattr(node, "ctx", None), ast.Load)}
    return {name for name in names if name and name.split(".")[0] in OURS}


def test_the_readers_of_names_are_not_fooled():
    source = """
import numpy as np
import converters
from eqx_transformers import nn, BERT, load as read, save
np.stack([nn.relu(BERT.labels)])
read("save")
f(save=1, g=converters.export)
converters.x = x.converters.inspect
"""
    assert used(source) == {
        "converters",
        "converters.export",
        "eqx_transformers.BERT",
        "eqx_transformers.BERT.labels",
        "eqx_transformers.load",
        "eqx_transformers.nn",
        "eqx_transformers.nn.relu",
    }
    assert {"Encoder", "load", "stack"} <= set(exported(eqx_transformers))
    assert {"Linear", "kernels", "Mask"} <= set(exported(eqx_transformers.nn))
    assert {"load", "Mismatch", "Report"} <= set(exported(converters))


def resolved(name: str) -> list[object]:
    """What a dotted name may mean: `converters.verify` is a module and, on its package, a function."""
    package, _, last = name.rpartition(".")
    owners = resolved(package) if package else []
    found = [getattr(owner, last) for owner in owners if hasattr(owner, last)]
    return [*found, sys.modules[name]] if name in sys.modules else found


@functools.cache
def uses() -> list[object]:
    """Objects, not names: `nn.stack` and `eqx_transformers.stack` are one."""
    files = [file for file in HERE.parent.rglob("*.py") if file != HERE]
    names = set().union(*(used(file.read_text()) for file in files))
    return [x for name in sorted(names) for x in resolved(name)]


DOORS = (
    eqx_transformers,
    eqx_transformers.nn,
    eqx_transformers.surgery,
    eqx_transformers.expression,
    eqx_transformers.generation,
    eqx_transformers.training,
    eqx_transformers.sharding,
    converters,
    converters.peft,
)
PUBLIC = [
    pytest.param(getattr(package, name), id=f"{package.__name__}.{name}")
    for package in DOORS
    for name in exported(package)
]


@pytest.mark.parametrize("thing", PUBLIC)
def test_a_public_name_is_used_by_a_test(thing):
    assert any(thing is x for x in uses())


@pytest.mark.parametrize("thing", PUBLIC)
def test_a_public_function_or_class_has_a_docstring(thing):
    things = [thing] if callable(thing) else []
    if inspect.ismodule(thing):
        own = [x for name, x in vars(thing).items() if not name.startswith("_") and inspect.isfunction(x)]
        things = [thing, *(x for x in own if x.__module__ == thing.__name__)]
    for x in things:
        said = inspect.getdoc(x)
        # A dataclass without one writes its signature there, which says nothing.
        assert said and not said.startswith(f"{x.__name__}("), x
