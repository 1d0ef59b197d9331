"""Reading the archive of IMDB reviews (aclImdb) without unpacking it, and refusing bad ones."""

import errno
import gzip
import hashlib
import os
import posixpath
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from lstmjax.errors import UserError
from lstmjax.progress import bar

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
MAX_ARCHIVE_BYTES = 2**30
MAX_UNPACKED_BYTES = 2**30  # the reviews and the original's word counts need about 340 MB
MAX_MEMBERS = 200_000  # the original has 100,000 reviews and about 20 other files
MAX_NAME_BYTES = 512  # of names and of pax headers, which Python reads in quadratic time
_END = 1024  # zero bytes at least at the end of a tar


class _Bounded:
    """A reader that gives up after ``MAX_UNPACKED_BYTES``, whatever a header announces."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file
        self._left = MAX_UNPACKED_BYTES
        self._last = b""

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise UserError(f"unpacked it is larger than {MAX_UNPACKED_BYTES:,} bytes")
        self._last = (self._last + data[-_END:])[-_END:]
        return data

    def read_to_end(self) -> None:
        """Read what is left: gzip finds a cut or damaged end only when it gets there."""
        while self.read(2**20):
            pass
        if self._last != bytes(_END):
            raise EOFError("the tar inside ends before its end")


class _Header(tarfile.TarInfo):
    """Refuses a header before anything that it announces is read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        describes_next = not (header.isreg() or header.isdir() or header.type in _LINKS)
        if describes_next and header.size > MAX_NAME_BYTES:
            raise UserError(f"it has a header of {header.size:,} bytes")
        if not 0 <= header.size <= MAX_UNPACKED_BYTES:
            raise UserError(f"its member {header.name[:99]!r} is to have {header.size:,} bytes")
        return header


_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)


def _folder(name: str) -> str | None:
    """Return "train/pos" and the like for a review, None for any other file."""
    parts = name.split("/")
    folder = "/".join(parts[1:3])
    return folder if parts[0] == "aclImdb" and len(parts) > 3 and folder in REVIEWS else None


def _refuse_unsafe(member: tarfile.TarInfo) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(f"its member {member.name!r} points outside the archive")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise UserError(f"its member {member.name!r} is a link or a device")
    if not 0 <= member.size <= MAX_UNPACKED_BYTES:
        raise UserError(f"its member {member.name!r} is to have {member.size:,} bytes")
    if _folder(posixpath.normpath(member.name)) and member.size > MAX_REVIEW_BYTES:
        raise UserError(
            f"its review {member.name!r} has {member.size:,} bytes, more than {MAX_REVIEW_BYTES:,}"
        )


def iter_archive(path: str | os.PathLike[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and open file of each file in the archive, in one pass, nothing unpacked to disk.

    Raises:
        UserError: a member is unsafe or absurdly large; the message lacks the archive's name.
        OSError, EOFError, zlib.error, tarfile.TarError, ...: the archive cannot be read to its end.
    """
    with gzip.open(_regular(Path(path))) as unpacked:
        stream = _Bounded(unpacked)
        with tarfile.open(fileobj=stream, mode="r|", bufsize=2**20, tarinfo=_Header) as tar:  # type: ignore[call-overload]
            for number, member in enumerate(tar):
                if number == MAX_MEMBERS:
                    raise UserError(f"it has more than {MAX_MEMBERS:,} members")
                _refuse_unsafe(member)
                if file := tar.extractfile(member):
                    yield posixpath.normpath(member.name), file
                tar.members.clear()  # it would keep all of them
            stream.read_to_end()


def _regular(path: Path) -> Path:
    """Refuse what has no end, or none in sight: pipes, devices, huge files."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if found.st_size > MAX_ARCHIVE_BYTES:
        raise UserError(f"it has {found.st_size:,} bytes, more than {MAX_ARCHIVE_BYTES:,}")
    return path


def _count_reviews(path: Path, progress: bool) -> Counter[str]:
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for name, _ in bar(
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
        with _regular(path).open("rb") as file:
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
    except Exception as error:  # whatever a damaged file makes the readers stumble over
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if checksum:
        size = path.stat().st_size
        problem = f"wrong checksum (SHA-256 {checksum}, {size:,} bytes), and {problem}"
    raise UserError(
        f"cannot use the archive {path}: {problem}; give the original {ORIGINAL_NAME} "
        f"({ORIGINAL_BYTES:,} bytes, SHA-256 {ORIGINAL_SHA256}) or one with the same reviews"
    )
