import pytest, numpy as np
from ..tiny import ROWS
from ..reference import reference
import converters
from converters.verify import verify
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.id)
def test_v(row):
    ref = reference(row)
    v = verify(ref.directory, gradients=True)
    print(v); assert v.passed
    assert v.max_error<2e-5
