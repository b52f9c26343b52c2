import pytest


@pytest.fixture(autouse=True)
def _strict(strict_promotion):
    """Layers, models and heads name every cast."""
