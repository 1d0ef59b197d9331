"""Copying: remember symbols over a gap, or pick them out of noise."""

import dataclasses
from typing import ClassVar

import numpy as np

from lstmjax.tasks.base import Generated, Recipe, Sample, require

BLANK, GO = 0, 1
FIRST = 2
"""The first id that is a symbol."""


class _Copying(Generated):
    """Symbols to be said again, one answer a step, after signals to go."""

    symbols: int
    per_step: ClassVar[bool] = True

    @property
    def recipe(self) -> Recipe:
        """64 units, 2,000 updates."""
        return Recipe(epochs=20)

    @property
    def chance(self) -> float:
        """One of the symbols."""
        return 1 / self.symbols

    @property
    def tokens(self) -> int:
        """Blank, signal, symbols."""
        return FIRST + self.symbols

    @property
    def num_outputs(self) -> int:
        """One a symbol."""
        return self.symbols


@dataclasses.dataclass(frozen=True)
class CopyMemory(_Copying):
    """Say the symbols from the beginning again after a gap.

    A sequence is the symbols, ``delay`` blanks, and as many signals to go as there are symbols; at
    those the symbols are asked for, in their order. What is said elsewhere does not count, so the
    accuracy is that of the recalled symbols alone.

    Example:
        >>> task = CopyMemory(delay=2, copied=3)
        >>> x, labels, counts = task.draw(np.random.default_rng(0), 1)
        >>> x[0].tolist(), labels[0].tolist()
        ([8, 7, 6, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 6, 5, 4])
    """

    delay: int = 100
    """Blanks between the symbols and the signal to say them."""
    symbols: int = 8
    """Different symbols."""
    copied: int = 10
    """Symbols to remember."""

    source: ClassVar[str] = (
        "Hochreiter & Schmidhuber 1997; in this form Arjovsky, Shah & Bengio 2016 "
        "(arXiv:1511.06464)"
    )
    reported: ClassVar[str] = "delay 100 to 2,000, 10 of 8 symbols, 40 to 128 units"

    def __post_init__(self) -> None:
        require({"delay": self.delay, "copied": self.copied})
        require({"symbols": self.symbols}, 2)

    def draw(self, random: np.random.Generator, rows: int) -> Sample:
        """Symbols, blanks, signals."""
        said = random.integers(0, self.symbols, (rows, self.copied), np.int32)
        x = np.full((rows, self.delay + 2 * self.copied), BLANK, np.int32)
        x[:, : self.copied] = said + FIRST
        return _recalled(x, said)


@dataclasses.dataclass(frozen=True)
class SelectiveCopy(_Copying):
    """Say the symbols again that stood at random places among blanks.

    Unlike in `CopyMemory` a model must tell what to remember from what to pass over: places differ
    from row to row.

    Example:
        >>> x, labels, counts = SelectiveCopy(length=6, copied=2).draw(np.random.default_rng(0), 1)
        >>> x[0].tolist(), labels[0].tolist()
        ([0, 8, 7, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 6, 5])
    """

    length: int = 64
    """Steps before the signals to go."""
    symbols: int = 8
    """Different symbols."""
    copied: int = 8
    """Symbols to remember."""

    source: ClassVar[str] = (
        "Jing et al. 2017, denoise (arXiv:1706.02761); Gu & Dao 2023, selective copying "
        "(arXiv:2312.00752)"
    )
    reported: ClassVar[str] = (
        "length 4,096, 16 of 16 symbols (Gu & Dao); length 200 and more (Jing)"
    )

    def __post_init__(self) -> None:
        require({"copied": self.copied})
        require({"symbols": self.symbols}, 2)
        require({"length": self.length}, self.copied)

    def draw(self, random: np.random.Generator, rows: int) -> Sample:
        """Symbols among blanks, then signals."""
        said = random.integers(0, self.symbols, (rows, self.copied), np.int32)
        places = random.random((rows, self.length)).argpartition(self.copied - 1, axis=1)
        places = np.sort(places[:, : self.copied], axis=1)
        x = np.full((rows, self.length + self.copied), BLANK, np.int32)
        np.put_along_axis(x, places, said + FIRST, axis=1)
        return _recalled(x, said)


def _recalled(x: np.ndarray, said: np.ndarray) -> Sample:
    """Signals at the end, where the symbols are asked for and count."""
    labels, counts = np.zeros(x.shape, np.int32), np.zeros(x.shape, bool)
    copied = said.shape[1]
    x[:, -copied:] = GO
    labels[:, -copied:] = said
    counts[:, -copied:] = True
    return Sample(x, labels, counts)
