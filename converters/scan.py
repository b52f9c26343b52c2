"""Numbers in a checkpoint that are none: NaN and infinities, by the tensor that holds them."""

from dataclasses import dataclass

import numpy as np

from .checkpoint import open_directory
from .convert import Source, locate
from .filling import Progress


@dataclass(frozen=True)
class Scan:
    """`found`: of each tensor that holds some, how many NaNs and how many infinities; `num_tensors` were looked at."""

    found: dict[str, tuple[int, int]]
    num_tensors: int

    @property
    def ok(self) -> bool:
        return not self.found

    def as_json(self) -> dict[str, object]:
        return {"ok": self.ok, "num_tensors": self.num_tensors, "found": self.found}

    def __str__(self) -> str:
        if self.ok:
            return f"scanned: {self.num_tensors} tensors hold finite numbers only"
        lines = [f"  {key}: {nan} NaN, {infinite} infinite" for key, (nan, infinite) in self.found.items()]
        return "\n".join(
            [f"scanned: {len(self.found)} of {self.num_tensors} tensors hold numbers that are not finite", *lines]
        )


def scan(
    source: Source,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> Scan:
    """Reads every tensor of floating-point numbers, one at a time, and counts what is not finite.

    `progress(done, total)` is called with bytes after each of them.
    Raises the errors of `inspect` for a source that is not there or damaged. Tensors of formats that NumPy does not
    have (float8) are not looked at.
    """
    directory = locate(source, revision=revision, subfolder=subfolder, token=token, local_files_only=local_files_only)
    checkpoint = open_directory(directory)
    floats = [key for key, spec in checkpoint.specs.items() if spec.dtype in ("F16", "BF16", "F32", "F64")]
    total, done, found = sum(map(checkpoint.size, floats)), 0, {}
    for key in floats:
        x = checkpoint.get(key)
        nan, infinite = int(np.isnan(x).sum()), int(np.isinf(x).sum())
        if nan or infinite:
            found[key] = nan, infinite
        done += checkpoint.size(key)
        if progress is not None:
            progress(done, total)
    return Scan(found, len(floats))
