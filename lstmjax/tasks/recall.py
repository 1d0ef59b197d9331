"""Associative recall: look values up by keys that were read before."""

import dataclasses
from typing import ClassVar

import numpy as np

from lstmjax.tasks.base import Generated, Recipe, Sample, require


@dataclasses.dataclass(frozen=True)
class AssociativeRecall(Generated):
    """Multi-query associative recall: pairs of key and value, then keys, whose values are asked.

    A sequence begins with ``pairs`` pairs; each key comes once more at a random place after them,
    and there its value is asked for. The other places hold blanks. Keys are different within a
    sequence.

    Example:
        >>> task = AssociativeRecall(pairs=2, length=8, keys=3, values=3)
        >>> x, labels, counts = task.draw(np.random.default_rng(1), 1)
        >>> x[0].tolist(), labels[0].tolist(), int(counts[0].sum())
        ([3, 6, 1, 6, 3, 0, 0, 1], [0, 0, 0, 0, 2, 0, 0, 2], 2)
    """

    pairs: int = 8
    """Pairs of key and value."""
    length: int = 64
    """Steps of a sequence."""
    keys: int = 32
    """Different keys."""
    values: int = 32
    """Different values."""

    source: ClassVar[str] = "Arora et al. 2023, Zoology (arXiv:2312.04927)"
    reported: ClassVar[str] = "length 64 to 512, 4 to 64 pairs, 8,192 tokens, 64 to 512 units"
    per_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require({"pairs": self.pairs})
        require({"values": self.values}, 2)
        require({"keys": self.keys}, self.pairs)
        require({"length": self.length}, 3 * self.pairs)

    @property
    def recipe(self) -> Recipe:
        """64 units, 4,000 updates."""
        return Recipe(epochs=40)

    @property
    def chance(self) -> float:
        """One of the values."""
        return 1 / self.values

    @property
    def tokens(self) -> int:
        """Blank, keys, values."""
        return 1 + self.keys + self.values

    @property
    def num_outputs(self) -> int:
        """One a value."""
        return self.values

    def draw(self, random: np.random.Generator, rows: int) -> Sample:
        """Pairs, then keys among blanks."""
        shape = (rows, self.length)
        key = random.random((rows, self.keys)).argsort(axis=1)[:, : self.pairs]
        value = random.integers(0, self.values, (rows, self.pairs))
        x, labels, counts = (
            np.zeros(shape, np.int32),
            np.zeros(shape, np.int32),
            np.zeros(shape, bool),
        )
        x[:, 0 : 2 * self.pairs : 2] = 1 + key
        x[:, 1 : 2 * self.pairs : 2] = 1 + self.keys + value
        rest = self.length - 2 * self.pairs
        places = 2 * self.pairs + random.random((rows, rest)).argsort(axis=1)[:, : self.pairs]
        np.put_along_axis(x, places, 1 + key.astype(np.int32), axis=1)
        np.put_along_axis(labels, places, value.astype(np.int32), axis=1)
        np.put_along_axis(counts, places, np.ones(places.shape, bool), axis=1)
        return Sample(x, labels, counts)
