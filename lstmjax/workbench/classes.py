"""What accuracy does not say of a classifier: F1, AUC, and the confusion matrix."""

import math
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lstmjax import files
from lstmjax.errors import drawable, extra, printable

MOST = 200
"""Classes of which there is a confusion matrix: it grows with their square, drawn and written."""


class Classes(NamedTuple):
    """Of one classifier on test data.

    Attributes:
        f1: of the second of two classes; of several the mean over those that a row has or was said
            to have (macro).
        auc: the chance that a row of a class scores higher in it than one of another class; the
            mean over all of several. NaN where a class has no rows.
        confusion: rows by true class, then by the class that was said; None of more than `MOST`.
    """

    f1: float
    auc: float
    confusion: Int[np.ndarray, "K K"] | None


def classes_of(outputs: Float[np.ndarray, "..."], labels: Int[np.ndarray, " N"]) -> Classes:
    """F1, AUC and confusion matrix.

    Args:
        outputs: logits, ``(N,)`` for two classes, ``(N, K)`` for K.
        labels: the true classes.

    Example:
        >>> found = classes_of(np.array([2.0, 1.0, -1.0, -3.0]), np.array([1, 0, 1, 0]))
        >>> found.f1, found.auc, found.confusion.tolist()
        (0.5, 0.75, [[1, 1], [1, 1]])
    """
    two = outputs.ndim == 1
    count = 2 if two else outputs.shape[1]
    said = (outputs > 0).astype(int) if two else outputs.argmax(axis=1)
    confusion = None
    if count <= MOST:
        confusion = np.zeros((count, count), int)
        np.add.at(confusion, (labels, said), 1)
    scores = np.stack([-outputs, outputs], axis=1) if two else outputs
    asked = [1] if two else range(count)
    right, there, told = (
        np.bincount(a, minlength=count) for a in (labels[labels == said], labels, said)
    )
    f1 = 2 * right / np.maximum(there + told, 1)
    seen = asked if two else np.flatnonzero(there + told)
    auc = math.nan  # as there is none of a class without rows
    if there[asked].all():
        auc = float(np.mean([area_under_curve(scores[:, k], labels == k) for k in asked]))
    return Classes(float(np.mean(f1[seen])), auc, confusion)


def area_under_curve(scores: Float[np.ndarray, " N"], positive: np.ndarray) -> float:
    """The chance that a positive scores higher than a negative; ties count half.

    >>> area_under_curve(np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False]))
    0.625
    """
    if positive.all() or not positive.any():
        return float("nan")
    above, below = scores[positive], np.sort(scores[~positive])
    lower = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")
    return float(lower.mean() / (2 * len(below)))


def confusion_table(confusion: Int[np.ndarray, "K K"], names: Sequence[str]) -> str:
    """The matrix as text; no more than twelve classes are shown. Of no rows there is no recall.

    >>> print(confusion_table(np.array([[8, 2], [1, 9]]), ["no", "yes"]))
    true \\ said  no  yes  recall
             no   8    2  80.0 %
            yes   1    9  90.0 %
    """
    if len(names) > 12:
        return f"{len(names)} classes: the confusion matrix is in confusion.png"
    shown = [*map(printable, names)]
    table = [["true \\ said", *shown, "recall"]]
    for name, row, right in zip(shown, confusion, np.diag(confusion), strict=True):
        share = f"{100 * right / row.sum():.1f} %" if row.any() else "–"
        table.append([name, *map(str, row), share])
    wide = [max(len(line[n]) for line in table) for n in range(len(table[0]))]
    return "\n".join("  ".join(f"{a:>{n}}" for a, n in zip(t, wide, strict=True)) for t in table)


def draw_confusion(
    path: pathlib.Path, title: str, confusion: Int[np.ndarray, "K K"], names: Sequence[str]
) -> None:
    """Draw the matrix, each row as shares of its true class.

    Args:
        path: PNG file to write.
        title: what was run.
        confusion: counts.
        names: of the classes.
    """
    with extra("train"):
        import matplotlib.figure

    size = min(12.0, 3 + 0.5 * len(names))
    figure = matplotlib.figure.Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 20:
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=8)
    places, shown = range(len(names)), [*map(drawable, names)]
    plain: dict[str, Any] = {"fontsize": 8, "parse_math": False}
    axes.set_xticks(places, shown, rotation=45, ha="right", **plain)
    axes.set_yticks(places, shown, **plain)
    axes.set(xlabel="said", ylabel="true")
    filled = textwrap.fill(drawable(title), int(10 * size))
    figure.suptitle(filled, fontsize=9, parse_math=False)
    figure.colorbar(image, label="share of the true class")
    files.publish(path, lambda file: figure.savefig(file, dpi=120, format="png"))
