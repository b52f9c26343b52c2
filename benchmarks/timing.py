"""Timing that survives shared machines: candidates take turns, and medians are compared."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def seconds(call: Callable[[], Any]) -> float:
    """One call's time, until its result is there."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Every candidate once a round, so that a slow moment of the machine meets all; the first round is not kept."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            spent = seconds(call)
            if i:
                times[name].append(spent)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(spent) for name, spent in times.items()}


def machine() -> str:
    """What a table of times must say about where it was made."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    devices = ", ".join(sorted({d.device_kind for d in jax.devices()}))
    return f"{cpu}, {os.cpu_count()} cores; device {devices}; Python {platform.python_version()}, jax {jax.__version__}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line = lambda row: "| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |"
    return "\n".join([line(header), "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *map(line, rows)])
