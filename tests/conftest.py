"""What holds for every test: types and shapes are checked by import hooks, ranks are never promoted.

Shapes are checked by jaxtyping's hook (the models' modules, and all that take arrays). The converters and what is
inside of expressions and files have no shapes in their signatures, and small functions that are called by the hundred
thousand: beartype's own hook checks their types at a tenth of the cost.
"""

import gc
from pathlib import Path

import jax
import jaxtyping
import pytest
from beartype import BeartypeConf, BeartypeDecorPlace
from beartype.claw import beartype_package

from . import kept
from .compiling import choose_quick
from .full import FULL, in_turn

ROOT = Path(__file__).parent.parent
INNER = [f"expression.{name}" for name in ("_jaxpr", "boundary", "build", "evaluate", "matching", "node", "xml")]
INNER = [f"eqx_transformers.{name}" for name in (*INNER, "nn._trees", "surgery.paths", "tensor_file")]


def others() -> list[str]:
    """All modules of the library but the inner ones."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "eqx_transformers").rglob("*.py")]
    # A package's own file would stand for all that is in it.
    return [".".join(path.parts) for path in paths if path.name != "__init__" and ".".join(path.parts) not in INNER]


# Before anything imports them. Under other decorators: what wraps a function has its annotations, but not its shapes.
for module in ("converters", *INNER):
    beartype_package(module, conf=BeartypeConf(claw_decor_place_func=BeartypeDecorPlace.FIRST))
jaxtyping.install_import_hook(others(), "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tiny models cost their compilation and nothing else. Real weights run with everything on: `make run`, `benchmarks/`.
jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes millions of objects, of which most live on: to look for garbage every 700 is a tenth of the suite.
gc.set_threshold(50_000, 20, 10)


def pytest_configure(config):
    """EQX_TRANSFORMERS_FULL=1 compiles as users do; so does a run without workers, which has begun already."""
    has_workers = bool(getattr(config.option, "numprocesses", None))
    if has_workers and not FULL and not hasattr(config, "workerinput"):
        choose_quick()


def pytest_collection_modifyitems(config, items):
    """Long tables go by turns and long proofs not at all, but where asked for by name; the same in all workers."""
    if FULL or any("::" in given for given in config.args):
        return
    short = [item for item in items if item.get_closest_marker("full") is None]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
    items[:] = short
    name = lambda item: f"{item.module.__name__.removeprefix('tests.')}.{item.name}"
    chosen = in_turn([name(item) for item in items])
    config.hook.pytest_deselected(items=[item for item, runs in zip(items, chosen, strict=True) if not runs])
    items[:] = [item for item, runs in zip(items, chosen, strict=True) if runs]


def pytest_sessionfinish():
    kept.remove()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A file's programs serve that file alone: thousands of them would fill the memory, and slow all that walks it."""
    yield
    jax.clear_caches()


@pytest.fixture
def strict_promotion():
    """Mixing dtypes without a cast is an error (not for optax, which relies on promotion)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def unchecked():
    """As users run it: without jaxtyping's checks, so that our own errors are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
