"""A lease that is held for as long as a block runs: one round, one sync at a time, across machines."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

import psutil

from records.errors import RefusedError, UnavailableError
from records.ids import new_id
from records.ledger import Ledger
from records.types import Lease

LEASE_S = 30.0


@contextmanager
def hold(ledger: Ledger, name: str, *, wait_s: float = 0.0) -> Generator[str]:
    """Hold a right while the block runs; a thread prolongs it, and a killed holder loses it by itself.

    Args:
        ledger: that keeps the lease.
        name: of the right.
        wait_s: how long to wait for another holder, seconds; `LEASE_S` outlasts one that was killed. One that
            was killed on this machine is not waited for.
    Yields:
        The name of the holder.
    Raises:
        RefusedError: somebody else still holds it, or took it while the block ran because this process
            or the ledger stood still for longer than `LEASE_S`.
    """
    holder = f"{_here()}:{os.getpid()}:{new_id()[-8:]}"
    deadline = time.monotonic() + wait_s
    _release_dead(ledger, name)
    while not ledger.lease(name, holder, LEASE_S):
        if time.monotonic() > deadline:
            raise RefusedError(
                f"another process holds the {name} lease; wait for it to end, or {LEASE_S:.0f} s if it was killed"
            )
        time.sleep(0.5)
    stop, lost = threading.Event(), threading.Event()

    def prolong() -> None:
        while not stop.wait(LEASE_S / 3):
            try:
                if not ledger.lease(name, holder, LEASE_S):
                    lost.set()
                    return
            except UnavailableError:
                continue  # a ledger that is away for a moment; the lease outlasts two more tries

    thread = threading.Thread(target=prolong, name=f"lease-{name}", daemon=True)
    thread.start()
    try:
        yield holder
    finally:
        stop.set()
        thread.join()
        ledger.release(name, holder)
    if lost.is_set():
        raise RefusedError(f"the {name} lease was lost to another process meanwhile; run this again")


def _here() -> str:
    """Name the place that process ids belong to: containers may share a host's name and not its processes."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{namespace}"


def _release_dead(ledger: Ledger, name: str) -> None:
    """Give back a lease whose holder was a process of this machine that is gone; elsewhere it runs out by itself."""
    with ledger.read() as tx:
        current = tx.get(Lease, name)
    place, _, process = (current.holder if current else "").rpartition(":")[0].rpartition(":")
    if current and place == _here() and process.isdigit() and not psutil.pid_exists(int(process)):
        ledger.release(name, current.holder)
