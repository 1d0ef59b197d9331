"""Data that does not fit in memory: encoded rows in ArrayRecord files, read as they are needed.

Only the length of each row is kept in memory, four bytes a row. Which rows meet in a batch, and the
order of batches, are those of `Batches`: a stream trains to the same bits, is resumed by the same
two integers, and each process reads its share of a batch only.
"""

import functools
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

from lstmjax import files
from lstmjax.data.batches import Batch, Batches
from lstmjax.data.vocabulary import UNKNOWN
from lstmjax.errors import UserError, extra, first_line

_INDEX = "rows.npz"


def write_rows(
    folder: pathlib.Path,
    rows: Iterable[tuple[Int32[np.ndarray, " _"], int]],
    shard_rows: int = 100_000,
) -> None:
    """Write rows to a new folder, one after the other; all of them or none.

    Args:
        folder: to be made; it must not exist.
        rows: ids and label of each.
        shard_rows: rows of a file.

    Raises:
        UserError: the folder exists, or there are no rows.
        OSError: it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = pathlib.Path(parent) / "train"
        ...     write_rows(folder, [(np.array([1, 7], np.int32), 1), (np.array([1], np.int32), 0)])
        ...     lengths, labels = row_lengths(folder)
        ...     batch = next(StreamedBatches(folder, 2, boundaries=(4,)).in_order())
        ...     lengths.tolist(), batch.ids.tolist(), batch.labels.tolist()
        ([2, 1], [[1, 7, 0, 0], [1, 0, 0, 0]], [1, 0])
    """
    with extra("imdb"):
        from array_record.python.array_record_module import ArrayRecordWriter

    if folder.exists():
        raise UserError(f"{folder} exists: name another folder, or delete it")
    temporary = folder.with_name(f".{folder.name}{files.TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    files.make_folder(temporary)
    lengths, labels = [], []
    writer: ArrayRecordWriter | None = None
    for number, (ids, label) in enumerate(rows):
        if number % shard_rows == 0:
            if writer is not None:
                writer.close()
            path = temporary / f"rows-{number // shard_rows:05}.array_record"
            writer = ArrayRecordWriter(str(path), "group_size:1")
        assert writer is not None
        writer.write(np.asarray(ids, "<i4").tobytes())
        lengths.append(len(ids))
        labels.append(label)
    if writer is None:
        raise UserError("there are no rows to write: give at least one")
    writer.close()
    sizes, answers = np.array(lengths, np.int32), np.array(labels, np.int32)
    files.publish(temporary / _INDEX, lambda file: np.savez(file, lengths=sizes, labels=answers))
    files.sync_tree(temporary)
    temporary.rename(folder)
    files.sync_folder(folder.parent)


@runtime_checkable
class _Source(Protocol):
    """Rows by number, as Grain reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> bytes: ...


class StreamedBatches(Batches):
    """`Batches` of the rows in a folder of `write_rows`, read by Grain ahead of use.

    Args:
        folder: what `write_rows` made.
        batch_size: rows of every batch.
        boundaries: as those of `Batches`.
        padding: "right" or "left", the side of the ids that is padded.
        top_words: ids from here on become unknown.

    Raises:
        UserError: the folder cannot be read, or an argument is out of range.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        batch_size: int,
        *,
        boundaries: Sequence[int],
        padding: Literal["right", "left"] = "right",
        top_words: int | None = None,
    ) -> None:
        lengths, labels = row_lengths(folder)
        self._prepare(batch_size, boundaries, padding, len(lengths))
        lengths = np.minimum(lengths, self.boundaries[-1])
        self._lengths = np.append(lengths, 0).astype(np.int32)
        self._labels = np.append(labels, 0).astype(np.int32)
        self._folder, self._top_words = folder, top_words

    @functools.cached_property
    def _source(self) -> _Source:
        with extra("imdb"):
            import grain

        paths = sorted(map(str, self._folder.glob("rows-*.array_record")))
        source = grain.sources.ArrayRecordDataSource(paths)
        if len(source) != len(self._lengths) - 1:
            raise UserError(
                f"{self._folder} holds {len(source)} rows of {len(self._lengths) - 1}: write it "
                "again"
            )
        return source

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of lengths and labels, of how they are cut, and of the files' sizes."""
        sizes = [path.stat().st_size for path in sorted(self._folder.glob("rows-*"))]
        return self._digest(self._lengths, self._labels, np.array([*sizes, self._top_words or 0]))

    def _batches(self, plan: Int[np.ndarray, "batches batch"]) -> Iterator[Batch]:
        with extra("imdb"):
            import grain

        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
        return iter(grain.MapDataset.source(plan).map(self._batch).to_iter_dataset(options))

    def _cut(
        self, rows: Int[np.ndarray, " batch"], position: np.ndarray, inside: np.ndarray
    ) -> Int32[np.ndarray, "batch steps"]:
        ids = np.zeros(position.shape, np.int32)
        for place, (row, length) in enumerate(zip(rows, self._lengths[rows], strict=True)):
            if length:
                ids[place, inside[place]] = self._row(int(row))[-length:]
        return ids

    def _row(self, row: int) -> Int32[np.ndarray, " steps"]:
        try:
            ids = np.frombuffer(self._source[row], "<i4").astype(np.int32)
        except Exception as error:  # whatever a damaged file makes the reader stumble over
            raise UserError(
                f"cannot read row {row} of {self._folder} ({first_line(error)}): write it again"
            ) from error
        return ids if self._top_words is None else np.where(ids < self._top_words, ids, UNKNOWN)


def row_lengths(
    folder: pathlib.Path,
) -> tuple[Int32[np.ndarray, " rows"], Int32[np.ndarray, " rows"]]:
    """Length and label of each row of a folder of `write_rows`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with (folder / _INDEX).open("rb") as raw, np.load(raw, allow_pickle=False) as index:
            lengths, labels = index["lengths"], index["labels"]
        if lengths.shape != labels.shape or lengths.ndim != 1 or (lengths < 1).any():
            raise ValueError("lengths and labels do not fit together")
        return lengths, labels
    except Exception as error:
        raise UserError(
            f"no rows can be read from {folder} ({first_line(error)}): write them by "
            "lstmjax.data.write_rows"
        ) from error
