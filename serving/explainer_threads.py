"""How explanations leave the cores to predictions where both share them.

Explanations can wait, predictions cannot. A low priority is not enough for methods that compute for seconds: each of
their time slices lets a prediction that wakes up meanwhile wait, and one of its threads that waits holds up the others
at every operator. Grad-CAM is one evaluation of the network, which a person at the page waits for; it has the low
priority only, so that it is not put off for as long as the cores are busy.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

from vision.explanations.methods import METHODS

NICENESS, LOWEST = 10, 19


class ExplainerThreads:
    """The threads of one explainer.

    Args:
        most: explanations that compute at the same time.
    """

    def __init__(self, most: int) -> None:
        self._short = ThreadPoolExecutor(most, "explain", initializer=low_priority)
        self._long = ThreadPoolExecutor(most, "explain-long", initializer=idle_cores_only)

    def of(self, method: str) -> ThreadPoolExecutor:
        """Return the threads that compute a method."""
        return self._long if METHODS[method].evaluations > 1 else self._short


def low_priority() -> None:
    """Give the calling thread, and the threads that it starts, a low priority."""
    # Of the thread alone: the event loop has to respond to health checks at any load.
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


def idle_cores_only() -> None:
    """Give the calling thread, and the threads that it starts, only the time in which a core would idle."""
    os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
