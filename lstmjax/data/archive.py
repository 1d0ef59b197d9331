"""Reading the archive of IMDB reviews (aclImdb) without unpacking it, and refusing bad ones."""

import gzip
import hashlib
import os
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from lstmjax.errors import UserError

ORIGINAL_NAME = "aclImdb_v1.tar.gz"
ORIGINAL_BYTES = 84_125_825
ORIGINAL_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
REVIEWS = {
    "train/neg": 12_500,
    "train/pos": 12_500,
    "train/unsup": 50_000,
    "test/neg": 12_500,
    "test/pos": 12_500,
}
MAX_REVIEW_BYTES = 2**20  # the longest review has about 14,000 characters
MAX_UNPACKED_BYTES = 2**30  # the reviews and the original's word counts need about 340 MB


class _Bounded:
    """A reader that gives up after ``MAX_UNPACKED_BYTES``, whatever a header announces."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file
        self._left = MAX_UNPACKED_BYTES

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise UserError(f"unpacked it is larger than {MAX_UNPACKED_BYTES:,} bytes")
        return data


def _folder(name: str) -> str | None:
    """Return "train/pos" and the like for a review, None for any other file."""
    parts = name.split("/")
    folder = "/".join(parts[1:3])
    return folder if parts[0] == "aclImdb" and len(parts) > 3 and folder in REVIEWS else None


def _refuse_unsafe(member: tarfile.TarInfo) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(f"its member {member.name!r} points outside the archive")
    if not (member.isreg() or member.isdir()):
        raise UserError(f"its member {member.name!r} is a link or a device")
    if _folder(posixpath.normpath(member.name)) and member.size > MAX_REVIEW_BYTES:
        raise UserError(
            f"its review {member.name!r} has {member.size:,} bytes, more than {MAX_REVIEW_BYTES:,}"
        )


def iter_archive(path: str | os.PathLike[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and open file of each file in the archive, in one pass, nothing unpacked to disk.

    Raises:
        UserError: a member is unsafe or absurdly large; the message lacks the archive's name.
        OSError, EOFError, zlib.error, tarfile.TarError: the archive cannot be read to its end.
    """
    with gzip.open(path) as unpacked:
        stream = _Bounded(unpacked)
        with tarfile.open(fileobj=stream, mode="r|", bufsize=2**20) as tar:  # type: ignore[call-overload]
            for member in tar:
                _refuse_unsafe(member)
                if file := tar.extractfile(member):
                    yield posixpath.normpath(member.name), file
            while stream.read(2**20):  # gzip finds a cut or damaged end only when it gets there
                pass


def _count_reviews(path: Path, progress: bool) -> Counter[str]:
    from tqdm import tqdm

    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for name, _ in tqdm(
        iter_archive(path), desc="Checking the archive", unit=" files", disable=not progress
    ):
        if folder := _folder(name):
            if name in seen:
                raise UserError(f"it holds the review {name!r} twice")
            seen.add(name)
            counts[folder] += 1
    return counts


def check_archive(path: Path, progress: bool, reviews: Mapping[str, int] = REVIEWS) -> None:
    """Accept the original archive, or one with as many reviews in the same folders.

    Args:
        path: the archive.
        progress: show a progress bar.
        reviews: the number of reviews expected in each folder.

    Raises:
        UserError: the archive is neither, or unsafe to read, or cannot be read to its end.
    """
    checksum = ""
    try:
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        if checksum == ORIGINAL_SHA256:
            return
        counts = _count_reviews(path, progress)
        wrong = [
            f"{name} {counts[name]:,} of {n:,}" for name, n in reviews.items() if counts[name] != n
        ]
        if not wrong:
            return
        problem = "wrong number of reviews: " + ", ".join(wrong)
    except UserError as error:
        problem = str(error)
    except (EOFError, OSError, zlib.error, tarfile.TarError) as error:
        problem = f"{type(error).__name__}: {error}"
    if checksum:
        size = path.stat().st_size
        problem = f"wrong checksum (SHA-256 {checksum}, {size:,} bytes), and {problem}"
    raise UserError(
        f"cannot use the archive {path}: {problem}; give the original {ORIGINAL_NAME} "
        f"({ORIGINAL_BYTES:,} bytes, SHA-256 {ORIGINAL_SHA256}) or one with the same reviews"
    )
