"""Whose cores a measured process has, where the machines that it stands for are not there."""

import os
from contextlib import suppress
from pathlib import Path

FIRST, LAST = -20, 19


def prioritise_session(niceness: int) -> bool:
    """Give the session of this process, which must be its own, a place before or behind all others.

    The kernel may schedule by session first and by priority only within one (sched_autogroup), so both are set.

    Args:
        niceness: from -20, before all others, to 19, behind them.
    Returns:
        Whether the kernel allowed it. Less than 0 needs root.
    """
    allowed = False
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
        allowed = True
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(niceness))
    return allowed
