"""Apply a function to chunks on all cores, in order and with bounded memory.

Threads, not processes: reading, decoding and resizing release the interpreter lock, so two threads were as fast as two
processes (2.1 s against 3.1 s for 3,000 images), start at once and end with Ctrl-C.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK_SIZE = 64


def num_threads() -> int:
    """Return the number of threads for the cores of this process, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def chunks_of(items: Sequence[Item], size: int = CHUNK_SIZE) -> list[Sequence[Item]]:
    """Cut a sequence into pieces of `size`; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order, computed ahead on all cores.

    Args:
        function: must be safe to call from several threads.
        items: chunks of work, each worth about 10 ms or more.
    Yields:
        The results. At most four per thread are held at a time. An error in `function` is raised
        here, and nothing further is started.
    """
    workers = num_threads()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="relook-data") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                # The bound keeps decoded chunks from piling up in front of a slow consumer.
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
