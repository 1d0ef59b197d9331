"""Beartype, but for functions inside functions.

Those are made anew at every call, and their checks with them: a quarter of the time of what traces.
"""

from collections.abc import Callable

from beartype import beartype


def outermost(checked: Callable | type) -> Callable | type:
    """What jaxtyping's import hook calls on each function and class of the library."""
    return checked if "<locals>" in checked.__qualname__ else beartype(checked)
