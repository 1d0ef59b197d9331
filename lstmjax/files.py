"""Files that outlive a crash: published whole and synced, locked by one process at a time.

A rename publishes: what it publishes is on the disk before, file and folder, and the rename itself
is before `publish` returns. A lock is the operating system's (``flock``), so it ends with the
process that holds it, however that ends.
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, NoReturn, TypeAlias

from lstmjax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where cells and layers run and are checked, but nothing is written
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
TEMPORARY = ".tmp"
MAX_JSON_BYTES = 2**24
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


if TYPE_CHECKING:
    Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
else:
    Json = object
    """What a JSON text holds."""


class Busy(Exception):
    """Another process holds the lock."""


def publish(path: pathlib.Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file as a whole or not at all; once this returns, a power cut cannot undo it.

    Two processes may publish the same file at once: one after the other does.

    Args:
        path: the file; its folder exists.
        content: what to write, or what writes it to an open file.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    with _only_writer(temporary) as file:
        try:
            file.truncate()
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


@contextlib.contextmanager
def _only_writer(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """The file, open to write and locked; whoever waited for its lock may find it renamed."""
    _require_locks()
    while True:
        if path.is_symlink():  # what it points to is no file of ours
            path.unlink(missing_ok=True)
        file = os.fdopen(_opened(path), "r+b")
        with file:
            _flock(file.fileno(), fcntl.LOCK_EX)
            if _is_at(file.fileno(), path):
                yield file
                return


def _opened(path: pathlib.Path) -> int:
    """The number of a regular file, opened to write, made if it is missing; of no link's target."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP):
            raise OSError(error.errno, f"{path} is a folder or a link: delete it") from error
        raise
    return number


def _is_at(number: int, path: pathlib.Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(number), os.lstat(path))
    except FileNotFoundError:
        return False


def publish_json(path: pathlib.Path, value: object) -> None:
    """`publish` a value as JSON.

    Raises:
        OSError: as `publish`.
        ValueError: a number in it is not finite.
    """
    publish(path, (json.dumps(value, indent=2, default=str, allow_nan=False) + "\n").encode())


def read_bytes(path: pathlib.Path, limit: int) -> bytes:
    """All of a regular file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe or a device, or larger than ``limit`` bytes.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            raise ValueError(f"no regular file of at most {limit:,} bytes")
        return file.read(limit)


def read_json(path: pathlib.Path, limit: int = MAX_JSON_BYTES) -> Json:
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no JSON, or JSON nested deeper than any of ours, or too much.
    """
    return parse_json(read_bytes(path, limit))


def parse_json(text: bytes | str) -> Json:
    """A JSON value; every way in which a text is none is a ValueError, NaN and the like too."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def as_object(value: Json) -> dict[str, Json]:
    """A JSON value that must be an object; a ValueError where it is none."""
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def sync_folder(folder: pathlib.Path) -> None:
    """Let the names in a folder outlive a power cut, where its file system can do so."""
    number = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EROFS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(number)


def sync_tree(folder: pathlib.Path) -> None:
    """Sync every file and folder below a folder, and the folder itself."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            number = os.open(os.path.join(parent, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(number)
            finally:
                os.close(number)
        sync_folder(pathlib.Path(parent))


def make_folder(path: pathlib.Path) -> None:
    """Make a folder and those above it, and let their names outlive a power cut."""
    _require_locks()
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def discard(path: pathlib.Path) -> None:
    """Remove whatever is at a path as far as that goes, a folder or a file; of a link the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def remove_tree(path: pathlib.Path) -> None:
    """Remove a folder: hidden under a temporary name first, so never half of it is to be seen."""
    hidden = path.with_name(f".{path.name}{TEMPORARY}")
    if path != hidden and not path.name.endswith(TEMPORARY):
        discard(hidden)
        os.rename(path, hidden)
    discard(hidden if hidden.exists() else path)


def _require_locks() -> None:
    if fcntl is None:
        raise UserError("runs and data are written on Linux and macOS only: on Windows, use WSL")


def _flock(number: int, how: int) -> None:
    """Lock an open file; a file system without locks is taken as it is.

    Raises:
        Busy: it is locked, and ``how`` says not to wait.
    """
    try:
        fcntl.flock(number, how)
    except BlockingIOError as error:
        raise Busy from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


class Lock:
    """A lock on a folder, held from `take` to `release` or to the end of the process.

    The file ``.lock`` in the folder says who holds it; it stays, for deleting it would let two in.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, locked(pathlib.Path(folder)):
        ...     Lock(pathlib.Path(folder)).take(wait=False)
        Traceback (most recent call last):
        lstmjax.files.Busy
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._path = folder / LOCK
        self._file: IO[bytes] | None = None

    def take(self, wait: bool) -> None:
        """Take the lock; the folder is made if it is missing.

        Raises:
            Busy: another process has it, and ``wait`` is false.
            OSError: the folder cannot be written.
            UserError: this system has no such locks.
        """
        _require_locks()
        while self._file is None:
            self._path.parent.mkdir(exist_ok=True)
            number = _opened(self._path)
            file = os.fdopen(number, "r+b", buffering=0)
            try:
                _flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is_at(number, self._path):  # else who held it has removed the folder
                    self._file = file
            finally:
                if self._file is None:
                    file.close()
        with contextlib.suppress(OSError):  # who holds it is only told
            file.truncate()
            file.write(f"{os.getpid()}\n".encode())

    def holder(self) -> str:
        """``"process 123"``, or ``"another process"`` where that is not known."""
        with contextlib.suppress(OSError, ValueError):
            return f"process {int(read_bytes(self._path, 20))}"
        return "another process"

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold a folder's `Lock` inside the block, after waiting for it."""
    lock = Lock(folder)
    lock.take(wait=True)
    try:
        yield
    finally:
        lock.release()


def sweep(folder: pathlib.Path, *patterns: str) -> None:
    """Remove temporary files whose writers are gone: those that nobody has locked."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError, Busy), open(path, "r+b") as file:
                _flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
