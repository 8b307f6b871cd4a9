"""Memory that the C library keeps: glibc holds what a thread freed for the next allocation of that thread."""

import ctypes
import functools
from collections.abc import Callable


def return_freed_memory() -> None:
    """Give memory that was freed back to the kernel; it takes milliseconds, and nothing where the C library cannot."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
