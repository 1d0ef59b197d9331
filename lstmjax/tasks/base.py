"""The contract of a task: what a model sees, what is asked of it, and how the answer is measured.

A task is a frozen dataclass whose fields are its sizes. It gives batches, each a pure function of
(seed, step), and a model for a cell; the training loop, many seeds in one program, comparison and
plots work for any of them. Your own one, in your own file, has the same rights:
``--task path/to/file.py:MyTask``.
"""

import abc
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np
from flax import nnx
from jaxtyping import Float32, Int32

from lstmjax.cells.base import Cell
from lstmjax.data.batches import Batch, Source, generator_of
from lstmjax.errors import UserError
from lstmjax.files import Json
from lstmjax.models import SequenceConfig, SequenceModel
from lstmjax.tasks.metric import ACCURACY, Metric
from lstmjax.training.objective import CrossEntropy, Objective
from lstmjax.training.step import OptimizerConfig

Split = Literal["train", "validation", "test"]
_STREAMS = {"train": 0, "validation": 1, "test": 2}


SIZES = SequenceConfig()
ADAM = OptimizerConfig(learning_rate=3e-3, schedule="one-cycle", clip_norm=1.0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """With what a task is trained, unless it is said otherwise.

    Attributes:
        epochs: how often it is evaluated; of a data set, passes over it.
        batch_size: rows an update, over all devices together.
        model: sizes.
        optimizer: Adam and what surrounds it.
    """

    epochs: int = 10
    batch_size: int = 64
    model: Any = SIZES
    optimizer: OptimizerConfig = ADAM


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """What a model sees, what is asked of it, and how the answer is measured.

    Attributes:
        source: the paper or data set that it comes from.
        reported: at which sizes it is usually reported.
        metric: the figure that models are judged by.
        per_step: an answer at every step, or one a sequence.
        masked: rows have different lengths, and their padding is to be hidden.
        carried: the recurrence goes on from batch to batch.
    """

    source: ClassVar[str] = ""
    reported: ClassVar[str] = ""
    metric: ClassVar[Metric] = ACCURACY
    per_step: ClassVar[bool] = False
    masked: ClassVar[bool] = False
    carried: ClassVar[bool] = False

    @property
    def recipe(self) -> Recipe:
        """With what it is trained, unless it is said otherwise."""
        return Recipe()

    @property
    def objective(self) -> Objective:
        """What is minimised, and what is counted."""
        return CrossEntropy()

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """What `metric` is for somebody who does not look at the input."""

    @property
    def tokens(self) -> int:
        """How many ids there are; 0: a model sees features."""
        return 0

    @property
    def features(self) -> int:
        """How many features a model sees at a step, if there are no ids."""
        return 1

    @property
    def num_outputs(self) -> int:
        """Outputs of each answer: 1, or one a class."""
        return 1

    @abc.abstractmethod
    def train(self, batch_size: int) -> Source:
        """Batches to train on."""

    @abc.abstractmethod
    def validation(self, batch_size: int) -> Source:
        """What settings are chosen by; never test data."""

    @abc.abstractmethod
    def tests(self, batch_size: int) -> Mapping[str, Source]:
        """What is measured at the end, by name; the first is what models are judged by."""

    def make_model(self, cell: Cell, config: Any, **settings: Any) -> nnx.Module:
        """A model of ``cell`` for this task.

        Args:
            cell: the recurrence.
            config: sizes, of the type of ``recipe.model``.
            settings: ``precision``, ``engine`` and ``rngs`` of `lstmjax.models.SequenceModel`.
        """
        return SequenceModel(
            cell,
            config,
            tokens=self.tokens,
            features=self.features,
            per_step=self.per_step,
            num_outputs=self.num_outputs,
            **settings,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, where accuracy alone does not say enough; else none."""
        return ()

    def pretrained(self, model: nnx.Module) -> None:  # noqa: B027
        """Give parameters of a new model their values, where the task has some."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parts of a model that are not trained."""
        return ()

    def facts(self) -> Mapping[str, Json]:
        """What is worth knowing of the data: of a user's own, class balance and lengths."""
        return {}


P = ParamSpec("P")
R = TypeVar("R")
TaskT = TypeVar("TaskT", bound=Task)


def read_once(
    read: Callable[Concatenate[TaskT, P], R],
) -> Callable[Concatenate[TaskT, P], R]:
    """Keep what is read for a task, until one of the task's files becomes another."""

    @functools.lru_cache(maxsize=2)
    def kept(task: TaskT, files: Hashable, *args: P.args, **kwargs: P.kwargs) -> R:
        return read(task, *args, **kwargs)

    @functools.wraps(read)
    def found(task: TaskT, *args: P.args, **kwargs: P.kwargs) -> R:
        paths = (path for path in vars(task).values() if isinstance(path, pathlib.Path))
        return kept(task, tuple(map(_stamp, paths)), *args, **kwargs)  # type: ignore[arg-type]

    return found


def _stamp(path: pathlib.Path) -> Hashable:
    """Another one where the file is another, or another one's content."""
    try:
        found = path.stat()
    except OSError:
        return path.absolute()
    return path.absolute(), found.st_ino, found.st_mtime_ns, found.st_size


class Divided(Task):
    """A task on data that are there, in three parts."""

    @abc.abstractmethod
    def part(self, split: Split, batch_size: int) -> Source:
        """Batches of one of the parts."""

    def train(self, batch_size: int) -> Source:
        """The training part."""
        return self.part("train", batch_size)

    def validation(self, batch_size: int) -> Source:
        """The validation part."""
        return self.part("validation", batch_size)

    def tests(self, batch_size: int) -> Mapping[str, Source]:
        """The test part."""
        return {"test": self.part("test", batch_size)}


class Sample(NamedTuple):
    """Sequences that a task has made up.

    Attributes:
        x: ids ``(B, T)`` or features ``(B, T, D)``.
        labels: ``(B,)``, or ``(B, T)`` for a task with an answer at every step.
        counts: ``(B, T)``, which of those answers are asked for; None: all.
    """

    x: Int32[np.ndarray, "B T"] | Float32[np.ndarray, "B T D"]
    labels: Int32[np.ndarray, "B *T"] | Float32[np.ndarray, "B *T"]
    counts: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Generated(Task):
    """A task whose sequences are made up: the batch of step n is a function of (seed, n).

    Validation and test sequences come from streams of their own, the same for all seeds.
    """

    updates: int = 100
    """Updates an epoch."""
    test_rows: int = 2048
    """Fresh sequences to test on; for validation it is a quarter of them."""

    stretched: ClassVar[tuple[int, ...]] = ()
    """Multiples of the length that it is tested at besides."""

    @abc.abstractmethod
    def draw(self, random: np.random.Generator, rows: int) -> Sample:
        """Make up ``rows`` sequences."""

    def longer(self, times: int) -> "Generated":
        """The same task on sequences so many times as long."""
        raise NotImplementedError

    def train(self, batch_size: int) -> Source:
        """Fresh sequences at every step."""
        return Fresh(self, batch_size, self.updates, "train")

    def validation(self, batch_size: int) -> Source:
        """Sequences that are neither trained on nor tested."""
        return Fresh(self, batch_size, max(1, self.test_rows // 4 // batch_size), "validation")

    def tests(self, batch_size: int) -> Mapping[str, Source]:
        """Fresh sequences, and longer ones as ``test_2x``, ``test_4x`` where the task has them."""
        count = max(1, self.test_rows // batch_size)
        longer = {
            f"test_{n}x": Fresh(self.longer(n), batch_size, max(1, count // n), "test")
            for n in self.stretched
        }
        return {"test": Fresh(self, batch_size, count, "test"), **longer}


class Fresh:
    """Batches of a `Generated` task.

    >>> from lstmjax.tasks import Adding
    >>> batches = Fresh(Adding(length=10), 4, count=3, split="train")
    >>> len(batches), next(batches.epoch(seed=0, epoch=2)).ids.shape
    (3, (4, 10, 2))

    Args:
        task: makes the sequences up.
        batch_size: rows of a batch.
        count: batches an epoch.
        split: every split has random numbers of its own.
    """

    padding: Literal["right", "left"] = "right"

    def __init__(self, task: Generated, batch_size: int, count: int, split: Split) -> None:
        if min(batch_size, count) < 1:
            raise UserError(
                f"{count} batches of {batch_size} rows for {split}: give at least 1 (--updates, "
                "--test-rows, --batch-size)"
            )
        self.task, self.batch_size, self._count, self._split = task, batch_size, count, split

    def __repr__(self) -> str:
        of = f"{self.task!r}, {self.batch_size}, count={self._count}, split={self._split!r}"
        return f"Fresh({of})"

    def __len__(self) -> int:
        return self._count

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The one (batch, steps) that occurs."""
        return (self.batch(0, 0).ids.shape[:2],)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the batches are made from."""
        made = (repr(self.task), self.batch_size, self._count, self._split)
        return hashlib.sha256(repr(made).encode()).hexdigest()

    def batch(self, seed: int, number: int) -> Batch:
        """The batch of step ``number``, a function of the two."""
        random = generator_of(_STREAMS[self._split], seed, number)
        x, labels, counts = self.task.draw(random, self.batch_size)
        lengths = np.full(self.batch_size, x.shape[1], np.int32)
        weights = np.ones(labels.shape, np.float32)
        if counts is not None:
            weights = counts.astype(np.float32)
        return Batch(x, lengths, labels, weights)

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from number ``start`` on."""
        first = epoch * self._count
        return (self.batch(seed, first + n) for n in range(start, self._count))

    def in_order(self) -> Iterator[Batch]:
        """The batches to evaluate on, the same for every seed."""
        return (self.batch(0, n) for n in range(self._count))


def require(sizes: Mapping[str, int], least: int = 1) -> None:
    """Raise `UserError` for the first of a task's sizes that is too small."""
    for name, value in sizes.items():
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
