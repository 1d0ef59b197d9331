"""Sums of what a run folder holds of the model: a bit that has changed there is noticed.

``sums.json`` has of each such file the SHA-256 of what was written last, and of what that replaced.
It is published before the file is: whichever of the two a crash leaves, its sum is known.
"""

import contextlib
import hashlib
import pathlib
from collections.abc import Iterable, Iterator

from lstmjax import files
from lstmjax.errors import StorageError, UserError, first_line, reason

SUMS = "sums.json"
MAX_BYTES = 2**34
"""Of a file."""


def publish(path: pathlib.Path, content: bytes) -> None:
    """Publish a file, and before it its sum.

    Raises:
        OSError: they cannot be written.
    """
    known: dict[str, list[str]] = {}
    with contextlib.suppress(UserError):  # damaged, it is written anew
        known = _sums_in(path.parent)
    before, now = _sum_of(path), hashlib.sha256(content).hexdigest()
    sound = before is not None and before in known.get(path.name, [before])
    sums = dict.fromkeys([before, now] if sound else [now])
    files.publish_json(path.parent / SUMS, {**known, path.name: [*sums]})
    files.publish(path, content)


@contextlib.contextmanager
def checked(folder: pathlib.Path, names: Iterable[str]) -> Iterator[None]:
    """Read in this block files that were published with their sums.

    An error of the block's own is told as well: it may say what is different. A file without a sum,
    of a run that kept none, is not checked.

    Raises:
        UserError: a file is not as it was written.
        StorageError: the sums cannot be read.
    """
    found = {name: _sum_of(folder / name) for name in names}
    known = _sums_in(folder)  # after: a run that is at it may have written a file in between
    changed = [name for name, now in found.items() if now and now not in known.get(name, [now])]
    told = "; ".join(
        f"{folder / name} is damaged or was changed: its SHA-256 is {found[name]:.12}..., not "
        f"{' or '.join(f'{one:.12}...' for one in known[name])}"
        for name in changed
    )
    try:
        yield
    except UserError as error:
        if changed:
            raise UserError(f"{told}. {error}") from error
        raise
    if changed:
        raise UserError(
            f"{told}; put a copy of it back, or train again, or, if the change is meant, delete "
            f"{folder / SUMS}"
        )


def _sums_in(folder: pathlib.Path) -> dict[str, list[str]]:
    """The sums of a folder by file; none where it is of a run that kept none."""
    path = folder / SUMS
    try:
        found = files.as_object(files.read_json(path))
        return {name: _texts(sums) for name, sums in found.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise StorageError(f"cannot read {path}: {reason(error)}") from error
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {first_line(error)[:200]}; put a copy of it back, or delete it, "
            "and nothing of the model is checked"
        ) from error


def _texts(value: files.Json) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("no list of sums")
    return value


def _sum_of(path: pathlib.Path) -> str | None:
    """SHA-256 of a file, None if it cannot be read: whoever reads it says so."""
    with contextlib.suppress(OSError, ValueError):
        return hashlib.sha256(files.read_bytes(path, MAX_BYTES)).hexdigest()
    return None
