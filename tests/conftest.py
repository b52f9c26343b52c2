"""What holds for every test: shapes are checked by the import hook (pyproject.toml), ranks are never promoted."""

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tiny models cost their compilation and nothing else. Real weights run with everything on: `make run`, `benchmarks/`.
jax.config.update("jax_disable_most_optimizations", True)


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
