"""What glibc does with memory that a program frees."""

import ctypes
import os

_MMAP_MAX, _TOP_PAD, _TRIM_THRESHOLD = -4, -2, -1
"""Options of malloc.h."""

_HEAPS = 2**27
"""Bytes that glibc wants at hand: more than there are in a heap of the threads, so that it unmaps
none of these, which else go back whole, whatever the threshold."""

_KEPT: list[bool] = []
"""Something is in it once all is kept."""


def keep_freed_memory(most: int | None = None) -> bool:
    """Tell glibc to keep what a program frees for the next one; returns whether it could be told.

    A step's temporaries are hundreds of megabytes in blocks that glibc would give back to the
    system, which then maps and clears them anew, page by page, at every step.

    Args:
        most: bytes to keep at the end of the heap; None keeps all, for good. Whoever has
            said how in the environment (``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``), has it
            that way instead.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    if most is None:
        _KEPT.append(True)
    elif _KEPT:
        return True
    elif {"MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return False
    threshold = -1 if most is None else most
    options = {_MMAP_MAX: 0, _TOP_PAD: _HEAPS, _TRIM_THRESHOLD: threshold}
    return all(mallopt(option, value) for option, value in options.items())
