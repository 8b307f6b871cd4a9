"""How explanations leave the cores to predictions where both share them.

Explanations can wait, predictions cannot. A low priority is not enough: each time slice of an explanation lets a
prediction that wakes up meanwhile wait, and one of its threads that waits holds up the others at every operator.
"""

import contextlib
import os

NICENESS = 19


def let_others_first() -> None:
    """Give the calling thread, and the threads that it starts, only the time in which a core would idle."""
    # Both are of the thread alone: the event loop has to respond to health checks at any load.
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
