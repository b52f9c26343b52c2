"""Numbers of a classifier, beside scikit-learn's, and their picture."""

import numpy as np
import pytest

from eqx_transformers.pictures import confusion_picture
from eqx_transformers.training.metrics import accuracy, confusion_matrix, f1, macro_f1, precision, recall, summary

LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
SAID = np.array([0, 0, 1, 3, 1, 1, 0, 2, 2])
COUNTS = [[2, 1, 0, 1], [0, 2, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]


def test_counts_and_shares_by_hand():
    found = confusion_matrix(LABELS, SAID, 4)
    assert found.tolist() == COUNTS == confusion_matrix(LABELS.tolist(), SAID.tolist(), 4).tolist()
    assert accuracy(found) == pytest.approx(6 / 9)
    np.testing.assert_allclose(precision(found), [2 / 3, 2 / 3, 1, 0])
    np.testing.assert_allclose(recall(found), [1 / 2, 1, 2 / 3, 0])
    np.testing.assert_allclose(f1(found), [4 / 7, 4 / 5, 4 / 5, 0])
    assert macro_f1(found) == pytest.approx((4 / 7 + 8 / 5) / 4)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_they_are_scikit_learns(classes):
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(classes)
    labels, said = rng.integers(0, classes, 80), rng.integers(0, max(2, classes - 1), 80)
    found = confusion_matrix(labels, said, classes)
    every = {"labels": range(classes), "average": None, "zero_division": 0}
    theirs = sklearn.precision_recall_fscore_support(labels, said, **every)
    for ours, other in zip((precision(found), recall(found), f1(found), found.sum(1)), theirs, strict=True):
        np.testing.assert_allclose(ours, other)
    assert accuracy(found) == pytest.approx(sklearn.accuracy_score(labels, said))
    np.testing.assert_array_equal(found, sklearn.confusion_matrix(labels, said, labels=range(classes)))


def test_a_summary_names_the_classes():
    found = summary(confusion_matrix(LABELS, SAID, 4), ["a", "b", "c", "never"])
    assert found["confusion"] == COUNTS and found["accuracy"] == pytest.approx(2 / 3)
    assert found["classes"]["b"] == {
        "precision": pytest.approx(2 / 3),
        "recall": 1,
        "f1": pytest.approx(0.8),
        "texts": 2,
    }
    assert found["classes"]["never"] == {"precision": 0, "recall": 0, "f1": 0, "texts": 0}


def test_what_makes_no_sense_is_refused(unchecked):
    with pytest.raises(ValueError, match="Classes are 0 to 2, but there are 0 to 3"):
        confusion_matrix(LABELS, SAID, 3)
    with pytest.raises(ValueError, match="a label and an answer"):
        confusion_matrix(LABELS, SAID[:4], 4)
    with pytest.raises(ValueError, match="no texts"):
        accuracy(np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="4 classes and 2 names"):
        summary(np.array(COUNTS), ["a", "b"])


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_picture_has_counts_names_and_shares(tmp_path, monkeypatch):
    from eqx_transformers import pictures

    figures, write = [], pictures._write
    monkeypatch.setattr(pictures, "_write", lambda figure, target: (figures.append(figure), write(figure, target)))
    path = confusion_picture(
        np.array(COUNTS), ["a", "$b", "_c", "d" * 40], path=tmp_path / "sub" / "all.png", title="t"
    )
    assert path.read_bytes()[:4] == b"\x89PNG"
    plane = figures[0].axes[0]
    assert texts_of(figures[0])[:2] == ["2\n50%", "1\n25%"]
    assert [text.get_text() for text in plane.get_yticklabels()] == ["a", "$b", "_c", "d" * 23 + "…"]
    np.testing.assert_allclose(plane.images[0].get_array()[2], [1 / 3, 0, 2 / 3, 0])
    confusion_picture(np.eye(30, dtype=int), [str(i) for i in range(30)], path=tmp_path / "many.svg")
    assert texts_of(figures[1]) == []


def test_a_picture_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 names, but the confusion matrix is \\(4, 4\\)"):
        confusion_picture(np.array(COUNTS), ["a", "b", "c"], path=tmp_path / "x.png")
    with pytest.raises(ValueError, match="A picture is written as"):
        confusion_picture(np.array(COUNTS), list("abcd"), path=tmp_path / "x.pdf")
