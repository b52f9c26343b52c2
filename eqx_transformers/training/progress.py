"""What a run shows while it goes on: a bar in a terminal, plain lines elsewhere."""

import math
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress as Bar, TextColumn

SECONDS = 10.0  # between plain lines
WINDOW = 20.0  # seconds that the rates look back


class Progress:
    """Loss (smoothed), steps and tokens per second and the remaining time, on a console or, of False, nowhere."""

    def __init__(self, console: Console | bool, start: int, total: int):
        self.console = console if isinstance(console, Console) else Console(quiet=not console)
        self.total, self.step = total, start
        self.loss = math.nan
        self._marks: deque[tuple[float, int, float]] = deque()  # (when, step, tokens); the first step is compiled
        self._said = -math.inf
        self._bar = None
        if self.console.is_terminal and not self.console.quiet:
            columns = TextColumn("{task.completed:.0f}/{task.total:.0f}"), BarColumn(), TextColumn("{task.description}")
            self._bar = Bar(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("compiling", total=total, completed=start)
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """After a step whose metrics have come."""
        self.step = step
        if math.isfinite(loss := metrics.get("loss", math.nan)):
            self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        now = time.perf_counter()
        self._marks.append((now, step, self._marks[-1][2] + metrics.get("tokens", 0.0) if self._marks else 0.0))
        while len(self._marks) > 2 and self._marks[0][0] < now - WINDOW:
            self._marks.popleft()
        self._show(now)

    @property
    def steps_per_second(self) -> float:
        """Of the last seconds; 0 before there are two steps."""
        return self._rate(1)

    @property
    def tokens_per_second(self) -> float:
        """Of the last seconds; 0 before there are two steps."""
        return self._rate(2)

    def _rate(self, what: int) -> float:
        first, last = self._marks[0], self._marks[-1]
        return (last[what] - first[what]) / max(last[0] - first[0], 1e-9)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _show(self, now: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.step, description=self._text())
        elif now - self._said >= SECONDS and not self.console.quiet:
            self.say(f"step {self.step}/{self.total}  {self._text()}")
            self._said = now

    def _text(self) -> str:
        rate, tokens = self.steps_per_second, self.tokens_per_second
        if not rate:
            return f"loss {self.loss:.4f}"
        left = timedelta(seconds=round((self.total - self.step) / rate))
        speed = f"{tokens:,.0f} tokens/s  " if tokens else ""
        return f"loss {self.loss:.4f}  {rate:.2f} steps/s  {speed}{left} left"


def numbers(metrics: Mapping[str, Any]) -> str:
    """Metrics as text."""
    return "  ".join(f"{name} {x:.4g}" for name, x in metrics.items() if name != "step")
