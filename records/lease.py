"""Leases: named locks in the ledger, held while a block runs; one round or one sync at a time, on any machine."""

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
"""How long a lease holds without being renewed, seconds."""


@contextmanager
def hold(ledger: Ledger, name: str, *, wait_s: float = 0.0) -> Generator[str]:
    """Hold a lease while the block runs; a thread renews it, and the lease of a killed holder expires.

    Args:
        ledger: keeps the lease, so it holds for all machines that share the ledger.
        name: what is locked, for example `round`.
        wait_s: how long to wait for another holder, seconds; more than `LEASE_S` outlasts one that was killed. A holder
            that was killed on this machine is not waited for.
    Yields:
        The name of the holder.
    Raises:
        RefusedError: another process still holds it, or took it while the block ran because this process
            or the ledger was stopped for longer than `LEASE_S`.
    """
    holder = f"{_here()}:{os.getpid()}:{new_id()[-8:]}"
    deadline = time.monotonic() + wait_s  # the monotonic clock: the wall clock may be set back meanwhile
    _release_dead(ledger, name)
    while not ledger.lease(name, holder, LEASE_S):
        if time.monotonic() > deadline:
            raise RefusedError(
                f"another process holds the {name} lease; wait for it to end, or {LEASE_S:.0f} s if it was killed"
            )
        time.sleep(0.5)
    stop, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not stop.wait(LEASE_S / 3):
            try:
                if not ledger.lease(name, holder, LEASE_S):
                    lost.set()
                    return
            except UnavailableError:
                continue  # renewed every third of its duration, the lease survives two failed attempts

    thread = threading.Thread(target=renew, name=f"lease-{name}", daemon=True)
    thread.start()
    try:
        yield holder
    finally:
        stop.set()
        thread.join()
        ledger.release(name, holder)
    # Only now, so that the block can finish: it may be in the middle of a write that must not be cut off.
    if lost.is_set():
        raise RefusedError(f"another process took the {name} lease while this ran; run this again")


def _here() -> str:
    """Return the machine and process-id namespace: containers may share a host name but not process ids."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{namespace}"


def _release_dead(ledger: Ledger, name: str) -> None:
    """Release a lease whose holder was a process of this machine that has ended; others expire by themselves."""
    with ledger.read() as tx:
        current = tx.get(Lease, name)
    place, _, process = (current.holder if current else "").rpartition(":")[0].rpartition(":")
    if current and place == _here() and process.isdigit() and not psutil.pid_exists(int(process)):
        ledger.release(name, current.holder)
