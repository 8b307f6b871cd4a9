"""Plans: how a machine's cores are divided among workers, threads and feeders; and a neighbour that wants them, too."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from trainers.settings import TrainersSettings

NEIGHBOUR_NICENESS = 5
Plan = dict[str, int]
"""Values of `trainers.workers` by name."""


def plans(settings: TrainersSettings, cores: int) -> dict[str, Plan]:
    """Return the plans to compare, by what a table calls them.

    Args:
        settings: batch and accumulation, which two workers have to be able to share.
        cores: of this machine.
    Returns:
        The default first, then as many threads with a feeder process, one thread fewer, and two workers.
    """
    found: dict[str, Plan] = {
        f"1 worker of {cores} threads": {"count": 1, "threads": cores, "feeders": 0},
        f"1 worker of {cores} threads, 1 feeder": {"count": 1, "threads": cores, "feeders": 1},
    }
    if cores > 1:
        fewer = cores - 1
        found[f"1 worker of {fewer} threads"] = {"count": 1, "threads": fewer, "feeders": 0}
    if two_share(settings, cores):
        found[f"2 workers of {cores // 2} threads"] = {"count": 2, "threads": cores // 2, "feeders": 0}
    return found


def two_share(settings: TrainersSettings, cores: int) -> bool:
    """Return whether two workers have a core each and can share every batch evenly."""
    return cores > 1 and settings.images_per_step % (2 * settings.optimizer.accumulate_steps) == 0


@contextmanager
def busy_neighbour(cores: int) -> Iterator[None]:
    """Keep every core busy at a lower priority inside the block."""
    processes = [
        subprocess.Popen([sys.executable, "-c", f"import os; os.nice({NEIGHBOUR_NICENESS})\nwhile True: pass"])
        for _ in range(cores)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
