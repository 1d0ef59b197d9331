"""Character-level language modelling with a state that is carried from batch to batch."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import numpy as np

from lstmjax import files
from lstmjax.data.batches import Batch, Source, generator_of
from lstmjax.data.demo import SIZES, reports
from lstmjax.errors import UserError, reason
from lstmjax.files import Json
from lstmjax.models import SequenceConfig
from lstmjax.tasks.base import Recipe, Split, Task, read_once, require
from lstmjax.tasks.metric import BITS, Metric
from lstmjax.training.step import OptimizerConfig

MAX_BYTES = 2**30
OTHER = 0
"""The id of a character that the training part does not have."""


@dataclasses.dataclass(frozen=True)
class Characters(Task):
    """Which character comes next? In bits per character.

    The first part of the text is to train on, then come those for validation and test. A batch is
    ``batch_size`` stretches of the text, read on from where the batch before ended: the state is
    carried, the gradient is cut there (truncated backpropagation through time). Every pass begins
    at another place, a function of (seed, pass). Evaluation reads each of ``streams`` stretches in
    one go, so the first characters of each lack what was before.

    Example:
        >>> batches = Characters(size=10_000, length=16).train(batch_size=4).epoch(0, 0)
        >>> first, second = next(batches), next(batches)
        >>> bool((first.labels[:, -1] == second.ids[:, 0]).all())
        True
    """

    file: pathlib.Path | None = None
    """A text in UTF-8; without it, the built-in demo corpus."""
    length: int = 64
    """Characters between two updates."""
    size: int = 0
    """Only so many characters of the text, its first ones; 0: all."""
    validation_share: float = 0.05
    """Share of the text that settings are chosen by."""
    test_share: float = 0.05
    """Share of the text to test on, its end."""
    streams: int = 16
    """Stretches that are evaluated side by side."""

    source: ClassVar[str] = "Graves 2013 (arXiv:1308.0850); Mikolov et al. 2012"
    reported: ClassVar[str] = (
        "Penn Treebank, text8, enwik8: 100 to 200 characters, 1,000 units and more"
    )
    metric: ClassVar[Metric] = BITS
    per_step: ClassVar[bool] = True
    carried: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require({"length": self.length, "streams": self.streams})

    @property
    def recipe(self) -> Recipe:
        """128 units, 5 passes."""
        sizes = SequenceConfig(hidden_size=128, embedding_size=32)
        rate = OptimizerConfig(learning_rate=3e-3, schedule="one-cycle", clip_norm=1.0)
        return Recipe(epochs=5, batch_size=64, model=sizes, optimizer=rate)

    @property
    def chance(self) -> float:
        """Bits per character of somebody who knows how frequent each is in the training part."""
        text = _read(self)
        count = np.bincount(text.parts["train"], minlength=text.tokens) + 1
        return float(-np.log2(count / count.sum())[text.parts["test"]].mean())

    @property
    def tokens(self) -> int:
        """Characters of the training part, and one for all others."""
        return _read(self).tokens

    @property
    def num_outputs(self) -> int:
        """One a character."""
        return self.tokens

    def train(self, batch_size: int) -> Source:
        """Stretches of the training part."""
        return _Stretches(_read(self).parts["train"], batch_size, self.length)

    def validation(self, batch_size: int) -> Source:
        """Long stretches of the validation part."""
        return _Whole(_read(self).parts["validation"], self.streams)

    def tests(self, batch_size: int) -> Mapping[str, Source]:
        """Long stretches of the test part."""
        return {"test": _Whole(_read(self).parts["test"], self.streams)}

    def facts(self) -> Mapping[str, Json]:
        """How many characters there are."""
        text = _read(self)
        counts = {f"{name} characters": len(part) for name, part in text.parts.items()}
        return {**counts, "different characters": text.tokens - 1}


@dataclasses.dataclass(frozen=True)
class _Text:
    parts: dict[Split, np.ndarray]
    tokens: int


@read_once
def _read(task: Characters) -> _Text:
    if task.file is None:
        content = "\n".join(reports("train", SIZES["train"], 0)[0])
    else:
        try:
            content = files.read_bytes(task.file, MAX_BYTES).decode()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {task.file} as UTF-8 text: {reason(error)}") from error
        content = content.replace("\r\n", "\n")
    content = content[: task.size] if task.size else content
    codes = np.frombuffer(content.encode("utf-32-le"), np.uint32)
    held = [int(len(codes) * share) for share in (task.validation_share, task.test_share)]
    cuts = np.cumsum([len(codes) - sum(held), held[0]])
    train, validation, test = np.split(codes, cuts)
    known = np.unique(train)

    def ids(part: np.ndarray) -> np.ndarray:
        if len(part) < 2 * task.streams:
            raise UserError(
                f"a text of {len(codes):,} characters is too short for shares of "
                f"{task.validation_share:g} and {task.test_share:g}: give a longer one"
            )
        place = np.searchsorted(known, part).clip(max=len(known) - 1)
        return np.where(known[place] == part, place + 1, OTHER).astype(np.int32)

    parts: dict[Split, np.ndarray] = {
        "train": ids(train),
        "validation": ids(validation),
        "test": ids(test),
    }
    return _Text(parts, len(known) + 1)


class _Stretches:
    """Batches of consecutive pieces, the rows side by side in the text."""

    padding: Literal["right", "left"] = "right"

    def __init__(self, ids: np.ndarray, rows: int, length: int) -> None:
        self._ids, self._rows, self._length = ids, rows, length
        self._count = (len(ids) - 1 - length) // (rows * length)
        if self._count < 1:
            raise UserError(
                f"the training part has {len(ids):,} characters, too few for {rows} rows of "
                f"{length}: lower --batch-size or --length"
            )

    def __len__(self) -> int:
        return self._count

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return ((self._rows, self._length),)

    @property
    def fingerprint(self) -> str:
        made = repr((self._rows, self._length)).encode()
        return hashlib.sha256(made + self._ids.tobytes()).hexdigest()

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        offset = int(generator_of(seed, epoch).integers(self._length))
        size = self._count * self._length
        used = self._ids[offset : offset + self._rows * size + 1]
        x, labels = used[:-1].reshape(self._rows, size), used[1:].reshape(self._rows, size)
        return (self._batch(x, labels, n) for n in range(start, self._count))

    def in_order(self) -> Iterator[Batch]:
        return self.epoch(0, 0)

    def _batch(self, x: np.ndarray, labels: np.ndarray, number: int) -> Batch:
        part = slice(number * self._length, (number + 1) * self._length)
        resets = np.zeros((self._rows, self._length), bool)
        resets[:, 0] = number == 0
        return _of(x[:, part], labels[:, part], resets)


class _Whole:
    """One batch, each row one long stretch."""

    padding: Literal["right", "left"] = "right"

    def __init__(self, ids: np.ndarray, rows: int) -> None:
        self._ids, self._rows = ids, rows

    def __len__(self) -> int:
        return 1

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return ((self._rows, (len(self._ids) - 1) // self._rows),)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self._rows).encode() + self._ids.tobytes()).hexdigest()

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        return self.in_order()

    def in_order(self) -> Iterator[Batch]:
        ((rows, size),) = self.shapes
        x = self._ids[: rows * size].reshape(rows, size)
        labels = self._ids[1 : rows * size + 1].reshape(rows, size)
        yield _of(x, labels, np.zeros(x.shape, bool))


def _of(x: np.ndarray, labels: np.ndarray, resets: np.ndarray) -> Batch:
    lengths = np.full(len(x), x.shape[1], np.int32)
    return Batch(x, lengths, labels, np.ones(x.shape, np.float32), resets)
