"""The audit chain: append-only events, each carrying the hash of the one before.

The number and hash of the newest event are also kept in a file outside the database, so that a chain whose end was
cut off is detected as well. The ledger updates that file after each commit that appended an event. A crash in between
leaves the file one event behind, and the next event catches up.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from records.errors import ContractError, UnavailableError
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
        action: for example `gate.read`.
        subject: the id or name of what it was done to.
        details: JSON values.
    Returns:
        The event's hash.
    Raises:
        ContractError: this is a read transaction, or the details are not JSON values.
    """
    # Write transactions are serialized, so two of them never read the same last number.
    number, previous = _last(tx)
    event = AuditEvent(
        number=number + 1,
        at=utc_now(),
        actor=actor,
        action=action,
        subject=subject,
        details=details or {},
        previous_hash=previous,
        hash="",
    )
    try:
        event = event.model_copy(update={"hash": event_hash(event)})
    except ValueError as error:
        raise ContractError(f"the details of audit event {action} are not JSON values: {error}") from error
    tx.add(event)
    tx.after_commit.append(_move_head)
    return event.hash


def event_hash(event: AuditEvent) -> str:
    """Return the hash that an event must carry: over all its fields except the hash itself."""
    return hash_of(event.model_dump(mode="json", exclude={"hash"}))


def chain_head(tx: Transaction) -> str:
    """Return the content of the head file: number and hash of the newest event, and a newline."""
    number, digest = _last(tx)
    return f"{number} {digest}\n"


def head_file(home: Home) -> Path:
    """Return the file that keeps the chain's head outside the database."""
    return home.keys / "audit-head"


def anchor(ledger: Ledger, home: Home) -> None:
    """Write the chain's head to its file, as happens after each `append`; UnavailableError if that fails."""
    _write_head(ledger, head_file(home))


def open_chain(ledger: Ledger, home: Home) -> None:
    """Create the head file of a chain without events, so that a missing file always means a removed one.

    UnavailableError is raised if it cannot be written.
    """
    if not head_file(home).exists():
        with ledger.read() as tx:
            is_new = _last(tx) == (0, GENESIS)
        if is_new:
            anchor(ledger, home)


def verify(ledger: Ledger, home: Home) -> list[str]:
    """Check the whole chain and return one sentence per fault; the list is empty if the chain is intact."""
    # The head is read before the chain: an event appended in between must not make the chain look cut off.
    head = _read_head(head_file(home))
    hashes = {0: GENESIS}
    with ledger.read() as tx:
        faults = list(_chain_faults(tx, hashes))
    if head is None:
        return [*faults, f"{head_file(home)} is missing, so a cut-off end cannot be ruled out"]
    return [*faults, *_head_faults(head, hashes.get)]


def _chain_faults(tx: Transaction, hashes: dict[int, str]) -> Iterator[str]:
    """Yield a sentence per fault, and store the hash of every event in `hashes`."""
    column = TABLES[AuditEvent].c.number
    previous, expected = GENESIS, 1
    for number in tx.connection.scalars(sa.select(column).order_by(column)).all():
        if number != expected:
            yield f"events {expected} to {number - 1} are missing"
        follows = number == expected
        expected = number + 1
        try:
            event = tx.require(AuditEvent, number)
        except ValueError:
            # Edited by hand into a row that does not validate; its stored hash still links the next event.
            yield f"event {number} was altered: it cannot even be read"
            previous = hashes[number] = _hash_at(tx, number) or ""
            continue
        if follows and event.previous_hash != previous:
            yield f"event {number} does not follow the one before it: altered, removed or reordered"
        if event_hash(event) != event.hash:
            yield f"event {number} ({event.action} {event.subject[:12]}) was altered"
        previous = hashes[number] = event.hash


def _head_faults(head: str, hash_at: Callable[[int], str | None]) -> Iterator[str]:
    # The chain may be one event ahead of the file, so the event is looked up by its number.
    number, _, expected = head.partition(" ")
    found = hash_at(int(number)) if number.isdigit() else None
    if found is None:
        yield f"the chain was cut off: event {number}, anchored outside the database, is missing"
    elif found != expected:
        yield f"event {number} is not the one anchored outside the database"


def _move_head(ledger: Ledger) -> None:
    if ledger.audit_head is not None:
        _write_head(ledger, ledger.audit_head)


def _write_head(ledger: Ledger, path: Path) -> None:
    # Under the write lock, so that of two processes neither replaces a newer head by an older one.
    with ledger.begin() as tx:
        head = _read_head(path)
        if head is not None and any(_head_faults(head, lambda number: _hash_at(tx, number))):
            return  # keep the old head: it is the evidence that the chain was cut off
        try:
            # Renamed into place: a crash must not leave half a head, which would look like a cut-off chain.
            temporary = path.with_suffix(".new")
            temporary.write_text(chain_head(tx))
            temporary.replace(path)
        except OSError as error:
            raise UnavailableError(
                f"the head of the audit chain cannot be written to {path} ({error.strerror}); its events are recorded"
            ) from error


def _read_head(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


def _last(tx: Transaction) -> tuple[int, str]:
    event = TABLES[AuditEvent].c
    row = tx.connection.execute(sa.select(event.number, event.hash).order_by(event.number.desc()).limit(1)).first()
    return (int(row.number), str(row.hash)) if row else (0, GENESIS)


def _hash_at(tx: Transaction, number: int) -> str | None:
    if number == 0:
        return GENESIS
    table = TABLES[AuditEvent]
    return tx.connection.scalar(sa.select(table.c.hash).where(table.c.number == number))
