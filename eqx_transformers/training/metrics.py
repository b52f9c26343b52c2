"""How good a classifier's answers are: counts of what was right and wrong, and numbers made of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

Answers = Int[np.ndarray, " texts"] | Sequence[int]


def confusion_matrix(labels: Answers, predicted: Answers, classes: int) -> Int[np.ndarray, "classes classes"]:
    r"""$C_{ij}$: how many texts of the class $i$ were taken for the class $j$.

    Raises a `ValueError` for another number of answers than of labels, and for a class that is not below `classes`.
    """
    true, said = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    if true.ndim != 1 or true.shape != said.shape:
        raise ValueError(f"Each text has a label and an answer, but there are {true.shape} and {said.shape}.")
    if classes < 1 or (true.size and not 0 <= min(true.min(), said.min()) <= max(true.max(), said.max()) < classes):
        found = sorted({*true.tolist(), *said.tolist()})
        raise ValueError(f"Classes are 0 to {classes - 1}, but there are {found[0]} to {found[-1]}.")
    return np.bincount(true * classes + said, minlength=classes**2).reshape(classes, classes)


def accuracy(confusion: Int[np.ndarray, "classes classes"]) -> float:
    r"""$\sum_i C_{ii} / \sum_{ij} C_{ij}$: the share of texts that were taken for what they are.

    Raises a `ValueError` where there are no texts.
    """
    if not confusion.sum():
        raise ValueError("There are no texts to be right or wrong about.")
    return float(np.trace(confusion) / confusion.sum())


def precision(confusion: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, " classes"]:
    r"""$C_{ii} / \sum_j C_{ji}$: of what was taken for a class, the share that is of it; 0 where nothing was."""
    return _share(np.diag(confusion), confusion.sum(0))


def recall(confusion: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, " classes"]:
    r"""$C_{ii} / \sum_j C_{ij}$: of the texts of a class, the share that was taken for it; 0 where there are none."""
    return _share(np.diag(confusion), confusion.sum(1))


def f1(confusion: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, " classes"]:
    r"""$2 C_{ii} / (\sum_j C_{ij} + \sum_j C_{ji})$, the harmonic mean of precision and recall.

    0 for a class that no text has and none was taken for, as scikit-learn has it.
    """
    return _share(2 * np.diag(confusion), confusion.sum(0) + confusion.sum(1))


def macro_f1(confusion: Int[np.ndarray, "classes classes"]) -> float:
    """The mean of all classes' F1, each class counting as much as any other, however many texts it has."""
    return float(f1(confusion).mean())


def summary(confusion: Int[np.ndarray, "classes classes"], names: Sequence[str]) -> dict[str, Any]:
    """`accuracy`, `macro_f1`, of each class by its name precision, recall, F1 and number of texts, and the counts.

    For JSON. Raises a `ValueError` for another number of names than of classes.
    """
    if len(names) != len(confusion):
        raise ValueError(f"There are {len(confusion)} classes and {len(names)} names.")
    columns = [x.tolist() for x in (precision(confusion), recall(confusion), f1(confusion), confusion.sum(1))]
    row = lambda *found: dict(zip(("precision", "recall", "f1", "texts"), found, strict=True))
    return {
        "accuracy": accuracy(confusion),
        "macro_f1": macro_f1(confusion),
        "classes": {name: row(*found) for name, *found in zip(names, *columns, strict=True)},
        "confusion": confusion.tolist(),
    }


def _share(some: np.ndarray, of: np.ndarray) -> Float[np.ndarray, " classes"]:
    return np.where(of > 0, some / np.maximum(of, 1), 0.0)
