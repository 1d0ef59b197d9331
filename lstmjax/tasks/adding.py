"""The adding problem: remember two marked numbers among many."""

import dataclasses
from typing import ClassVar

import numpy as np

from lstmjax.tasks.base import Generated, Recipe, Sample, require
from lstmjax.tasks.metric import MEAN_SQUARED_ERROR, Metric
from lstmjax.training.objective import SquaredError


@dataclasses.dataclass(frozen=True)
class Adding(Generated):
    """The sum of the two numbers that are marked, one in each half of the sequence.

    Features are a number from U[0, 1) and a mark; the answer is asked for at the end. Judged by the
    mean squared error; whoever always says 1 has 1/6. As in Hochreiter & Schmidhuber (1997) an
    answer that is off by less than 0.04 counts as right.

    Example:
        >>> sample = Adding(length=6).draw(np.random.default_rng(0), 2)
        >>> x, labels = sample.x, sample.labels
        >>> x.shape, bool(np.allclose((x[..., 0] * x[..., 1]).sum(1), labels))
        ((2, 6, 2), True)
    """

    length: int = 100
    """Steps of a sequence."""

    source: ClassVar[str] = (
        "Hochreiter & Schmidhuber 1997; in this form Le, Jaitly & Hinton 2015 (arXiv:1504.00941)"
    )
    reported: ClassVar[str] = "T = 100 to 1,000, 100 to 128 units"
    metric: ClassVar[Metric] = MEAN_SQUARED_ERROR

    def __post_init__(self) -> None:
        require({"length": self.length}, 2)

    @property
    def recipe(self) -> Recipe:
        """64 units, 1,000 updates."""
        return Recipe(epochs=10)

    @property
    def objective(self) -> SquaredError:
        """The squared error."""
        return SquaredError(tolerance=0.04)

    @property
    def chance(self) -> float:
        """The variance of the sum of two numbers."""
        return 1 / 6

    @property
    def features(self) -> int:
        """Number and mark."""
        return 2

    def draw(self, random: np.random.Generator, rows: int) -> Sample:
        """Numbers and marks."""
        x = np.zeros((rows, self.length, 2), np.float32)
        x[..., 0] = random.random((rows, self.length), np.float32)
        half, row = self.length // 2, np.arange(rows)
        x[row, random.integers(0, half, rows), 1] = 1
        x[row, random.integers(half, self.length, rows), 1] = 1
        return Sample(x, (x[..., 0] * x[..., 1]).sum(axis=1))
