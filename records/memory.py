"""Memory that was freed: whether glibc, the C library of most Linux systems, keeps it or gives it back to the kernel.

What went back has to be mapped and zeroed by the kernel page by page when it is needed again. A network allocates and
frees the same tensors in every step, so that this took an eighth of a prediction's CPU time and a third of a training
step's. Elsewhere it is right to give memory back, because other processes can use it.
"""

import ctypes
import functools
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8
_BLOCK_BYTES = 32 << 20
"""The largest block that glibc can be told to keep; what is larger goes back unless no block may."""
_GROWTH_BYTES = 64 << 20


def keep_freed_memory(*, of_any_size: bool = False) -> None:
    """Let this process keep what it frees for its next allocation; nothing happens without glibc.

    Args:
        of_any_size: keep blocks over 32 MB, too. Training frees and allocates such blocks in every step. A service also
            decodes images that are larger than any other, and that memory should go back.
    """
    library = _glibc()
    if library is None:
        return
    # Without a limit on arenas, each thread that allocates holds memory of its own.
    library.mallopt(_ARENA_MAX, 1)
    library.mallopt(_TRIM_THRESHOLD, -1)
    library.mallopt(_TOP_PAD, _GROWTH_BYTES)
    if of_any_size:
        library.mallopt(_MMAP_MAX, 0)
    else:
        library.mallopt(_MMAP_THRESHOLD, _BLOCK_BYTES)


def return_freed_memory() -> None:
    """Give memory that was freed back to the kernel; it takes milliseconds, and nothing happens without glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):
        return None
