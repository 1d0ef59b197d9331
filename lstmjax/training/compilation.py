"""What a run compiles: kept on disk for the next run, and counted."""

import collections
import contextlib
import dataclasses
import glob
import hashlib
import pathlib
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import TextIO

import jax

from lstmjax import files
from lstmjax.cache import cache_folder, drop_oldest
from lstmjax.errors import UserError

SUMS = "sums.json"
_UNREADABLE = "Error reading persistent compilation cache entry for "
MAX_BYTES = 2**28
"""What the folder of compiled programs may hold when a run starts; a run adds one or two MB."""


@contextlib.contextmanager
def keep_compiled() -> Iterator[None]:
    """Let JAX keep compiled programs on disk and take them from there; enter it before the first.

    They lie in ``programs`` in `cache_folder`, each named by program, compiler options, versions
    and machine. Only their owner may write there, for they are executed; each must still have the
    checksum that it was seen with. Whoever has set ``JAX_COMPILATION_CACHE_DIR``, or
    ``JAX_ENABLE_COMPILATION_CACHE=0``, has it that way instead.
    """
    config = jax.config
    wanted = config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    if config.jax_compilation_cache_dir or not wanted:  # type: ignore[attr-defined]
        yield
        return
    folder = _folder()
    if folder is None:
        yield
        return
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with _damaged_are_deleted(folder):
        yield
    with contextlib.suppress(OSError):
        _check_sums(folder)


def _folder() -> pathlib.Path | None:
    """Where programs are kept, made and tidied up; if there is no place, stderr says why."""
    try:
        folder = cache_folder() / "programs"
        _make_ready(folder)
        return folder
    except (OSError, UserError) as error:
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return None


def _make_ready(folder: pathlib.Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    drop_oldest(folder, MAX_BYTES)
    _check_sums(folder)


def _check_sums(folder: pathlib.Path) -> None:
    """Delete programs that are not what they were when first seen; note those seen now."""
    try:
        seen = files.as_object(files.read_json(folder / SUMS))
    except (OSError, ValueError):
        seen = {}
    sums = {}
    for path in folder.iterdir():
        if not path.is_file() or path.name == SUMS or path.name.startswith("."):
            continue
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if seen.get(path.name, found) == found:
                sums[path.name] = found
            else:
                path.unlink(missing_ok=True)
    if sums != seen:
        files.publish_json(folder / SUMS, sums)


@contextlib.contextmanager
def _damaged_are_deleted(folder: pathlib.Path) -> Iterator[None]:
    """Delete each program that JAX warns of not being able to read, so that it is kept anew."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", _UNREADABLE)
        show = warnings.showwarning

        def delete_or_show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            found = re.match(_UNREADABLE + "'(.*?)'", str(message))
            if not found:
                show(message, category, filename, lineno, file, line)
                return
            for path in folder.glob(f"{glob.escape(found[1])}-*"):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            print(f"a damaged program was deleted and is compiled anew: {found[1]}")

        warnings.showwarning = delete_or_show
        yield


@dataclasses.dataclass
class Compilations:
    """Programs that JAX has made ready.

    Attributes:
        programs: how many, by name: ``"jit(update)"``.
        kept: how many of them were found on disk instead of compiled.
    """

    programs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    kept: int = 0

    def __str__(self) -> str:
        return f"{self.programs.total() - self.kept} programs compiled, {self.kept} found on disk"


@contextlib.contextmanager
def counting_compilations() -> Iterator[Compilations]:
    """Count the programs made ready in the block.

    >>> @jax.jit
    ... def double(x):
    ...     return 2 * x
    >>> with counting_compilations() as made:
    ...     _ = double(1.0), double(2.0), double(jnp.ones(3))
    >>> made.programs["jit(double)"]
    2
    """
    made = Compilations()

    def on_duration(event: str, duration_secs: float, **details: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            made.programs[str(details.get("fun_name"))] += 1

    def on_event(event: str, **details: str | int) -> None:
        made.kept += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield made
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)
