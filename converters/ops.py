"""Bijections between a checkpoint's tensors and our leaves; each works on NumPy arrays and on JAX tracers."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any


@dataclass(frozen=True)
class Op:
    """`forward`: their tensors to our leaves; `backward`: the way back, bit for bit."""

    name: str
    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[Any, ...]]

    def then(self, other: "Op") -> "Op":
        """This op, and `other` on its results."""
        return Op(
            f"{self.name}, {other.name}",
            lambda *x: other.forward(*self.forward(*x)),
            lambda *y: self.backward(*other.backward(*y)),
        )


SAME = Op("same", lambda x: (x,), lambda x: (x,))
FLIP = Op("transposed", lambda x: (x.T,), lambda x: (x.T,))


def split(*sizes: int) -> Op:
    """One fused tensor into several along its first axis, in this order (fused queries, keys, values)."""
    cuts = list(accumulate(sizes))[:-1]
    namespace = lambda x: x.__array_namespace__()
    return Op(
        f"split {'+'.join(map(str, sizes))}",
        lambda x: tuple(x[a:b] for a, b in zip([0, *cuts], [*cuts, sum(sizes)], strict=True)),
        lambda *y: (namespace(y[0]).concat(y),),
    )
