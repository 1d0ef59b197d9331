"""State tracking: the product of group elements, trained on short sequences, tested on longer."""

import dataclasses
import functools
import itertools
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from lstmjax.tasks.base import Generated, Recipe, Sample, require


@dataclasses.dataclass(frozen=True)
class _WordProblem(Generated):
    """The product so far of the elements of a group; tested on longer words, too."""

    length: int = 32
    """Steps of a sequence to train on."""
    per_step: ClassVar[bool] = True
    stretched: ClassVar[tuple[int, ...]] = (2, 4)

    def __post_init__(self) -> None:
        require({"length": self.length})

    def longer(self, times: int) -> Generated:
        """Longer words."""
        return dataclasses.replace(self, length=times * self.length)


@dataclasses.dataclass(frozen=True)
class Parity(_WordProblem):
    """Has there been an odd number of ones so far? Asked at every step.

    The word problem of the group of two elements. Tested at the length that it was trained at, and
    at twice and four times that.

    Example:
        >>> x, labels, _ = Parity(length=5).draw(np.random.default_rng(1), 1)
        >>> x[0].tolist(), labels[0].tolist()
        ([0, 1, 1, 1, 0], [0, 1, 0, 1, 1])
    """

    source: ClassVar[str] = (
        "Minsky & Papert 1969; as a test of state tracking Delétang et al. 2022 (arXiv:2207.02098)"
    )
    reported: ClassVar[str] = "trained up to 40 steps, tested up to 500 (Delétang et al.)"

    @property
    def recipe(self) -> Recipe:
        """64 units, 2,000 updates."""
        return Recipe(epochs=20)

    @property
    def chance(self) -> float:
        """One of two."""
        return 1 / 2

    @property
    def tokens(self) -> int:
        """Zero and one."""
        return 2

    def draw(self, random: np.random.Generator, rows: int) -> Sample:
        """Bits and their running parity."""
        x = random.integers(0, 2, (rows, self.length), np.int32)
        return Sample(x, np.cumsum(x, axis=1, dtype=np.int32) % 2)


@dataclasses.dataclass(frozen=True)
class S5(_WordProblem):
    """The product so far of permutations of five things. Asked at every step.

    The word problem of S5 is complete for NC1: no constant-depth transformer and no linear
    recurrence with a diagonal transition is known to solve it at every length, an RNN does. Tested
    at the length that it was trained at, and at twice and four times that.

    Example:
        >>> x, labels, _ = S5(length=3).draw(np.random.default_rng(0), 1)
        >>> bool(labels[0, 1] == S5.table()[x[0, 1], x[0, 0]])
        True
    """

    length: int = 16
    """Steps of a sequence to train on."""

    source: ClassVar[str] = (
        "Barrington 1989; as a test of sequence models Merrill, Petty & Sabharwal 2024 "
        "(arXiv:2404.08819)"
    )
    reported: ClassVar[str] = "lengths up to 25 (Merrill et al.)"

    @property
    def recipe(self) -> Recipe:
        """64 units, 4,000 updates."""
        return Recipe(epochs=40)

    @property
    def chance(self) -> float:
        """One of the 120 permutations."""
        return 1 / 120

    @property
    def tokens(self) -> int:
        """The permutations."""
        return 120

    @property
    def num_outputs(self) -> int:
        """One a permutation."""
        return 120

    def draw(self, random: np.random.Generator, rows: int) -> Sample:
        """Words and their products."""
        x, table = random.integers(0, 120, (rows, self.length), np.int32), self.table()
        labels, product = np.empty_like(x), np.zeros(rows, np.int32)  # 0 is the identity
        for t in range(self.length):
            labels[:, t] = product = table[x[:, t], product]
        return Sample(x, labels)

    @staticmethod
    @functools.cache
    def table() -> Int[np.ndarray, "120 120"]:
        """Number of the permutation that does the second first, then the first."""
        elements = [*itertools.permutations(range(5))]
        number = {p: n for n, p in enumerate(elements)}
        product = [[number[tuple(a[i] for i in b)] for b in elements] for a in elements]
        return np.array(product, np.int32)
