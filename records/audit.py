"""The audit chain: append-only events, each carrying the hash of the one before.

The hash of the newest event is also kept in a file outside the database, so that cutting off the
end of the chain is found as well.
"""

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from records.home import Home
from records.ids import hash_of, utc_now
from records.ledger import Ledger, Transaction
from records.ledger.tables import TABLES
from records.types import AuditEvent

GENESIS = "0" * 64


def append(tx: Transaction, *, actor: str, action: str, subject: str, details: dict[str, Any] | None = None) -> str:
    """Append an event to the chain, in the caller's write transaction.

    Args:
        tx: the transaction of the action that is recorded, so that neither exists without the other.
        actor: who did it.
        action: what, for example `gate.read`.
        subject: to what.
        details: JSON values.
    Returns:
        The event's hash.
    """
    table = TABLES[AuditEvent]
    last = tx.connection.execute(sa.select(table).order_by(table.c.number.desc()).limit(1)).mappings().first()
    number, previous = (int(last["number"]) + 1, str(last["hash"])) if last else (1, GENESIS)
    event = AuditEvent(
        number=number,
        at=utc_now(),
        actor=actor,
        action=action,
        subject=subject,
        details=details or {},
        previous_hash=previous,
        hash="",
    )
    event = event.model_copy(update={"hash": event_hash(event)})
    tx.add(event)
    return event.hash


def event_hash(event: AuditEvent) -> str:
    """Return the hash that an event must carry: over all its fields but the hash itself."""
    return hash_of(event.model_dump(mode="json", exclude={"hash"}))


def head_file(home: Home) -> Path:
    """Return the file that keeps the chain's head outside the database."""
    return home.keys / "audit-head"


def anchor(ledger: Ledger, home: Home) -> None:
    """Write the chain's head to its file outside the database.

    Args:
        ledger: with the chain.
        home: with the file.
    """
    with ledger.read() as tx:
        last = tx.find(AuditEvent, order_by=("-number",), limit=1)
    if last:
        temporary = head_file(home).with_suffix(".new")
        temporary.write_text(f"{last[0].number} {last[0].hash}\n")
        temporary.replace(head_file(home))


def verify(ledger: Ledger, home: Home) -> list[str]:
    """Check the whole chain.

    Args:
        ledger: with the chain.
        home: with the file that keeps its head.
    Returns:
        One sentence per fault, empty if the chain is whole.
    """
    with ledger.read() as tx:
        events = tx.find(AuditEvent, order_by=("number",))
    faults: list[str] = []
    previous, expected = GENESIS, 1
    for event in events:
        if event.number != expected:
            faults.append(f"events {expected} to {event.number - 1} are missing")
        elif event.previous_hash != previous:
            faults.append(f"event {event.number} does not follow the one before it: removed or reordered")
        if event_hash(event) != event.hash:
            faults.append(f"event {event.number} ({event.action} {event.subject[:12]}) was altered")
        previous, expected = event.hash, event.number + 1
    faults.extend(_anchor_faults(events, head_file(home)))
    return faults


def _anchor_faults(events: list[AuditEvent], path: Path) -> list[str]:
    if not path.exists():
        return []
    number, head = path.read_text().split()
    by_number = {event.number: event.hash for event in events}
    if int(number) not in by_number:
        return [f"the chain was cut off: event {number}, anchored outside the database, is missing"]
    if by_number[int(number)] != head:
        return [f"event {number} is not the one anchored outside the database"]
    return []
