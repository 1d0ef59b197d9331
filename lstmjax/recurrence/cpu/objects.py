"""Machine code kept on disk: what was compiled once is read in milliseconds."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable

import jax

from lstmjax.cache import cache_folder, drop_oldest
from lstmjax.errors import UserError
from lstmjax.files import publish, read_bytes

MAX_BYTES = 2**26
"""What the folder may hold; a kernel has some 50 KB."""

_MAX_OBJECT = 2**24
_DIGEST = hashlib.sha256().digest_size


def kept_object(name: str, make: Callable[[], bytes]) -> bytes:
    """An object file: from ``kernels`` in `lstmjax.cache.cache_folder`, else made and put there.

    What is read there is executed: so nobody but the user may own the folder or write to it, and
    each file says what its checksum is. Where that is not so, or the folder cannot be used, or
    JAX' own cache is off (``JAX_ENABLE_COMPILATION_CACHE=0``), the object is made.

    Args:
        name: says all that the object depends on.
        make: makes it.
    """
    folder = _folder()
    if folder is None:
        return make()
    path = folder / f"{name}.o"
    with contextlib.suppress(OSError, ValueError):
        found = read_bytes(path, _MAX_OBJECT)
        digest, code = found[:_DIGEST], found[_DIGEST:]
        if hashlib.sha256(code).digest() == digest:
            return code
    code = make()
    with contextlib.suppress(OSError):
        publish(path, hashlib.sha256(code).digest() + code)
        drop_oldest(folder, MAX_BYTES)
    return code


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
