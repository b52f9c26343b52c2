"""What holds for every test: types and shapes are checked by import hooks, ranks are never promoted.

The models' shapes are checked by jaxtyping's hook (pyproject.toml). The converters handle whole files and have no
shapes in their signatures: beartype's own hook checks their types at a tenth of the cost.
"""

import jax
import jaxtyping
import pytest
from beartype.claw import beartype_package

from .compiling import choose_quick
from .full import FULL, in_turn

beartype_package("converters")  # before anything imports it

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tiny models cost their compilation and nothing else. Real weights run with everything on: `make run`, `benchmarks/`.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config):
    """EQX_TRANSFORMERS_FULL=1 compiles as users do; so does a run without workers, which has begun already."""
    has_workers = bool(getattr(config.option, "numprocesses", None))
    if has_workers and not FULL and not hasattr(config, "workerinput"):
        choose_quick()


def pytest_collection_modifyitems(config, items):
    """Long tables go by turns, but where rows were asked for by name. All workers choose the same ones."""
    if FULL or any("::" in given for given in config.args):
        return
    name = lambda item: f"{item.module.__name__.removeprefix('tests.')}.{item.name}"
    chosen = in_turn([name(item) for item in items])
    config.hook.pytest_deselected(items=[item for item, runs in zip(items, chosen, strict=True) if not runs])
    items[:] = [item for item, runs in zip(items, chosen, strict=True) if runs]


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
    """As users run it: without the import hook's shape checks, so that our own errors are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
