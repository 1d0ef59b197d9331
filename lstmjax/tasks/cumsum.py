"""The cumulative sum: has it reached a limit yet?"""

import dataclasses
from typing import ClassVar

import numpy as np

from lstmjax.data.cumsum import cumsum_labels
from lstmjax.models import SequenceConfig
from lstmjax.tasks.base import Generated, Recipe, Sample, require
from lstmjax.training.step import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Cumsum(Generated):
    """Has the running sum of numbers from U[0, 1) reached a quarter of their count? At every step.

    The sequences of experiments/cumsum.py, which makes all updates in one program, drawn anew.

    Example:
        >>> x, labels, _ = Cumsum(length=4).draw(np.random.default_rng(0), 1)
        >>> (100 * x[0, :, 0]).astype(int).tolist(), labels[0].tolist()
        ([85, 63, 51, 26], [0, 1, 1, 1])
    """

    length: int = 10
    """Numbers in a sequence."""
    test_rows: int = 10_000
    """Fresh sequences to test on."""

    source: ClassVar[str] = "the notebook that this project began with"
    reported: ClassVar[str] = "10 numbers, 20 units, 1,000 updates on one sequence each"
    per_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require({"length": self.length})

    @property
    def recipe(self) -> Recipe:
        """20 units, 1,000 updates of 8 rows."""
        rate = OptimizerConfig(learning_rate=2e-2, schedule="one-cycle", clip_norm=1.0)
        return Recipe(batch_size=8, model=SequenceConfig(hidden_size=20), optimizer=rate)

    @property
    def chance(self) -> float:
        """How often the more frequent answer is right, step by step, by 100,000 sequences."""
        labels = self.draw(np.random.default_rng(0), 100_000).labels
        return float(np.maximum(labels.mean(axis=0), 1 - labels.mean(axis=0)).mean())

    def draw(self, random: np.random.Generator, rows: int) -> Sample:
        """Numbers, and whether their sum has reached the limit."""
        x = random.random((rows, self.length), np.float32)
        return Sample(x[..., None], np.asarray(cumsum_labels(x), np.int32))
