"""Annotators as threads: they open tasks, look for a while and annotate, for as long as a measurement lasts."""

import itertools
import threading
import time
import uuid
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from labeling.tasks import annotation_result

LOOK_S = 10.0
"""Assumed time that a person needs for one image, seconds."""
_TIMEOUT_S = 300.0


def work(
    client: LabelStudioClient,
    tasks: Iterable[int],
    label: str,
    look_s: float = 0.0,
    stop: threading.Event | None = None,
) -> list[float]:
    """Open and annotate tasks one after another.

    Args:
        client: connected.
        tasks: ids.
        label: what is chosen in each.
        look_s: pause between opening and annotating a task, seconds.
        stop: ends the work once it is set.
    Returns:
        The seconds that Label Studio took for each task.
    """
    stop, took_s = stop or threading.Event(), list[float]()
    for task in tasks:
        began = time.perf_counter()
        client.request("GET", f"api/tasks/{task}/", "open a task")
        opened = time.perf_counter()
        if stop.wait(look_s):
            break
        looked = time.perf_counter()
        client.create_annotation(task, annotation_result(label), key=uuid.uuid4())
        took_s.append(time.perf_counter() - looked + opened - began)
    return took_s


@contextmanager
def arriving(server: ServerInfo, annotators: int, tasks: Sequence[int], label: str) -> Generator[list[float]]:
    """Let annotators work while the block runs, each on tasks of their own, again and again.

    Args:
        server: where they work.
        annotators: how many; each looks at an image for `LOOK_S`.
        tasks: ids, at least one for each annotator.
        label: what they choose.
    Yields:
        A list that holds the seconds of each annotation after the block.
    """
    stop, took_s = threading.Event(), list[float]()

    def annotator(number: int) -> list[float]:
        # People do not begin at the same moment.
        stop.wait(LOOK_S * number / annotators)
        mine = itertools.takewhile(lambda _: not stop.is_set(), itertools.cycle(tasks[number::annotators]))
        return work(client, mine, label, LOOK_S, stop)

    with (
        LabelStudioClient(server.url, server.token, timeout_s=_TIMEOUT_S) as client,
        ThreadPoolExecutor(max(annotators, 1)) as pool,
    ):
        working = [pool.submit(annotator, number) for number in range(annotators)]
        try:
            yield took_s
        finally:
            stop.set()
        for one in working:
            took_s.extend(one.result())
