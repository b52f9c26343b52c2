"""Who may import whom, read off the source; and what `import` alone must not load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p.relative_to(ROOT) for name in ("eqx_transformers", "converters") for p in (ROOT / name).rglob("*.py"))
# Heavy, optional, or both: imported by the function that needs them.
LATE = {"torch", "transformers", "huggingface_hub", "tokenizers", "sentence_transformers", "peft", "beartype"}
LATE |= {"matplotlib", "elementpath", "treescope", "grain", "orbax"}


class Import(NamedTuple):
    """One imported module by its absolute name, and whether the statement stands inside a function."""

    name: str
    late: bool

    @property
    def package(self) -> str:
        return self.name.split(".")[0]


def imports(path: Path, source: str | None = None) -> list[Import]:
    """Every import of a file, wherever it stands; `from . import x` as the module that it means."""
    tree = ast.parse((ROOT / path).read_text() if source is None else source)
    return list(_imports(tree, path.with_suffix("").parts, False))


def _imports(node: ast.AST, here: tuple[str, ...], late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = ".".join(here[: len(here) - child.level] if child.level else ())
            module = ".".join(filter(None, (base, child.module)))
            # `from package import name`: the name may be a module, and then it is that which is imported.
            yield from (Import(f"{module}.{alias.name}", late) for alias in child.names)
        else:
            yield from _imports(child, here, late or isinstance(child, ast.FunctionDef | ast.Lambda))


def test_the_reader_of_imports_understands_every_spelling():
    source = """
import jax.numpy as jnp
from . import kernels
from ..surgery.paths import spell
from .. import tensor_file
def f():
    import torch
class A:
    def g(self):
        from transformers import x
if True:
    import optax
"""
    assert imports(Path("eqx_transformers/nn/attention.py"), source) == [
        Import("jax.numpy", False),
        Import("eqx_transformers.nn.kernels", False),
        Import("eqx_transformers.surgery.paths.spell", False),
        Import("eqx_transformers.tensor_file", False),
        Import("torch", True),
        Import("transformers.x", True),
        Import("optax", False),
    ]
    assert len(FILES) > 30


THIRD_PARTY = {"jax", "jaxtyping", "equinox", "numpy"}
# A room -> what of our own it may import. What is not named here may import anything of its own package.
ARROWS = {
    "eqx_transformers/nn": ("eqx_transformers.nn",),
    "eqx_transformers/models": ("eqx_transformers.nn", "eqx_transformers.models"),
    "eqx_transformers/surgery": ("eqx_transformers.nn", "eqx_transformers.surgery"),
    "eqx_transformers/expression": ("eqx_transformers.nn", "eqx_transformers.surgery", "eqx_transformers.expression"),
    "eqx_transformers": ("eqx_transformers",),
    "converters": ("eqx_transformers", "converters"),
}
RECIPES = Path(
    "eqx_transformers/training/recipes"
)  # applications: they may import everything, and nothing imports them


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


@pytest.mark.parametrize("room", ARROWS)
def test_imports_follow_the_arrows(room):
    files = [f for f in FILES if f.is_relative_to(room) and not f.is_relative_to(RECIPES)]
    own = [(f, i.name) for f in files for i in imports(f) if i.package in ("eqx_transformers", "converters")]
    assert [(str(f), name) for f, name in own if not within(name, ARROWS[room])] == []


def test_models_do_not_import_the_heads_that_stand_on_them():
    models = [f for f in FILES if f.is_relative_to("eqx_transformers/models") and f.stem not in ("heads", "__init__")]
    assert models
    for file in models:
        assert not any("heads" in i.name.split(".") for i in imports(file)), file


@pytest.mark.parametrize("room", ["nn", "models", "surgery"])
def test_the_inner_rooms_need_jax_equinox_and_numpy_alone(room):
    for file in (f for f in FILES if f.is_relative_to(f"eqx_transformers/{room}")):
        others = {i.package for i in imports(file)} - THIRD_PARTY - sys.stdlib_module_names - {"eqx_transformers"}
        assert not others, (file, others)


def test_nothing_imports_the_recipes():
    outside = [f for f in FILES if not f.is_relative_to(RECIPES)]
    assert not [f for f in outside for i in imports(f) if within(i.name, ("eqx_transformers.training.recipes",))]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_imports_nothing_that_it_must_not(file):
    found = imports(file)
    # beartype only checks annotations that are objects, and jaxtyping's documentation warns of the same.
    assert not [i for i in found if i.name == "__future__.annotations"]
    assert not [i for i in found if within(i.name, ("jax._src", "jaxlib"))]
    assert not [i for i in found if i.package in LATE and not i.late]


def test_importing_both_packages_loads_nothing_heavy():
    code = f"import sys, eqx_transformers, converters; print(*sorted({LATE!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
