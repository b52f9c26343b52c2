"""Signals that end a run: asked for between two steps, and by all processes at the same one."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np


class Interrupted(KeyboardInterrupt):
    """A run was ended by a signal, SIGINT (Ctrl-C) or SIGTERM, after its step; `signal` is its number."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.signal = number


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that has the number of the first signal when one has come; the second one stops at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt(f"{signal.Signals(number).name}, a second time")
        asked.append(number)
        # Not through a console: the signal may have come while it was printing.
        os.write(2, b"\nThe step is finished and saved first. Once more stops at once, without.\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def agreed(asked: list[int], step: int, every: int = 10) -> bool:
    """Whether to stop: with several processes, all or none of them, at the same step."""
    if jax.process_count() == 1:
        return bool(asked)
    if step % every:
        return False
    from jax.experimental.multihost_utils import process_allgather

    numbers = process_allgather(np.int32(asked[0] if asked else 0))
    if numbers.any() and not asked:
        asked.append(int(numbers.max()))
    return bool(numbers.any())
