"""Where everything is kept that can be made again."""

import os
from pathlib import Path

from lstmjax.errors import UserError


def cache_folder() -> Path:
    """``LSTMJAX_CACHE_DIR``, else ``$XDG_CACHE_HOME/lstmjax``, else ``~/.cache/lstmjax``.

    Raises:
        UserError: there is no such home folder.
    """
    folder = os.environ.get("LSTMJAX_CACHE_DIR")  # empty counts as not set, as for XDG's
    return home(folder or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lstmjax"))


def home(folder: str | os.PathLike[str]) -> Path:
    """The path with ``~`` and ``~user`` replaced.

    Raises:
        UserError: there is no such home folder.
    """
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise UserError(f"{os.fspath(folder)!r} has no home folder: give the whole path") from error


def drop_oldest(folder: Path, most: int) -> None:
    """Delete what was written first until ``most`` bytes are left, and files left empty."""
    found = [(path, path.stat()) for path in folder.rglob("*") if path.is_file()]
    excess = sum(stat.st_size for _, stat in found) - most
    for path, stat in sorted(found, key=lambda file: file[1].st_mtime_ns):
        if excess > 0 or stat.st_size == 0:  # empty: its writer was killed
            path.unlink(missing_ok=True)  # another process may have been faster
            excess -= stat.st_size
