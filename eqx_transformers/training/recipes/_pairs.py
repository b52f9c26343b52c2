"""Pairs of texts, and how well the partners of texts are found among all."""

import numpy as np
from jaxtyping import Bool, Float, Int

from ._options import WrongUsage

Pair = tuple[str, str]


def ranks(
    first: Float[np.ndarray, "pairs dim"],
    second: Float[np.ndarray, "pairs dim"],
    rivals: Bool[np.ndarray, "pairs pairs"],
) -> Int[np.ndarray, " pairs"]:
    """1 + how many wrong answers are as near to the first text as its partner, by the cosine.

    What is as near counts as nearer: vectors that are all the same find nothing. Row i of `rivals`: the wrong ones.
    """
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    scores = unit(first) @ unit(second).T
    return 1 + ((scores >= np.diag(scores)[:, None]) & rivals).sum(1)


def halves(text: str) -> Pair | None:
    """The first and the second half of a text's words; None where there is one word."""
    words = text.split()
    at = len(words) // 2
    return (" ".join(words[:at]), " ".join(words[at:])) if at else None


def rivals(held: list[Pair]) -> Bool[np.ndarray, "pairs pairs"]:
    """The partners of other texts are wrong answers, unless they are the same text as the right one."""
    first, second = (np.unique(side, return_inverse=True)[1] for side in zip(*held, strict=True))
    found = (first[:, None] != first) & (second[:, None] != second)
    if not found.any(1).all():
        raise WrongUsage("A held-out text has no wrong answer among the others, whose texts are the same: give more.")
    return found
