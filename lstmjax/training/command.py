"""What the command line of every experiment shares."""

import argparse
import math
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, TypeVar

from lstmjax.errors import UserError
from lstmjax.training.compilation import keep_compiled
from lstmjax.training.devices import keep_freed_memory
from lstmjax.training.loop import Interrupted

ConfigT = TypeVar("ConfigT")


def run_command(
    recipes: Mapping[str, ConfigT], main: Callable[[ConfigT], Any], description: str
) -> None:
    """Parse the command line and run ``main(config)``.

    The flags are the fields of the config dataclass; ``--recipe`` chooses the config that gives
    their defaults. Compiled programs are kept for the next run. A `UserError` is printed as one
    line and exits with 2; a run stopped by a signal exits with 128 + its number, as shells expect.
    """
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=recipes, default="default")
    known = [a for a in sys.argv[1:] if a not in ("-h", "--help")]
    default = recipes[first.parse_known_args(known)[0].recipe]
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[type(default)],  # type: ignore[misc]
        default=default,
        description=description,
    )
    keep_compiled()
    keep_freed_memory()
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        main(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as stop:
        raise SystemExit(128 + stop.signal) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that what is half done is cleaned up on the way out."""
    raise SystemExit(128 + number)


def require_seed(seed: int) -> None:
    """Raise `UserError` unless every generator can take ``seed``."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must lie in [0, 2^32), got {seed}")


def require_positive(values: Mapping[str, int]) -> None:
    """Raise `UserError` for the first of the named settings that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def require_rate(learning_rate: float) -> None:
    """Raise `UserError` unless the learning rate is positive and finite."""
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise UserError(f"--learning-rate must be positive and finite, got {learning_rate}")


def require_share(values: Mapping[str, float]) -> None:
    """Raise `UserError` for the first of the named settings that is not in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1), got {value}")
