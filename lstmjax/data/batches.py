"""Batches of few shapes with little padding, in an order that is a function of (seed, epoch)."""

import copy
import functools
import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from lstmjax.data.vocabulary import PAD, Dataset, Vocabulary, check_rows
from lstmjax.errors import UserError


class Batch(NamedTuple):
    """One batch; rows that only fill it up have length 0, label 0 and weight 0.

    Attributes:
        ids: (batch, steps), padded with 0; or features, (batch, steps, D).
        lengths: (batch,), the number of steps that are not padding.
        labels: (batch,), or one a step, (batch, steps); numbers where they are not classes.
        weights: of the shape of the labels, 1 for what counts, 0 for what does not, fillers above
            all.
        resets: (batch, steps), where a new sequence begins, for a recurrence that goes on from
            batch to batch; else None.
    """

    ids: Int32[np.ndarray, "batch steps"] | Float32[np.ndarray, "batch steps features"]
    lengths: Int32[np.ndarray, " batch"]
    labels: Int32[np.ndarray, "batch *steps"] | Float32[np.ndarray, "batch *steps"]
    weights: Float32[np.ndarray, "batch *steps"]
    resets: Bool[np.ndarray, "batch steps"] | None = None


def generator_of(*seed: int) -> np.random.Generator:
    """A generator that is a function of these whole numbers, 0 or more."""
    if min(seed) < 0:
        raise UserError(f"seed {min(seed)} is negative: give 0 or more")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))


class Sequences(NamedTuple):
    """A data set of features, or of ids without a vocabulary.

    Attributes:
        sequences: of each row (steps, D) numbers, or (steps,) ids.
        labels: (rows,), or of each row (steps,); whole numbers for classes, else numbers.
    """

    sequences: list[np.ndarray]
    labels: np.ndarray | list[np.ndarray]


class Batches:
    """A data set cut into batches of ``batch_size`` rows, rows of similar length together.

    A row goes to the first of the boundaries that it fits in, its bucket. Batches are cut from the
    rows in the order of their buckets, so rows that do not fill a batch of their bucket move up to
    the next larger one, and an epoch has ceil(rows / batch_size) batches whatever the order. Filler
    rows are in one batch only, that of the shortest rows, where they cost least.

    >>> from lstmjax.data import load_demo
    >>> batches = Batches(load_demo("test"), 64, boundaries=(64, 128, 500))
    >>> len(batches), batches.shapes
    (16, ((64, 64), (64, 128), (64, 500)))
    >>> next(batches.epoch(seed=0, epoch=3)).lengths.shape
    (64,)

    Args:
        dataset: what to cut; it must have rows.
        batch_size: rows of every batch.
        boundaries: lengths of the batches, rising; of longer rows the last steps are kept.
        padding: "right" or "left", the side of the ids that is padded.
        num_classes: labels are 0 to ``num_classes - 1``; None: they are not looked at.
        top_words: ids are less than this, if it is given: the size of the model's table.

    Raises:
        UserError: no rows, an argument out of range, or a row that cannot be learned from, by its
            number.
    """

    vocabulary: Vocabulary | None = None  # of the data set; rows on disk come without

    def __repr__(self) -> str:
        return told_of(self)

    def __init__(
        self,
        dataset: Dataset | Sequences,
        batch_size: int,
        *,
        boundaries: Sequence[int],
        padding: Literal["right", "left"] = "right",
        num_classes: int | None = 2,
        top_words: int | None = None,
    ) -> None:
        self._prepare(batch_size, boundaries, padding, len(dataset.sequences))
        if isinstance(dataset, Dataset):
            self.vocabulary = dataset.vocabulary
            check_rows(dataset, num_classes, top_words)
        first = dataset.sequences[0]
        ends = np.cumsum([len(row) for row in dataset.sequences])
        lengths = np.minimum(np.diff(ends, prepend=0), self.boundaries[-1])
        self._ids = np.concatenate(
            [*dataset.sequences, np.zeros((1, *first.shape[1:]), first.dtype)]
        )
        # One empty row more, at index -1: the filler.
        self._starts = np.append(ends - lengths, 0)
        self._lengths = np.append(lengths, 0).astype(np.int32)
        self._per_step = isinstance(dataset.labels, list)
        each = dataset.labels if isinstance(dataset.labels, list) else [dataset.labels]
        labels = np.append(np.concatenate(each), 0)
        self._labels = labels.astype(np.float32 if labels.dtype.kind == "f" else np.int32)

    def _prepare(
        self,
        batch_size: int,
        boundaries: Sequence[int],
        padding: Literal["right", "left"],
        rows: int,
    ) -> None:
        self.batch_size = batch_size
        self.boundaries = self._padded_to = tuple(int(length) for length in boundaries)
        self.padding = padding
        self._part = slice(None)
        self._per_step = False
        self._check(rows)

    def _check(self, rows: int) -> None:
        limits = (0, *self.boundaries)
        if not self.boundaries or any(a >= b for a, b in pairwise(limits)):
            raise UserError(f"boundaries {self.boundaries} are not positive and rising: sort them")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: give at least 1")
        if self.padding not in ("right", "left"):
            raise UserError(f"padding is {self.padding!r}: choose right or left")
        if rows == 0:
            raise UserError("the data set has 0 rows: give at least one")

    def share(self, part: int, parts: int) -> "Batches":
        """The same batches, of which this process builds one of ``parts`` equal parts of the rows.

        Raises:
            UserError: the rows of a batch cannot be divided so.
        """
        if self.batch_size % parts:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of the {parts} processes"
            )
        shared, size = copy.copy(self), self.batch_size // parts
        shared._part = slice(part * size, (part + 1) * size)
        return shared

    def in_one_shape(self) -> "Batches":
        """The same batches in the same order, each padded to the longest length.

        One program runs them all, which takes less time where steps are fast and compiling is not.
        """
        padded = copy.copy(self)
        padded._padded_to = self.boundaries[-1:]
        return padded

    def __len__(self) -> int:
        return -(-(len(self._lengths) - 1) // self.batch_size)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """All (batch, steps) that can occur."""
        return tuple((self.batch_size, steps) for steps in self._padded_to)

    @property
    def padding_share(self) -> float:
        """The share of steps that is padding or filler in one pass of :meth:`in_order`."""
        rows = self._plan(np.arange(len(self._lengths) - 1))
        steps = self.batch_size * sum(self._steps(batch) for batch in rows)
        return 1.0 - float(self._lengths.sum()) / steps

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the rows, their labels, and how they are cut and padded."""
        return self._digest(self._ids, self._lengths, self._labels)

    def _digest(self, *arrays: np.ndarray) -> str:
        key = hashlib.sha256(repr((self.batch_size, self.boundaries, self.padding)).encode())
        for array in arrays:
            key.update(np.ascontiguousarray(array).tobytes())
        return key.hexdigest()

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of one epoch in random order.

        What follows what is a function of ``seed`` and ``epoch`` alone; of their shapes it is one
        of ``epoch``, so that replicas side by side are padded no more than one alone.

        Args:
            seed: of the order.
            epoch: number of the epoch, from 0.
            start: number of the first batch wanted; those before it are not built.

        Raises:
            UserError: a number is negative.
        """
        if start < 0:
            raise UserError(f"start is {start}: give the number of a batch, 0 or more")
        generator = generator_of(seed, epoch)
        plan = self._plan(generator.permutation(len(self._lengths) - 1))
        bucket = np.searchsorted(self.boundaries, self._lengths[plan].max(axis=1))
        drawn, shared = (g.permutation(len(plan)) for g in (generator, generator_of(epoch)))
        order = np.empty_like(drawn)
        places, batches = (np.argsort(bucket[a], kind="stable") for a in (shared, drawn))
        order[places] = drawn[batches]  # of each bucket in the order drawn
        return self._batches(plan[order][start:])

    def in_order(self) -> Iterator[Batch]:
        """Iterate over all rows once, bucket by bucket, each in the order of the data set."""
        return self._batches(self._plan(np.arange(len(self._lengths) - 1)))

    def _batches(self, plan: Int[np.ndarray, "batches batch"]) -> Iterator[Batch]:
        return map(self._batch, plan)

    def _plan(self, order: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "batches batch"]:
        """Return the rows of each batch; -1 is a filler row."""
        buckets = np.searchsorted(self.boundaries, self._lengths[order])
        rows = order[np.argsort(buckets, kind="stable")]
        filler = np.full(-len(rows) % self.batch_size, -1)
        first = self.batch_size - len(filler)
        return np.concatenate([rows[:first], filler, rows[first:]]).reshape(-1, self.batch_size)

    def _steps(self, rows: Int[np.ndarray, " batch"]) -> int:
        return self._padded_to[np.searchsorted(self._padded_to, self._lengths[rows].max())]

    def _batch(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        steps = self._steps(rows)
        rows = rows[self._part]
        lengths = self._lengths[rows]
        position = np.broadcast_to(np.arange(steps), (len(rows), steps))
        if self.padding == "left":
            position = position - (steps - lengths)[:, None]
        inside = (position >= 0) & (position < lengths[:, None])
        ids = self._cut(rows, position, inside)
        if self._per_step:
            labels = self._at(self._labels, rows, position, inside)
            return Batch(ids, lengths, labels, inside.astype(np.float32))
        return Batch(ids, lengths, self._labels[rows], (rows >= 0).astype(np.float32))

    def _cut(
        self, rows: Int[np.ndarray, " batch"], position: np.ndarray, inside: np.ndarray
    ) -> Int32[np.ndarray, "batch steps"] | Float32[np.ndarray, "batch steps features"]:
        """The ids or features of these rows, each at its place."""
        return self._at(self._ids, rows, position, inside)

    def _at(
        self, numbers: np.ndarray, rows: np.ndarray, position: np.ndarray, inside: np.ndarray
    ) -> np.ndarray:
        index = np.where(inside, self._starts[rows][:, None] + position, -1)
        found = numbers[index]  # -1 is a zero at the end
        found[~inside] = PAD
        return found


@runtime_checkable
class Source(Protocol):
    """Where the training loop gets its batches from.

    Attributes:
        padding: the side of the rows that is padded.
    """

    padding: Literal["right", "left"]

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """All (batch, steps) that can occur."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of all that the batches depend on."""
        ...

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(self, seed: Any, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from number ``start`` on: a pure function of these three."""
        ...

    def in_order(self) -> Iterator[Batch]:
        """All batches, always the same, to evaluate on."""
        ...


def told_of(source: Source) -> str:
    """A source in a line.

    >>> from lstmjax.data import load_demo
    >>> Batches(load_demo("test"), 64, boundaries=(64, 128, 500))
    Batches(16 an epoch, of 64 x 64, 64 x 128, 64 x 500)
    """
    shapes = [f"{rows} x {steps}" for rows, steps in source.shapes]
    if len(shapes) > 4:
        shapes = [*shapes[:2], "...", shapes[-1]]
    return f"{type(source).__name__}({len(source)} an epoch, of {', '.join(shapes)})"


class SideBySide:
    """The batches of several seeds at once, each array with the seeds as its first axis.

    Of batches of different lengths the shorter ones are padded.

    >>> from lstmjax.data import load_demo
    >>> both = SideBySide(Batches(load_demo("test"), 64, boundaries=(64, 128, 500)))
    >>> next(both.epoch(seed=(0, 1), epoch=3)).lengths.shape
    (2, 64)

    Args:
        one: the batches of one seed.
    """

    def __init__(self, one: Source) -> None:
        self.one, self.padding = one, one.padding

    def __repr__(self) -> str:
        return f"SideBySide({self.one!r})"

    def __len__(self) -> int:
        return len(self.one)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Those of one seed."""
        return self.one.shapes

    @property
    def fingerprint(self) -> str:
        """That of one seed."""
        return self.one.fingerprint

    def epoch(self, seed: Any, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch of every one of the seeds, a tuple."""
        each = [self.one.epoch(one, epoch, start) for one in seed]
        return (self._stacked(parts) for parts in zip(*each, strict=True))

    def in_order(self) -> Iterator[Batch]:
        """All batches of one seed, to evaluate all on."""
        return self.one.in_order()

    def _stacked(self, parts: Sequence[Batch]) -> Batch:
        steps = max(part.ids.shape[1] for part in parts)

        def stacked(*arrays: np.ndarray | None) -> Any:
            if arrays[0] is None:
                return None
            return np.stack([self._padded(a, steps) for a in arrays if a is not None])

        return Batch(*map(stacked, *parts))

    def _padded(self, array: np.ndarray, steps: int) -> np.ndarray:
        if array.ndim == 1:
            return array
        missing = steps - array.shape[1]
        sides = (missing, 0) if self.padding == "left" else (0, missing)
        return np.pad(array, [(0, 0), sides, *[(0, 0)] * (array.ndim - 2)])


def bucket_boundaries(
    lengths: Sequence[int] | Int[np.ndarray, " rows"], count: int = 10, multiple: int = 8
) -> tuple[int, ...]:
    """Choose the bucket lengths that pad these rows least, by dynamic programming.

    >>> bucket_boundaries([3, 3, 7, 30], count=2, multiple=4)
    (8, 30)

    Args:
        lengths: length of each row.
        count: return at most this many.
        multiple: each is a multiple of this, except that the last is the longest length.

    Raises:
        UserError: no lengths, or a number below 1.
    """
    if len(lengths) == 0 or min(count, multiple, np.max(lengths)) < 1:
        raise UserError(
            f"cannot choose {count} buckets in multiples of {multiple} for {len(lengths)} lengths: "
            "all three must be at least 1"
        )
    longest = int(np.max(lengths))
    whole = -(-np.maximum(lengths, 1) // multiple) * multiple
    # An end other than these leaves a bucket empty, or longer than its rows.
    ends = np.unique(np.minimum(whole, longest))
    rows = np.searchsorted(np.sort(lengths), ends, side="right")  # rows that fit each end
    # best[m, k]: steps of all rows that fit ends[k] in m + 1 buckets; previous: the end before it
    best = np.full((min(count, len(ends)), len(ends)), np.inf)
    best[0] = rows * ends
    previous = np.zeros(best.shape, int)
    for k in range(1, len(ends)):
        total = best[:-1, :k] + (rows[k] - rows[:k]) * ends[k]
        previous[1:, k] = total.argmin(axis=1)
        best[1:, k] = total.min(axis=1)
    chosen = [len(ends) - 1]
    for m in range(int(best[:, -1].argmin()), 0, -1):
        chosen.append(int(previous[m, chosen[-1]]))
    return tuple(int(ends[k]) for k in reversed(chosen))


def hold_out(dataset: Dataset, fraction: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split off rows at random for validation; identical rows stay together.

    Args:
        dataset: the data set to split.
        fraction: share of rows for the second part; it never gets more.
        seed: the split is a function of the data and ``seed``.

    Returns:
        The rest and the part held out, both in the order of ``dataset``.

    Raises:
        UserError: one of the parts would be empty.
    """
    if not 0 < fraction < 1:
        raise UserError(f"fraction is {fraction:g}: give a number between 0 and 1")
    check_rows(dataset)
    numbers: dict[bytes, int] = {}
    group = np.array(
        [numbers.setdefault(row.tobytes(), len(numbers)) for row in dataset.sequences],
        dtype=np.int64,
    )
    order = generator_of(seed).permutation(len(numbers))
    size = np.bincount(group, minlength=len(numbers))
    held = np.empty(len(numbers), bool)
    held[order] = np.cumsum(size[order]) <= fraction * len(group)
    chosen = held[group]
    if not chosen.any():
        raise UserError(
            f"a fraction of {fraction:g} of {len(group)} rows holds out none: give a larger one"
        )

    def part(keep: np.ndarray) -> Dataset:
        rows = np.flatnonzero(keep)
        sequences = [dataset.sequences[row] for row in rows]
        return Dataset(sequences, dataset.labels[rows], dataset.vocabulary)

    return part(~chosen), part(chosen)
