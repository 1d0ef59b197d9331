"""Data sets of sequences: digits pixel by pixel, and a user's own ``.npz``."""

import dataclasses
import pathlib
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Bool

from lstmjax.data.batches import Batches, Sequences, Source, bucket_boundaries, generator_of
from lstmjax.errors import UserError, extra, first_line
from lstmjax.files import Json
from lstmjax.models import SequenceConfig
from lstmjax.tasks.base import Divided, Recipe, Split, read_once
from lstmjax.tasks.metric import ACCURACY, MEAN_SQUARED_ERROR, Metric
from lstmjax.training.objective import CrossEntropy, Objective, SquaredError
from lstmjax.training.step import OptimizerConfig

CLASSES_A_LABEL = 10
"""No more classes than so many times the labels: there is an output for each, seen or not."""


def split_rows(
    groups: Sequence[Hashable], validation: float, test: float
) -> dict[Split, Bool[np.ndarray, " rows"]]:
    """Which rows are for what, drawn once and for all: the same for every seed.

    >>> parts = split_rows([*"abcdeabcde"], validation=0.2, test=0.2)
    >>> {name: int(part.sum()) for name, part in parts.items()}
    {'train': 6, 'validation': 2, 'test': 2}

    Args:
        groups: of each row something hashable; rows of the same stay together.
        validation, test: shares; the rest is to train on.

    Raises:
        UserError: a part would be empty.
    """
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise UserError(
            f"shares of {validation:g} for validation and {test:g} for the test leave nothing to "
            "train on, or nothing for one of them: give two numbers above 0 with a sum below 1"
        )
    numbers: dict[Hashable, int] = {}
    group = np.array([numbers.setdefault(key, len(numbers)) for key in groups], int)
    size = np.bincount(group, minlength=len(numbers))
    order = generator_of(0).permutation(len(numbers))
    done = np.empty(len(numbers))
    done[order] = np.cumsum(size[order])
    share = done[group] / max(1, len(group))
    parts: dict[Split, np.ndarray] = {
        "train": share > validation + test,
        "validation": (share > test) & (share <= validation + test),
        "test": share <= test,
    }
    for name, part in parts.items():
        if not part.any():
            alike = f" (rows that are the same stay together: {len(numbers)} different ones)"
            raise UserError(
                f"{len(group)} rows are too few: none is left for {name}"
                f"{alike if len(numbers) < len(group) else ''}"
            )
    return parts


@dataclasses.dataclass(frozen=True)
class Rows(Divided):
    """A data set of sequences with a label each, or one at every step."""

    validation_share: float = 0.1
    """Share of the rows that settings are chosen by."""
    test_share: float = 0.2
    """Share of the rows to test on."""
    buckets: int = 5
    """Most lengths that batches may have; each is compiled once."""

    masked: ClassVar[bool] = True

    def rows(self) -> Sequences:
        """All of them."""
        raise NotImplementedError

    @property
    def num_outputs(self) -> int:
        """One a class; 1 for two classes, and for numbers."""
        count = _classes(self)
        return 1 if count <= 2 else count

    @property
    def class_names(self) -> tuple[str, ...]:
        """The numbers of the classes."""
        return tuple(map(str, range(max(2, count)))) if (count := _classes(self)) else ()

    @property
    def features(self) -> int:
        """As the rows have it."""
        return _loaded(self)[0].sequences[0].shape[1]

    @property
    def chance(self) -> float:
        """The most frequent class, or the variance of the numbers, of the test part."""
        labels = _labels(_part(self, "test"))
        if labels.dtype.kind == "f":
            return float(labels.var())
        return float(np.bincount(labels).max() / len(labels))

    @property
    def objective(self) -> Objective:
        """Cross-entropy, or the squared error where labels are no whole numbers."""
        return CrossEntropy() if _classes(self) else SquaredError()

    def facts(self) -> Mapping[str, Json]:
        """Rows of each part, classes, and lengths."""
        return {
            name: describe([len(row) for row in part.sequences], _labels(part))
            for name in ("train", "validation", "test")
            for part in [_part(self, name)]
        }

    def part(self, split: Split, batch_size: int) -> Source:
        """Batches of similar length."""
        lengths = [len(row) for row in _loaded(self)[0].sequences]
        boundaries = bucket_boundaries(lengths, count=self.buckets)
        return Batches(_part(self, split), batch_size, boundaries=boundaries)


def describe(lengths: Sequence[int], labels: np.ndarray) -> dict[str, Json]:
    """Rows, lengths, and how labels are spread.

    >>> describe([3, 5], np.array([0, 1]))
    {'rows': 2, 'lengths': '3 to 5, median 4', 'classes': '0: 50.0 %, 1: 50.0 %'}
    """
    found: dict[str, Json] = {"rows": len(lengths)}
    low, middle, high = np.percentile(lengths, (0, 50, 100))
    found["lengths"] = f"{low:g} to {high:g}, median {middle:g}"
    if labels.dtype.kind == "f":
        return found | {"numbers": f"mean {labels.mean():.4g}, s.d. {labels.std():.4g}"}
    shares = np.bincount(labels) / len(labels)
    return found | {"classes": ", ".join(f"{k}: {100 * s:.1f} %" for k, s in enumerate(shares))}


@read_once
def _loaded(task: Rows) -> tuple[Sequences, dict[Split, np.ndarray]]:
    rows = task.rows()
    keys = [row.tobytes() for row in rows.sequences]
    return rows, split_rows(keys, task.validation_share, task.test_share)


def _part(task: Rows, split: Split) -> Sequences:
    rows, parts = _loaded(task)
    chosen = np.flatnonzero(parts[split])
    labels = rows.labels
    return Sequences(
        [rows.sequences[n] for n in chosen],
        [labels[n] for n in chosen] if isinstance(labels, list) else labels[chosen],
    )


def _labels(rows: Sequences) -> np.ndarray:
    return np.concatenate(rows.labels) if isinstance(rows.labels, list) else rows.labels


def _classes(task: Rows) -> int:
    """How many classes there are; 0: labels are numbers."""
    labels = _labels(_loaded(task)[0])
    return 0 if labels.dtype.kind == "f" else int(labels.max()) + 1


@dataclasses.dataclass(frozen=True)
class Digits(Rows):
    """Handwritten digits, a pixel a step, row by row.

    The 1,797 digits of 8 x 8 pixels that scikit-learn brings along; grey values in [0, 1]. Split at
    random, once and for all.

    Example:
        >>> Digits(test_share=0.5).recipe.batch_size
        32
    """

    source: ClassVar[str] = (
        "Alpaydin & Kaynak 1998 (UCI), in scikit-learn; pixel by pixel as Le, Jaitly & Hinton 2015 "
        "(arXiv:1504.00941) do with MNIST"
    )
    reported: ClassVar[str] = "MNIST: 784 steps, 100 to 128 units; here 64 steps"

    @property
    def recipe(self) -> Recipe:
        """64 units, 40 epochs."""
        rate = OptimizerConfig(learning_rate=1e-2, schedule="one-cycle", clip_norm=1.0)
        return Recipe(epochs=40, batch_size=32, model=SequenceConfig(), optimizer=rate)

    def rows(self) -> Sequences:
        """All digits.

        Raises:
            UserError: scikit-learn is not there.
        """
        with extra("tasks"):
            from sklearn.datasets import load_digits
        found = load_digits()
        pixels = (found.data / 16).astype(np.float32)[:, :, None]
        return Sequences(list(pixels), found.target.astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Mnist1d(Rows):
    """Digits as curves of 40 points, shifted, stretched and noisy.

    The 5,000 sequences that the package mnist1d makes up with its own settings. Split anew, at
    random, once and for all.

    Example:
        >>> Mnist1d(test_share=0.5).recipe.batch_size
        64
    """

    source: ClassVar[str] = "Greydanus & Kobak 2020 (arXiv:2011.14439), package mnist1d"
    reported: ClassVar[str] = "40 steps, 4,000 to train on; a GRU of 6 units 91 %, people 96 %"

    @property
    def recipe(self) -> Recipe:
        """64 units, 30 epochs."""
        rate = OptimizerConfig(learning_rate=1e-2, schedule="one-cycle", clip_norm=1.0)
        return Recipe(epochs=30, batch_size=64, model=SequenceConfig(), optimizer=rate)

    def rows(self) -> Sequences:
        """All curves.

        Raises:
            UserError: the package is not there.
        """
        with extra("tasks"):
            from mnist1d.data import get_dataset_args, make_dataset
        states = np.random.get_state(), random.getstate()  # noqa: NPY002
        try:  # it seeds the generators that all share
            found = make_dataset(get_dataset_args())
        finally:
            np.random.set_state(states[0])  # noqa: NPY002
            random.setstate(states[1])
        curves = np.concatenate([found["x"], found["x_test"]]).astype(np.float32)[:, :, None]
        return Sequences(
            list(curves), np.concatenate([found["y"], found["y_test"]]).astype(np.int32)
        )


@dataclasses.dataclass(frozen=True)
class SequenceFile(Rows):
    """Your own sequences, from an ``.npz`` file.

    Its arrays: ``x``, rows times steps times features (or rows times steps); ``y``, a label a row
    or one a step, integers from 0 for classes, floats for numbers to predict; and ``lengths``, the
    valid steps of each row, if they differ.
    """

    file: pathlib.Path = pathlib.Path("sequences.npz")
    """The file."""

    source: ClassVar[str] = "your own file"

    @property
    def per_step(self) -> bool:  # type: ignore[override]
        """Whether there is a label a step."""
        return isinstance(_loaded(self)[0].labels, list)

    @property
    def metric(self) -> Metric:  # type: ignore[override]
        """Accuracy, or the mean squared error."""
        return ACCURACY if _classes(self) else MEAN_SQUARED_ERROR

    def rows(self) -> Sequences:
        """All rows of the file.

        Raises:
            UserError: it cannot be read, or its arrays do not fit together.
        """
        arrays = read_arrays(self.file, ("x", "y"))
        y, sequences = arrays["y"], read_sequences(self.file, arrays)
        rows, steps = arrays["x"].shape[:2]
        if y.dtype.kind not in "fiub":
            raise UserError(
                f"{self.file}: y holds {_kind(y)}; give classes as integers from 0, or floats to "
                "predict"
            )
        if y.shape not in ((rows,), (rows, steps)):
            raise UserError(
                f"{self.file}: y has the shape {y.shape}, not ({rows},) or ({rows}, {steps})"
            )
        labels = read_labels(self.file, y, np.array([len(row) for row in sequences]))
        if y.ndim == 1:
            return Sequences(sequences, labels)
        return Sequences(
            sequences, [own[: len(row)] for own, row in zip(labels, sequences, strict=True)]
        )


def read_labels(file: pathlib.Path, y: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Labels as int32 for classes or float32 for numbers.

    Args:
        file: where they are from.
        y: a label a row, or one a step.
        lengths: of the rows; what is behind does not count.

    Raises:
        UserError: there cannot be such a class, or a number is not finite.
    """
    most = CLASSES_A_LABEL * y.size
    if y.dtype.kind == "f":
        with np.errstate(over="ignore"):
            labels = y.astype(np.float32)
        wrong, remedy = ~np.isfinite(labels), "give numbers that are finite in float32"
    else:
        labels, wrong = y.astype(np.int32), (y < 0) | (y >= most)
        remedy = f"number the classes from 0, here below {most:,}, or give numbers as floats"
    if y.ndim == 2:
        wrong &= np.arange(y.shape[1]) < lengths[:, None]
    if wrong.any():
        at = np.unravel_index(wrong.argmax(), y.shape)
        raise UserError(f"{file}: row {at[0]} of y is {y[at]}: {remedy}")
    if y.dtype.kind != "f":
        counts = (
            np.ones_like(labels, bool) if y.ndim == 1 else np.arange(y.shape[1]) < lengths[:, None]
        )
        _require_classes(file, np.unique(labels[counts]))
    return labels


def _require_classes(file: pathlib.Path, classes: np.ndarray) -> None:
    """Raise `UserError` for classes that cannot be meant; few may have no row."""
    if len(classes) == 1:
        raise UserError(f"{file}: all of y is {classes[0]}: nothing to learn")
    if classes[-1] + 1 > 2 * len(classes) + 8:
        raise UserError(
            f"{file}: y has {len(classes)} classes, but they are numbered up to {classes[-1]}: "
            "number them from 0 without gaps"
        )


def read_arrays(file: pathlib.Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file.

    Raises:
        UserError: it cannot be read, or one of those ``needed`` is not there.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error
    missing = [name for name in needed if name not in arrays]
    if missing:
        have = ", ".join(sorted(arrays)) or "none"
        raise UserError(f"{file} has no array {missing[0]!r} (arrays there: {have})")
    return arrays


def read_sequences(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The rows of ``x``, each as long as ``lengths`` says, if that is there: ``(T, D)``.

    Raises:
        UserError: the arrays do not fit together, or a row is not finite.
    """
    x = arrays["x"][..., None] if arrays["x"].ndim == 2 else arrays["x"]
    if x.dtype.kind not in "fiub":
        raise UserError(f"{file}: x holds {_kind(x)}; give numbers")
    if x.ndim != 3 or not x.size:
        raise UserError(
            f"{file}: x has the shape {x.shape}; give (rows, steps, features), none of them 0"
        )
    rows, steps = x.shape[:2]
    lengths = arrays.get("lengths", np.full(rows, steps))
    if lengths.dtype.kind not in "iu":
        raise UserError(f"{file}: lengths holds {_kind(lengths)}; give integers")
    if lengths.shape != (rows,):
        raise UserError(f"{file}: lengths has the shape {lengths.shape}, not ({rows},)")
    wrong = (lengths < 1) | (lengths > steps)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"{file}: row {row} has the length {lengths[row]} of {steps} steps")
    with np.errstate(over="ignore"):
        found = [row[:n].astype(np.float32) for row, n in zip(x, lengths, strict=True)]
    for number, row in enumerate(found):
        if not np.isfinite(row).all():
            raise UserError(f"{file}: row {number} of x is not finite in float32")
    return found


def _kind(a: np.ndarray) -> str:
    """What an array holds that is not what it should."""
    kinds = {"f": "floats", "b": "booleans", "c": "complex numbers", "U": "texts", "S": "bytes"}
    return kinds.get(a.dtype.kind, str(a.dtype))
