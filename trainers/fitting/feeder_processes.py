"""Feeder processes: torch's `DataLoader` prepares batches in processes of their own and returns them in order.

In: a share of a batch, which says all that its content depends on. Out: its pixels, through shared memory. So any
number of processes gives the same batches to the bit. The processes are forked: what is mapped stays shared, and the
rest of the pixel cache is mapped by each process when it needs it. They live for all epochs of a run.
"""

import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from records.arrays import UInt8Array

SHARED_MEMORY = "/dev/shm"
ENLARGE = (
    "enlarge it (docker run --shm-size=2g; in Kubernetes an emptyDir with medium: Memory at /dev/shm), "
    "or set trainers.workers.feeders=0"
)
_SPARE_BATCHES = 2
"""Batches in shared memory beyond those that wait: one that a process writes and one that the loop reads."""

Prepare = Callable[[Any], UInt8Array]


class FeedersLostError(Exception):
    """Raised when feeder processes cannot go on; the message is the sentence for the user, without what follows."""


class FeederProcesses:
    """Processes that prepare shares.

    Args:
        prepare: share -> pixels; runs in the processes.
        count: of processes, 1 or more.
        prefetch_batches: batches that are prepared ahead, by all processes together.
    """

    def __init__(self, prepare: Prepare, count: int, prefetch_batches: int) -> None:
        self._shares: list[Any] = []
        self._per_process = math.ceil(prefetch_batches / count)
        self._count = count
        self._processes: list[BaseProcess] = []
        with _quiet():
            self._loader: DataLoader[Tensor] = DataLoader(
                _Shares(prepare),
                batch_size=None,
                sampler=self._shares,
                num_workers=count,
                prefetch_factor=self._per_process,
                persistent_workers=True,
                multiprocessing_context="fork",
                worker_init_fn=_ignore_interrupts,
                # Without one, every epoch would draw from torch's global generator, on which dropout depends.
                generator=torch.Generator(),
            )

    def needed_bytes(self, batch_bytes: int) -> int:
        """Return how much shared memory the batches of this size take that are there at a time."""
        return (self._per_process * self._count + _SPARE_BATCHES) * batch_bytes

    def pixels(self, shares: Sequence[Any]) -> Iterator[UInt8Array]:
        """Yield the pixels of shares in order.

        Raises FeedersLostError: a process died, or shared memory is full.
        """
        self._shares[:] = shares
        try:
            with _quiet():
                before = multiprocessing.active_children()
                batches = iter(self._loader)
            if not self._processes:
                self._processes = [child for child in multiprocessing.active_children() if child not in before]
            for batch in batches:
                yield batch.numpy()
        except (RuntimeError, OSError) as error:
            reason = self._reason(error)
            if reason is None:
                raise
            raise FeedersLostError(reason) from error

    def close(self) -> None:
        """End the processes."""
        # The finalizer of the loader's iterator asks them to end. An exception on its way up still refers to it.
        del self._loader
        for process in self._processes:
            process.terminate()
            process.join()

    def _reason(self, error: Exception) -> str | None:
        """Return why processes cannot go on; None if one of them raised an error of its own."""
        if "shared memory" in str(error) or "</torch_" in str(error):
            return f"the feeder processes found no room in shared memory ({SHARED_MEMORY}); {ENLARGE}"
        died = [process for process in self._processes if not process.is_alive()]
        if not died:
            return None
        process = died[0]
        ended = f"feeder process {process.pid} of trainers.workers.feeders={self._count}"
        if process.exitcode is None or process.exitcode >= 0:
            return f"{ended} ended with exit code {process.exitcode}"
        name = signal.Signals(-process.exitcode).name
        if name == "SIGBUS":
            return f"{ended} died of {name}: shared memory ({SHARED_MEMORY}) is full; {ENLARGE}"
        hint = "; the system does that when memory runs out, and fewer feeders need less" if name == "SIGKILL" else ""
        return f"{ended} was ended by {name}{hint}"


def lacking_memory(needed_bytes: int, folder: str = SHARED_MEMORY) -> str | None:
    """Return a sentence if shared memory has no room for so many bytes, else None."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return f"feeder processes need shared memory, and {folder} is not there; set trainers.workers.feeders=0"
    free = found.f_bavail * found.f_frsize
    if needed_bytes <= free:
        return None
    return (
        f"feeder processes need {math.ceil(needed_bytes / 1e6)} MB of shared memory and {folder} has "
        f"{int(free / 1e6)} MB free; {ENLARGE}"
    )


class _Shares(Dataset[Tensor]):
    """Prepares the share that it is asked for."""

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare

    def __getitem__(self, share: Any) -> Tensor:
        # Shared here and not by the queue's thread, which would drop a batch that finds no room and leave the loop
        # waiting for it.
        pixels: Tensor = torch.from_numpy(self._prepare(share))
        return pixels.share_memory_()  # type: ignore[no-untyped-call,no-any-return]


def _ignore_interrupts(_: int) -> None:
    # Ctrl-C reaches all processes of a terminal; the training process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from warning that there are more processes than cores: the setting says how many."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield
