"""What the command line of every experiment shares."""

import argparse
import contextlib
import io
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar, runtime_checkable

import jax

from lstmjax import stopping
from lstmjax.errors import PeerError, StorageError, UserError, extra, first_line, printable, reason
from lstmjax.memory import keep_freed_memory
from lstmjax.training.compilation import keep_compiled
from lstmjax.training.loop import Interrupted

ConfigT = TypeVar("ConfigT")


def run_command(
    recipes: Mapping[str, ConfigT] | Callable[[str], ConfigT],
    main: Callable[[ConfigT], object],
    description: str,
    *,
    chooser: str = "recipe",
    default: str = "default",
) -> None:
    """Parse the command line and run ``main(config)``.

    The flags are the fields of the config dataclass; one of them, ``--recipe``, chooses the config
    that gives their defaults. Compiled programs are kept for the next run. An error is printed as
    one line; docs/reliability.md lists the exit codes. Output that cannot be written stops nothing.

    Args:
        recipes: the configs by name, or what makes one of a name.
        main: the program.
        description: what ``--help`` says before the flags.
        chooser: the field whose flag chooses.
        default: the name that it has where the flag is not given.
    """
    _keep_output()
    _widen_terminal()
    jax.config.update("jax_enable_x64", False)  # float32 is the default, whatever JAX was told
    keep_freed_memory()
    try:
        config = _parse(recipes, description, chooser, default)
        with keep_compiled():
            main(config)
    except Interrupted as stop:
        stopping.leave(128 + stop.signal)
    except Exception as error:
        problem = as_user_error(error)
        if problem is None:
            raise
        print(f"error: {printable(str(problem))}", file=sys.stderr)
        stopping.leave(problem.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        stopping.leave(128 + signal.SIGINT)


def _parse(
    recipes: Mapping[str, ConfigT] | Callable[[str], ConfigT],
    description: str,
    chooser: str,
    default: str,
) -> ConfigT:
    with extra("train"):
        import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choices = recipes if isinstance(recipes, Mapping) else None
    first.add_argument(f"--{chooser}", choices=choices, default=default)
    known = [a for a in sys.argv[1:] if a not in ("-h", "--help")]
    name = vars(first.parse_known_args(known)[0])[chooser]
    chosen = recipes[name] if isinstance(recipes, Mapping) else recipes(name)
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[type(chosen)],  # type: ignore[misc]
        default=chosen,
        description=description,
    )


def as_user_error(error: Exception) -> UserError | None:
    """What an exception means to the person at the keyboard; None: it is a fault of the program."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, UnicodeEncodeError):
        return UserError(
            f"the locale cannot express {error.object!r}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return StorageError(
            f"{where}{reason(error)}; mend that, then go on: the same command with --resume"
        )
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return UserError(
            f"out of memory ({first_line(error)[:200]}): lower --batch-size first, then "
            "--max-length or --hidden-size"
        )
    if isinstance(error, jax.errors.JaxRuntimeError) and any(w in str(error) for w in _LOST):
        return PeerError(
            f"another process of this run is gone ({first_line(error)[:200]}): start all of them "
            "again with --resume"
        )
    return None


_LOST = ("Connection closed", "Connection reset", "UNAVAILABLE", "Gloo", "heartbeat", "ABORTED")


@runtime_checkable
class _Stream(Protocol):
    """What is asked of a stream: Python's own, or what has taken its place."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> None: ...


class _Unbreakable:
    """A stream that swallows what cannot be written: a full disk, a reader that is gone."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _keep_output() -> None:
    """Let output fail without an exception, and no file take the place of a closed stream."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
        setattr(sys, name, _Unbreakable(stream))


def _widen_terminal(least: int = 40) -> None:
    """In fewer columns the help takes gigabytes to lay out."""
    if shutil.get_terminal_size().columns < least:
        os.environ["COLUMNS"] = str(least)


def require_seed(seed: int) -> None:
    """Raise `UserError` unless every generator can take ``seed``."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must lie in [0, 2^32), got {seed}")


def require_positive(values: Mapping[str, int], most: int = 2**31 - 1) -> None:
    """Raise `UserError` for the first of the named settings that is below 1, or beyond ``most``."""
    for name, value in values.items():
        if not 1 <= value <= most:
            told = "at least 1" if value < 1 else f"at most {most:,}"
            raise UserError(f"--{name.replace('_', '-')} must be {told}, got {value}")


def require_layers(number: int) -> None:
    """Raise `UserError` for a number of layers that is none, or takes minutes to build."""
    require_positive({"num_layers": number}, most=1_000)


def require_rate(learning_rate: float) -> None:
    """Raise `UserError` unless the learning rate is positive and finite."""
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise UserError(f"--learning-rate must be positive and finite, got {learning_rate}")


def require_share(values: Mapping[str, float]) -> None:
    """Raise `UserError` for the first of the named settings that is not in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1), got {value}")
