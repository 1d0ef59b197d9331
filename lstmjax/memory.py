"""What glibc does with memory that a program frees."""

import ctypes

_KEEP_ALL = {-4: 0, -1: -1}
"""Of malloc.h: M_MMAP_MAX none, M_TRIM_THRESHOLD never."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep what a program frees for the next one; returns whether it could be told.

    A step's temporaries are hundreds of megabytes in blocks that glibc would give back to the
    system, which then maps and clears them anew, page by page, at every step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return all(mallopt(option, value) for option, value in _KEEP_ALL.items())
