"""What holds for every test: shapes are checked by the import hook (pyproject.toml), ranks are never promoted."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_promotion():
    """Mixing dtypes without a cast is an error (not for optax, which relies on promotion)."""
    with jax.numpy_dtype_promotion("strict"):
        yield
