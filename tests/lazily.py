"""Tables of what is made when it is asked for: whoever only collects the tests makes nothing."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Lazily(Mapping[str, Any]):
    """`Lazily({"name": maker, …})`: the names are there at once, and each value once its own is read."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]):
        self._makers, self._made = dict(makers), {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
