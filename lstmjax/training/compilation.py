"""What a run compiles: kept on disk for the next run, and counted."""

import collections
import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from lstmjax.cache import cache_folder

MAX_BYTES = 2**28
"""What the folder of compiled programs may hold when a run starts; a run adds one or two MB."""


def keep_compiled() -> None:
    """Let JAX keep compiled programs on disk and take them from there; call it before the first.

    They lie in ``programs`` in `cache_folder`, each named by program, compiler options, versions
    and machine. Only their owner may write there, for they are executed. Whoever has set
    ``JAX_COMPILATION_CACHE_DIR``, or ``JAX_ENABLE_COMPILATION_CACHE=0``, has it that way instead.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    folder = cache_folder() / "programs"
    if _ready(folder):
        config.update("jax_compilation_cache_dir", str(folder))
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _ready(folder: pathlib.Path) -> bool:
    """Whether the folder can be used, made and tidied up; if not, a line on stderr says why."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        _drop_oldest(folder)
    except OSError as error:
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return False
    return True


def _drop_oldest(folder: pathlib.Path) -> None:
    """Delete what was written first until ``MAX_BYTES`` are left, and files left empty."""
    files = [(path, path.stat()) for path in folder.rglob("*") if path.is_file()]
    excess = sum(stat.st_size for _, stat in files) - MAX_BYTES
    for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns):
        if excess > 0 or stat.st_size == 0:  # empty: its writer was killed
            path.unlink(missing_ok=True)  # another process may have been faster
            excess -= stat.st_size


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
