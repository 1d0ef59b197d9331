"""Errors that a person can put right: one clear line, with the line of their own program."""

import contextlib
import errno
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator

__all__ = [
    "ContractError",
    "MissingExtraError",
    "PeerError",
    "StorageError",
    "UserError",
]

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(k) + os.sep for k in ("stdlib", "purelib", "platlib")})
DISK_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ESTALE)
"""What is no mistake in a path: it is full, broken or gone."""


class UserError(Exception):
    """A mistake that the person at the keyboard can put right.

    The message is one line: what is wrong, with the value in it, and what to do about it.
    The commands print it as ``error: <message>`` and exit with `status`.
    """

    status = 2


class ContractError(UserError, TypeError, ValueError):
    """A cell, or what a recurrence is called with, does not fit the contract."""


class StorageError(UserError):
    """A disk or a file system that fails: full, broken, not to be written. EX_IOERR."""

    status = 74


class PeerError(UserError):
    """Another process of this run, or its device, is gone: start all again. EX_TEMPFAIL."""

    status = 75


class MissingExtraError(UserError, ImportError):
    """A package is not installed that only some of the library needs."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Import in this block what ``pip install 'lstmjax[name]'`` installs.

    Raises:
        MissingExtraError: it is not installed.

    Example:
        >>> with extra("interop"):
        ...     import nonesuch
        Traceback (most recent call last):
        lstmjax.errors.MissingExtraError: nonesuch is missing: pip install 'lstmjax[interop]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise MissingExtraError(f"{package} is missing: pip install 'lstmjax[{name}]'") from error


def first_line(error: BaseException) -> str:
    """What another library's exception says, as far as it fits a line of ours."""
    return (str(error) or type(error).__name__).splitlines()[0]


def user_line(raised: object) -> str:
    """Where in a user's program an error or an operation came from, as `` (my_cell.py:12)``.

    Args:
        raised: an exception, or an equation of a jaxpr.

    Returns:
        The innermost line that belongs neither to this package nor to an installed one; "" where
        there is none.
    """
    lines = list(_lines(raised))
    own = [(file, line) for file, line in lines if not installed(file)]
    return f" ({os.path.basename(own[0][0])}:{own[0][1]})" if own else ""


def _lines(raised: object) -> Iterable[tuple[str, int]]:
    """Files and lines, the innermost first."""
    if isinstance(raised, BaseException):
        found, entry = [], raised.__traceback__
        while entry is not None:
            found.append((entry.tb_frame.f_code.co_filename, entry.tb_lineno))
            entry = entry.tb_next
        return found[::-1]
    traceback = getattr(getattr(raised, "source_info", None), "traceback", None)
    frames = getattr(traceback, "frames", None) or ()  # what JAX keeps is not for the public
    return [(frame.file_name, frame.line_num) for frame in frames]


def installed(file: str) -> bool:
    """Whether a file belongs to this package, to an installed one, or is none."""
    return file.startswith((_PACKAGE, *_LIBRARIES, "<"))


def reason(error: BaseException) -> str:
    """The operating system's own words, where an exception has them; else its first line.

    >>> reason(OSError(28, "No space left on device"))
    'No space left on device'
    >>> reason(ValueError("DATA_LOSS: Failed to write 9 bytes [os_error_code='28']"))
    'No space left on device'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = os_error(error)
    return os.strerror(number) if number else f"{type(error).__name__}: {first_line(error)}"[:300]


def os_error(error: BaseException) -> int | None:
    """The number of the operating system's error behind an exception, TensorStore's too."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def printable(text: str) -> str:
    r"""The text on one line, whatever would move a cursor or turn a direction escaped.

    >>> print(printable("red \x1b[31m"))
    red \x1b[31m
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def drawable(text: str) -> str:
    r"""`printable`, of letters that Matplotlib's own font has: Latin, Greek and Cyrillic ones.

    >>> print(drawable("gut ж \u597d"))
    gut ж \u597d
    """
    return "".join(
        c if c < "\u0530" else c.encode("ascii", "backslashreplace").decode()
        for c in printable(text)
    )
