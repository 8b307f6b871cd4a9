"""Saying that a distributed fit waits: Ray Train waits in silence for a node that was lost to be replaced."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

LOOK_EVERY_S = 20.0
Resources = Mapping[str, float]

logger = logging.getLogger(__name__)


@contextmanager
def told_of_scarcity(
    needed: Resources, available: Callable[[], Resources], *, every_s: float = LOOK_EVERY_S
) -> Iterator[None]:
    """Warn, while the block runs, once each time that the cluster gets too small for it, and say when it goes on.

    Args:
        needed: CPUs and GPUs of all workers together, by Ray's names.
        available: asks the cluster what it has, taken or not.
        every_s: time between two looks, seconds.
    Yields:
        Nothing.
    """
    over = threading.Event()

    def look() -> None:
        waits = False
        while not over.wait(every_s):
            has = available()
            missing = [f"{need:g} {name}s and Ray has {has.get(name, 0):g}" for name, need in needed.items()
                       if has.get(name, 0) < need]  # fmt: skip
            if missing and not waits:
                logger.warning(
                    "the fit waits: it needs %s, so a node was lost; it goes on from its checkpoint once another is "
                    "there, or stop it and run it again with --resume and fewer workers", ", ".join(missing),
                )  # fmt: skip
            elif waits and not missing:
                logger.warning("the fit goes on: Ray has what it needs again")
            waits = bool(missing)

    watcher = threading.Thread(target=look, name="scarcity", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(timeout=5.0)
