"""Leases: named locks in the ledger, held while a block runs; one round or one sync at a time, on any machine.

A holder that was stopped for longer than its lease lasts can lose it. Every write transaction of the block therefore
checks the lease's fence number, and is refused once another process has taken the lease.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import Context, copy_context

import psutil

from records.errors import RefusedError, UnavailableError
from records.ids import new_id
from records.ledger import FENCES, Fence, Ledger, is_expired, is_released, lost_lease
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
    _release_dead(ledger, name)
    fence = _take(ledger, name, holder, wait_s)
    stop, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not stop.wait(LEASE_S / 3):
            try:
                # In a copy of the block's context, so a renewal is refused as well once the lease was taken.
                if not ledger.lease(name, holder, LEASE_S):
                    lost.set()
                    return
            except RefusedError:
                lost.set()
                return
            except UnavailableError:
                continue  # renewed every third of its duration, the lease survives two failed attempts

    fences = FENCES.set((*FENCES.get(), Fence(ledger.url, name, holder, fence)))
    thread = threading.Thread(target=copy_context().run, args=(renew,), name=f"lease-{name}", daemon=True)
    thread.start()
    try:
        yield holder
    finally:
        stop.set()
        thread.join()
        FENCES.reset(fences)
        # In an empty context: releasing an inner lease must not fail because the outer one was lost.
        was_ours = Context().run(ledger.release, name, holder)
    # For a block that wrote nothing after the loss, or went on after a write was refused.
    if lost.is_set() or not was_ours:
        raise RefusedError(lost_lease(name))


def _take(ledger: Ledger, name: str, holder: str, wait_s: float) -> int:
    """Wait for the lease, take it and return its fence number.

    The clock alone takes no lease away: one that looks expired is taken only if it is not renewed for a while, measured
    by the monotonic clock of this process. So a database's clock that is set forward leaves a lease with its holder.
    """
    began = watched_since = time.monotonic()
    watched: Lease | None = None
    while True:
        with ledger.read() as tx:
            current, now = tx.get(Lease, name), tx.now()
        if current != watched:
            watched, watched_since = current, time.monotonic()
        if current is None or is_expired(current, now):
            unrenewed_s = time.monotonic() - watched_since
            may_take = current is None or is_released(current) or unrenewed_s > LEASE_S / 2
            if may_take and ledger.lease(name, holder, LEASE_S):
                with ledger.read() as tx:
                    taken = tx.require(Lease, name)
                if taken.holder == holder:
                    return taken.fence
        elif time.monotonic() - began > wait_s:
            raise RefusedError(
                f"another process holds the {name} lease; wait for it to end, or {LEASE_S:.0f} s if it was killed"
            )
        time.sleep(min(0.5, LEASE_S / 10))


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
