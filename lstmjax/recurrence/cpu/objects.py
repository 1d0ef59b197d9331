"""Machine code kept on disk: what was compiled once is read in milliseconds."""

import contextlib
import hashlib
import os
import pathlib

import jax

from lstmjax.cache import cache_folder, drop_oldest
from lstmjax.errors import UserError
from lstmjax.files import publish, read_bytes

MAX_BYTES = 2**26
"""What the folder may hold; a kernel has some 50 KB."""

_MAX_OBJECT = 2**24
_DIGEST = hashlib.sha256().digest_size


def object_path(name: str) -> pathlib.Path | None:
    """Where an object file is kept, or will be; None where there is no safe place.

    What is read there is executed: so nobody but the user may own the folder or write to it, and
    each file says what its checksum is. Nor is there one if JAX' own cache is off
    (``JAX_ENABLE_COMPILATION_CACHE=0``).

    Args:
        name: says all that the object depends on.
    """
    folder = _folder()
    return None if folder is None else folder / f"{name}.o"


def read_object(path: pathlib.Path) -> bytes | None:
    """The object kept there, if it is there, and whole."""
    with contextlib.suppress(OSError, ValueError):
        found = read_bytes(path, _MAX_OBJECT)
        digest, code = found[:_DIGEST], found[_DIGEST:]
        if hashlib.sha256(code).digest() == digest:
            return code
    return None


def keep_object(path: pathlib.Path, code: bytes) -> None:
    """Put an object there; if that cannot be, it is made again next time."""
    with contextlib.suppress(OSError):
        publish(path, hashlib.sha256(code).digest() + code)
        drop_oldest(path.parent, MAX_BYTES)


def _folder() -> pathlib.Path | None:
    """Where objects are kept, made if it is not there; None where there is no safe place."""
    if not jax.config.jax_enable_compilation_cache or not hasattr(os, "getuid"):  # type: ignore[attr-defined]
        return None
    try:
        folder = cache_folder() / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, UserError):
        return None
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        return None
    return folder
