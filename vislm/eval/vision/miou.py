"""Mean intersection over union, from a confusion matrix that is summed over the pictures of a data set.

The rule is mmsegmentation's IoUMetric: not a mean over pictures, and classes that appear neither in a label nor in a
prediction do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from vislm.errors import UsageError

IGNORED = 255
"""Label of pixels that do not count."""


def confusion(
    labels: NDArray[np.integer], predicted: NDArray[np.integer], classes: int, ignored: int = IGNORED
) -> NDArray[np.int64]:
    """Return pixels (classes, classes) by label (rows) and prediction (columns), without the ignored labels.

    Args:
        labels: classes 0 to classes - 1, or ``ignored``, of shape (H, W).
        predicted: classes of the same shape.
        classes: their number.
        ignored: the label of pixels that do not count.

    Raises:
        UsageError: other shapes or classes.
    """
    if labels.shape != predicted.shape:
        raise UsageError(
            f"a prediction of {predicted.shape} for labels of {labels.shape}; expected one class per pixel"
        )
    counts = labels != ignored
    truth, guess = labels[counts].astype(np.int64), predicted[counts].astype(np.int64)
    for name, values in (("label", truth), ("prediction", guess)):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise UsageError(f"a {name} holds class {values.min()} or {values.max()}; expected 0 to {classes - 1}")
    return np.bincount(truth * classes + guess, minlength=classes**2).reshape(classes, classes)


def without_zero(labels: NDArray[np.integer], ignored: int = IGNORED) -> NDArray[np.int64]:
    """Return labels of which 0 is no class: 0 and ``ignored`` become ``ignored``, k becomes k - 1."""
    wide = labels.astype(np.int64)
    return np.where((wide == 0) | (wide == ignored), ignored, wide - 1)


def sparse(matrix: NDArray[np.int64]) -> list[list[int]]:
    """Return the entries of a confusion matrix that are not zero, as [label, prediction, pixels]."""
    rows, columns = np.nonzero(matrix)
    return np.stack([rows, columns, matrix[rows, columns]], axis=1).tolist()


def summed(parts: Iterable[Sequence[Sequence[int]]], classes: int) -> NDArray[np.int64]:
    """Return the confusion matrix (classes, classes) of many pictures, each as :func:`sparse` gives it."""
    matrix = np.zeros((classes, classes), np.int64)
    for part in parts:
        if part:
            rows, columns, pixels = np.asarray(part, np.int64).T
            np.add.at(matrix, (rows, columns), pixels)
    return matrix


def areas(matrix: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Return pixels by class (classes,): "intersect", "union", "label" and "prediction"."""
    intersect, label, prediction = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    return {"intersect": intersect, "union": label + prediction - intersect, "label": label, "prediction": prediction}


def per_class(matrix: NDArray[np.int64]) -> dict[str, list[float]]:
    """Return "IoU", "Acc" (recall of pixels) and "Dice" by class; NaN where there is nothing to divide by."""
    area = areas(matrix)
    both = area["label"] + area["prediction"]
    return {
        "IoU": _ratios(area["intersect"], area["union"]),
        "Acc": _ratios(area["intersect"], area["label"]),
        "Dice": _ratios(2 * area["intersect"], both),
    }


def scores(matrix: NDArray[np.int64]) -> dict[str, float]:
    """Return "aAcc" (pixels that are right), "mIoU", "mAcc" and "mDice" (means over the classes that have one).

    Fractions; 0.0 where there is nothing to divide by.
    """
    (right,) = _ratios(np.array([np.trace(matrix)]), np.array([matrix.sum()]))
    means = {f"m{name}": _mean(values) for name, values in per_class(matrix).items()}
    return {"aAcc": 0.0 if math.isnan(right) else right, **means}


def _ratios(parts: NDArray[np.int64], wholes: NDArray[np.int64]) -> list[float]:
    return [float(a / b) if b else math.nan for a, b in zip(parts, wholes, strict=True)]


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / max(1, len(there))
