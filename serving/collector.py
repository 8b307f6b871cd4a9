"""Memory of a process that serves requests: what full collections look at, and what the C library keeps.

The libraries of a replica make 400,000 objects that live as long as it does. A full collection looks at each of them,
which stops every thread for 200 ms, and the more objects requests leave behind, the more often it happens.

What is freed stays with the process: glibc keeps it for the next request of the thread that freed it. A slow heat map
leaves 50 to 100 MB behind in each thread that computes one.
"""

import ctypes
import functools
import gc
from collections.abc import Callable


def freeze_what_stays() -> None:
    """Leave all objects of now out of later collections; call it once, before anything that is replaced is loaded."""
    # Objects in a cycle would never be freed if they were frozen, so garbage has to go first, and models come later.
    gc.collect()
    gc.freeze()


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
