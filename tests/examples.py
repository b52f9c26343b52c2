"""The Python blocks of the README and of the pages of docs/, which run as they stand."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_examples(page: str) -> tuple[int, dict[str, Any]]:
    """How many examples a page has, and the names that they leave, run one after another."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    return len(blocks), names
