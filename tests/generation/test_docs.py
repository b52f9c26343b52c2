"""The examples of docs/generation.md run as they stand."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()


def test_the_examples_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert names["best"].shape == names["sampled"].shape == (2, 8)
    assert names["found"].tokens.shape == (2, 3, 8)
    assert len(capsys.readouterr().out.splitlines()) >= 8
