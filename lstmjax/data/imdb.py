"""The IMDB reviews of Maas et al. (2011), by way of TensorFlow Datasets but without TensorFlow."""

import contextlib
import hashlib
import io
import os
import shutil
import stat
import sys
import threading
import urllib.request
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int32, Int64

from lstmjax import files, stopping
from lstmjax import progress as progress_bars
from lstmjax.cache import cache_folder, home
from lstmjax.data import archive as archives
from lstmjax.data.keras_index import keras_order
from lstmjax.data.vocabulary import FIRST_WORD, UNKNOWN, Dataset, Vocabulary, check_limits
from lstmjax.errors import DISK_FAILS, StorageError, UserError, extra

URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
_NAME = "imdb_reviews/plain_text:1.0.0"
_FOLDER = Path("imdb_reviews", "plain_text", "1.0.0")
_ENCODING = 1  # raise it when tokenize or the ids change: older caches are then ignored
_SPLITS = ("train", "test")
WordIds = Literal["frequency", "keras"]
"""Whose order decides among equally frequent words: see `load_imdb`."""
_WORK = ".lstmjax-preparing"


class _Encoded(NamedTuple):
    """One split with all its words, rows end to end; row r is ids[offsets[r] : offsets[r + 1]]."""

    ids: Int32[np.ndarray, " steps"]
    offsets: Int64[np.ndarray, " rows_and_one"]
    labels: Int32[np.ndarray, " rows"]


def load_imdb(
    split: str,
    top_words: int = 5000,
    max_length: int = 500,
    data_dir: str | os.PathLike[str] | None = None,
    archive: str | os.PathLike[str] | None = None,
    progress: bool = True,
    word_ids: WordIds = "frequency",
) -> Dataset:
    """Load 25,000 labelled reviews; the first call prepares and encodes them.

    Args:
        split: "train" or "test".
        top_words: ids from here on become ``UNKNOWN``.
        max_length: only the last ``max_length`` ids of a review are kept.
        data_dir: TFDS folder. Default: ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``. It is
            only written to if IMDB has not been prepared in it.
        archive: the archive of reviews on disk, used instead of the download when IMDB has not
            been prepared in ``data_dir``; see docs/data.md.
        progress: show progress bars.
        word_ids: of words that are equally frequent, which comes first: ``"frequency"``, the one
            seen first; ``"keras"``, the one that comes first in the index that Keras publishes, so
            that a review has the ids that `keras.datasets.imdb` gives it.

    Raises:
        UserError: the data cannot be had (no network, a bad archive, a folder that cannot be
            written or read), or an argument is out of range.
    """
    if split not in _SPLITS:
        raise UserError(f"there is no split {split!r}: choose train or test")
    if word_ids not in get_args(WordIds):
        raise UserError(f"there are no word ids {word_ids!r}: choose frequency or keras")
    check_limits(top_words, max_length)
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = home(folder)
    if not _is_prepared(root):
        _prepare(root, home(archive) if archive else None, progress)
    elif (root / _WORK).exists():
        _remove_leftovers(root)
    cache = _cache_file(root)
    wanted = {split, "train"} if word_ids == "keras" else {split}
    found = {name: _read_cache(cache, name) for name in wanted} if cache else {}
    known = {name: loaded for name, loaded in found.items() if loaded is not None}
    if known.keys() != wanted:
        splits, vocabulary = _encode(root, progress)
        _write_cache(cache, splits, vocabulary)
        known = {name: (encoded, vocabulary) for name, encoded in splits.items()}
    encoded, vocabulary = known[split]
    if word_ids == "keras":
        order = _keras_order(cache, root, known["train"][0], vocabulary)
        places = np.empty(FIRST_WORD + len(order), np.int32)
        places[:FIRST_WORD] = np.arange(FIRST_WORD)
        places[FIRST_WORD + order] = np.arange(FIRST_WORD, len(places))
        encoded = encoded._replace(ids=places[encoded.ids])
        vocabulary = Vocabulary(tuple(vocabulary.words[n] for n in order))
    return Dataset(_cut(encoded, top_words, max_length), encoded.labels, vocabulary)


def _cut(encoded: _Encoded, top_words: int, max_length: int) -> list[np.ndarray]:
    ids = np.where(encoded.ids < top_words, encoded.ids, np.int32(UNKNOWN))
    ends = encoded.offsets[1:]
    starts = np.maximum(encoded.offsets[:-1], ends - max_length)
    return [ids[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


# Preparing


def _record_files(root: Path, split: str) -> list[Path]:
    return sorted((root / _FOLDER).glob(f"imdb_reviews-{split}.array_record-*"))


def _is_prepared(root: Path) -> bool:
    if not (root / _FOLDER / "dataset_info.json").is_file():
        return False
    if all(_record_files(root, split) for split in _SPLITS):
        return True
    raise UserError(
        f"{root / _FOLDER} holds IMDB, but not as ArrayRecord, the only form that can be read "
        "without TensorFlow: give another folder with --data-dir, to prepare it there"
    )


def _prepare(
    root: Path,
    archive: Path | None,
    progress: bool,
    reviews: Mapping[str, int] = archives.REVIEWS,
) -> None:
    """Prepare IMDB in ``root``: beside its place first, then moved there, so all or nothing."""
    if archive is None:
        _check_host()
    else:
        archives.check_archive(archive, progress, reviews)
    work = root / _WORK
    try:
        files.make_folder(root)
        with _only_one(work), stopping.removed_on_exit(work):
            try:
                if not _is_prepared(root):  # else the one that was waited for has done it
                    for left in (*root.glob(".lstmjax-preparing-*"), work / "data"):
                        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
                    _run_tfds(work / "data", archive, progress)
                    _move(work / "data", root)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        kind = StorageError if error.errno in DISK_FAILS else UserError
        raise kind(
            f"cannot prepare IMDB in {root}: {error}; give a folder with room that can be written "
            "with --data-dir"
        ) from error


@contextlib.contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Hold the lock of the folder in which one process prepares at a time."""
    lock = files.Lock(work)
    try:
        lock.take(wait=False)
    except files.Busy:
        print(f"waiting for {lock.holder()}, which prepares IMDB in {work.parent}", file=sys.stderr)
        lock.take(wait=True)
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(root: Path) -> None:
    """Remove what a process that was killed has left, unless the folder cannot be written."""
    lock = files.Lock(root / _WORK)
    with contextlib.suppress(OSError, files.Busy):
        lock.take(wait=False)
        shutil.rmtree(root / _WORK, ignore_errors=True)
    lock.release()


def _move(prepared: Path, root: Path) -> None:
    files.sync_tree(prepared)
    files.make_folder((root / _FOLDER).parent)
    try:
        os.rename(prepared / _FOLDER, root / _FOLDER)
    except OSError:
        if not _is_prepared(root):  # else another process has been faster
            raise
    files.sync_folder((root / _FOLDER).parent)


def _check_host(seconds: float = 20.0) -> None:
    """Find out in seconds what TFDS would find out in minutes: that there is no network."""
    problem = f"no answer within {seconds:g} s"

    def ask() -> None:
        nonlocal problem
        try:
            # GET, unread: there are proxies that refuse HEAD.
            urllib.request.urlopen(URL, timeout=seconds).close()
            problem = ""
        except Exception as error:
            problem = str(error)

    # A thread, for no timeout bounds the name look-up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if problem:
        raise UserError(
            f"IMDB is not prepared and {URL} cannot be reached ({problem}): name a prepared TFDS "
            f"folder with --data-dir or a copy of {archives.ORIGINAL_NAME} with --archive, or use "
            "the synthetic corpus with --data demo"
        )


def _run_tfds(root: Path, archive: Path | None, progress: bool) -> None:
    """Let the TFDS builder prepare IMDB in ``root`` as ArrayRecord."""
    progress_bars.load()
    with extra("imdb"):
        import requests
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
        from tensorflow_datasets.core.download.util import DownloadError
        from tensorflow_datasets.core.utils import tqdm_utils

    builder = tfds.builder(_NAME, data_dir=root)
    make_manager = builder._make_download_manager

    def make_manager_without_tensorflow(**arguments: object) -> object:
        manager = make_manager(**arguments)
        manager.iter_archive = archives.iter_archive  # TFDS opens the archive with TensorFlow
        if archive is not None:
            manager.download = lambda url: archive
        return manager

    builder._make_download_manager = make_manager_without_tensorflow
    bars_were_on = tqdm_utils._active
    tfds.display_progress_bar(progress)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints the temporary folder's name
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except (DownloadError, NonMatchingChecksumError, requests.RequestException) as error:
        raise UserError(
            f"the download of {URL} failed ({' '.join(str(error).split())}): try again, or name a "
            f"copy of {archives.ORIGINAL_NAME} with --archive"
        ) from error
    finally:
        tfds.display_progress_bar(bars_were_on)


# Encoding


def _read_texts(root: Path, split: str, progress: bool) -> tuple[list[str], np.ndarray]:
    progress_bars.load()
    with extra("imdb"):
        import tensorflow_datasets as tfds

    texts: list[str] = []
    labels: list[int] = []
    try:
        source = tfds.builder(_NAME, data_dir=root).as_data_source(split)
        _check_rows(split, len(source))
        with progress_bars.bar(
            total=len(source), desc=f"Reading {split}", unit=" reviews", disable=not progress
        ) as bar:
            for start in range(0, len(source), 1000):
                rows = source.__getitems__(range(start, min(start + 1000, len(source))))
                texts += [row["text"].decode("utf-8", "replace") for row in rows]
                labels += [row["label"] for row in rows]
                bar.update(len(rows))
    except Exception as error:  # the readers raise whatever a damaged file makes them stumble over
        raise UserError(
            f"cannot read IMDB in {root / _FOLDER} ({' '.join(str(error).split())}): delete that "
            "folder to prepare it again, or give another with --data-dir"
        ) from error
    return texts, np.array(labels, np.int32)


def _check_rows(split: str, rows: int) -> None:
    wanted = archives.REVIEWS[f"{split}/neg"] + archives.REVIEWS[f"{split}/pos"]
    if rows != wanted:
        raise ValueError(f"{split} has {rows:,} reviews of {wanted:,}")


def _encode(root: Path, progress: bool) -> tuple[dict[str, _Encoded], Vocabulary]:
    def bar(rows: list[str], what: str) -> Iterable[str]:
        return progress_bars.bar(rows, desc=what, unit=" reviews", disable=not progress)

    read = {split: _read_texts(root, split, progress) for split in _SPLITS}
    vocabulary = Vocabulary.from_texts(bar(read["train"][0], "Counting words"))
    splits = {}
    for split, (texts, labels) in read.items():
        rows = [vocabulary.encode(text) for text in bar(texts, f"Encoding {split}")]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        splits[split] = _Encoded(np.concatenate(rows), offsets, labels)
    return splits, vocabulary


def _cache_file(root: Path) -> Path | None:
    """The file for the encoding of what is in ``root``, named by its content; None: no home."""
    key = hashlib.sha256(f"{_NAME} {_ENCODING}".encode())
    for split in _SPLITS:
        for path in _record_files(root, split):
            with path.open("rb") as file:
                key.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    try:
        return cache_folder() / f"imdb-{key.hexdigest()[:16]}.npz"
    except UserError:
        return None


def _read_cache(path: Path, split: str) -> tuple[_Encoded, Vocabulary] | None:
    try:
        with path.open("rb") as raw:
            _refuse_bomb(raw)
            with np.load(raw, allow_pickle=False) as file:
                encoded = _Encoded(*(file[f"{split}_{field}"] for field in _Encoded._fields))
                words = file["words"].tobytes().decode().split("\n")
        _check_encoded(encoded, len(words))
        _check_rows(split, len(encoded.labels))
        return encoded, Vocabulary(tuple(words))
    except Exception:  # absent, or damaged in whatever way: it is rebuilt
        return None


def _keras_order(
    cache: Path | None, root: Path, train: _Encoded, vocabulary: Vocabulary
) -> Int64[np.ndarray, " words"]:
    """Places of the words in Keras' index; kept beside the cache, for it takes seconds."""
    path = cache and cache.with_name(f"{cache.stem}-keras.npy")
    size = len(vocabulary)
    try:
        assert path is not None
        found = np.frombuffer(files.read_bytes(path, 4 * size), np.int32).astype(np.int64)
        if len(found) == size and (np.sort(found) == np.arange(size)).all():
            return found
    except (AssertionError, OSError, ValueError):  # absent, or damaged: it is rebuilt
        pass
    rows = np.split(train.ids, train.offsets[1:-1])
    try:
        order = np.array(keras_order(rows, train.labels, vocabulary.words, FIRST_WORD))
    except ValueError as error:
        raise UserError(
            f'{error}, so word_ids="keras" is not to be had from {root}; use "frequency"'
        ) from error
    with contextlib.suppress(OSError):
        if path is not None:
            files.publish(path, order.astype(np.int32).tobytes())
    return order


def _refuse_bomb(raw: IO[bytes]) -> None:
    """Raise ValueError if a zip file announces more than it holds."""
    found = os.fstat(raw.fileno())
    with zipfile.ZipFile(raw) as packed:
        announced = sum(member.file_size for member in packed.infolist())
    if not stat.S_ISREG(found.st_mode) or announced > found.st_size:
        raise ValueError("it announces more than it holds")
    raw.seek(0)


def _check_encoded(encoded: _Encoded, words: int) -> None:
    """Raise ValueError unless the arrays are what `_encode` could have made."""
    ids, offsets, labels = encoded
    fits = (
        (ids.dtype, offsets.dtype, labels.dtype) == (np.int32, np.int64, np.int32)
        and ids.ndim == offsets.ndim == labels.ndim == 1
        and len(labels) == len(offsets) - 1
        and (offsets[0], offsets[-1]) == (0, len(ids))
        and (np.diff(offsets) > 0).all()
        and 0 <= ids.min() <= ids.max() < words + FIRST_WORD
        and np.isin(labels, (0, 1)).all()
    )
    if not fits:
        raise ValueError("it does not fit together")


def _write_cache(path: Path | None, splits: Mapping[str, _Encoded], vocabulary: Vocabulary) -> None:
    arrays = {
        f"{split}_{name}": array
        for split, encoded in splits.items()
        for name, array in encoded._asdict().items()
    }
    words = np.frombuffer("\n".join(vocabulary.words).encode(), np.uint8)
    try:
        if path is None:
            raise FileNotFoundError("there is no home folder; set LSTMJAX_CACHE_DIR")
        files.make_folder(path.parent)
        files.sweep(path.parent, "tmp*.tmp", ".*.npz.tmp")
        files.publish(path, lambda file: np.savez(file, words=words, **arrays))
    except OSError as error:
        warnings.warn(
            f"cannot write the cache {path} ({error}): the next run encodes again", stacklevel=3
        )
