"""The audit chain: append-only events, each carrying the hash of the one before.

An event's hash is an HMAC under a key that lies outside the database, in `keys/audit-key` of the home or in the file
that `records.audit_key_file` names. Whoever can only write to the database cannot append an event that `verify`
accepts. The file holds one key a line, the newest last; a rotation is an event whose subject is the id of the next
key. Events from before there were keys have plain hashes, and one keyed event (`KEYED`) vouches for all of them.

The number and hash of the newest event are also kept in a file outside the database, so that a chain whose end was
cut off is detected as well. The ledger updates that file after each commit that appended an event. A crash in between
leaves the file one event behind, and the next event catches up. `records.anchor` keeps every head in a second store.
"""

import hmac
import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from records import anchor
from records.durable import replacing, sync_file, write_file
from records.errors import ConfigError, ContractError, UnavailableError
from records.home import Home
from records.ids import canonical_json, hash_of, sha256_hex, utc_now
from records.ledger import AuditPlaces, Ledger, Transaction
from records.ledger.tables import TABLES
from records.types import AuditEvent

GENESIS = "0" * 64
KEYED, ROTATED = "audit.keyed", "audit.key_rotated"
_SHORTEST_KEY = 32
_EVENTS = TABLES[AuditEvent].c

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Last:
    """The newest event, and the id of the key that the next one needs; None if no event is keyed."""

    number: int
    hash: str
    key_id: str | None


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
        ConfigError: the key of the chain is missing.
    """
    # Write transactions are serialized, so two of them never read the same last number.
    last = _last(tx)
    key_id, key = _key_for_next(tx.audit, last) if tx.audit is not None else (None, None)
    event = AuditEvent(
        number=last.number + 1,
        at=utc_now(),
        actor=actor,
        action=action,
        subject=subject,
        details=details or {},
        previous_hash=last.hash,
        hash="",
        key_id=key_id,
    )
    try:
        event = event.model_copy(update={"hash": event_hash(event, key)})
    except ValueError as error:
        raise ContractError(f"the details of audit event {action} are not JSON values: {error}") from error
    tx.add(event)
    tx.after_commit.append(_move_head)
    return event.hash


def event_hash(event: AuditEvent, key: bytes | None = None) -> str:
    """Return the hash that an event must carry: over all its fields except the hash itself, under its key if any."""
    # Events from before there were keys were hashed without the field.
    content = event.model_dump(mode="json", exclude={"hash"} if event.key_id else {"hash", "key_id"})
    return hash_of(content) if key is None else hmac.new(key, canonical_json(content).encode(), "sha256").hexdigest()


def chain_head(tx: Transaction) -> str:
    """Return the content of the head file: number and hash of the newest event, and a newline."""
    last = _last(tx)
    return f"{last.number} {last.hash}\n"


def head_file(home: Home) -> Path:
    """Return the file that keeps the chain's head outside the database."""
    return home.keys / "audit-head"


def open_chain(ledger: Ledger) -> None:
    """Make the key and the head of a chain that has none yet.

    The head of a chain without events is written, so that a missing file always means a removed one. A chain from
    before there were keys gets the event that vouches for it. A chain that is keyed with a key that is missing is left
    alone: `append` and `verify` say so. UnavailableError is raised if a file cannot be written.
    """
    places = ledger.audit
    if places is None:
        return
    with ledger.read() as tx:
        last = _last(tx)
    if not places.keys.exists() and last.key_id is None:
        # Of two processes that make the key at once, one keeps its file and both read that one.
        with replacing(places.keys, mode=0o600, keep=True) as temporary:
            temporary.write_text(secrets.token_hex(32) + "\n")
    if last.number == 0:
        if not places.head.exists():
            write_head(ledger)
    elif last.key_id is None:
        _vouch(ledger, places)


def _vouch(ledger: Ledger, places: AuditPlaces) -> None:
    with ledger.begin() as tx:
        last, head = _last(tx), _read_head(places.head)
        # Only for a chain that Relook wrote: its head is in the file. Events that somebody put into the database of a
        # new home, whose head is 0, must stay without a voucher.
        known = head is not None and not head.startswith("0 ")
        if last.key_id is None and known and not any(_head_faults(str(head), lambda number: _hash_at(tx, number))):
            append(tx, actor="relook", action=KEYED, subject=f"events 1 to {last.number}")


def rotate_key(ledger: Ledger, *, actor: str) -> str:
    """Put a new key in force from the next event on, and return its id.

    The newest key of the file is taken if it is not in force yet: somebody added it, or an earlier rotation was killed.
    Otherwise a key is made. Earlier keys stay in the file, since earlier events are verified with them.

    Args:
        ledger: with the chain.
        actor: for the audit.
    Returns:
        The id of the new key.
    Raises:
        ConfigError: the key in force is missing.
        UnavailableError: the file of keys cannot be written; nothing has changed.
        ContractError: the ledger was opened without a place for keys.
    """
    if ledger.audit is None:
        raise ContractError("this ledger was opened without a place for the keys of its audit chain")
    path = ledger.audit.keys
    with ledger.begin() as tx:
        in_force, _ = _key_for_next(ledger.audit, _last(tx))
        waiting = list(read_keys(path))[-1]
        made = secrets.token_hex(32) if waiting == in_force else None
        new = waiting if made is None else _id_of(made)
        append(tx, actor=actor, action=ROTATED, subject=new)
        # Before the commit: a key that no event names does no harm, an event that names a lost key would.
        if made is not None:
            write_file(path, f"{path.read_text().rstrip()}\n{made}\n", mode=0o600)
    return new


def read_keys(path: Path) -> dict[str, bytes]:
    """Return the keys of a chain by their ids, oldest first; none if the file is missing.

    ConfigError is raised if it cannot be read or a key is too short.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the keys of the audit chain cannot be read from {path} ({error})") from error
    keys = {_id_of(line): line.encode() for line in lines if line}
    if not keys or min(map(len, keys.values())) < _SHORTEST_KEY:
        raise ConfigError(
            f"{path} has to hold keys of at least {_SHORTEST_KEY} characters, one a line, the newest last"
        )
    return keys


def verify(ledger: Ledger, home: Home) -> list[str]:
    """Check the whole chain and return one sentence per fault; the list is empty if the chain is intact."""
    places = ledger.audit or AuditPlaces(home.keys / "audit-key", head_file(home))
    # The head is read before the chain: an event appended in between must not make the chain look cut off.
    head = _read_head(places.head)
    keys = read_keys(places.keys)
    hashes = {0: GENESIS}
    with ledger.read() as tx:
        faults = list(_chain_faults(tx, keys, hashes))
        faults += _anonymous_faults(tx, keys)
    if head is None:
        return [*faults, f"{places.head} is missing, so a cut-off end cannot be ruled out"]
    return [*faults, *_head_faults(head, hashes.get)]


def verify_anchor(ledger: Ledger) -> tuple[list[str], int]:
    """Compare the chain with the heads in the second store.

    Returns one sentence per fault, and the number of the newest event that is anchored. ConfigError is raised if
    `records.audit_anchor` names no store, UnavailableError if it cannot be read.
    """
    url = ledger.audit.anchor if ledger.audit is not None else None
    if url is None:
        raise ConfigError(
            "records.audit_anchor names no second store; set it to an append-only log or s3://BUCKET/PATH"
        )
    # Read before the chain, for the same reason as the head.
    heads, faults = anchor.read_heads(url)
    with ledger.read() as tx:
        rows = tx.connection.execute(sa.select(_EVENTS.number, _EVENTS.hash, _EVENTS.key_id)).all()
    chain = {int(row.number): anchor.Head(int(row.number), row.hash, row.key_id) for row in rows}
    return [*faults, *anchor.compare(url, heads, chain)], max((head.number for head in heads), default=0)


def num_unkeyed(ledger: Ledger) -> int:
    """Return how many events at the start of the chain are from before there were keys."""
    with ledger.read() as tx:
        first = tx.connection.scalar(sa.select(sa.func.min(_EVENTS.number)).where(_EVENTS.key_id.is_not(None)))
        return _last(tx).number if first is None else int(first) - 1


def _chain_faults(tx: Transaction, keys: dict[str, bytes], hashes: dict[int, str]) -> Iterator[str]:
    """Yield a sentence per fault, and store the hash of every event in `hashes`."""
    previous, expected = GENESIS, 1
    in_force: str | None = None
    for number in tx.connection.scalars(sa.select(_EVENTS.number).order_by(_EVENTS.number)).all():
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
        key = keys.get(event.key_id or "")
        wrong_key = _key_fault(event, in_force, has_key=key is not None)
        if wrong_key is not None:
            yield f"event {number} ({event.action} {event.subject[:12]}) {wrong_key}"
        elif event_hash(event, key) != event.hash:
            yield f"event {number} ({event.action} {event.subject[:12]}) was altered"
        elif event.key_id is not None:
            in_force = event.subject if event.action == ROTATED else event.key_id
        previous = hashes[number] = event.hash


def _key_fault(event: AuditEvent, in_force: str | None, *, has_key: bool) -> str | None:
    if event.key_id is None:
        return None if in_force is None else "is not keyed: it was written outside Relook"
    if not has_key:
        return f"is keyed with {event.key_id[:16]}, which is not among the keys of this home"
    if in_force is not None and event.key_id != in_force:
        return f"is keyed with {event.key_id[:16]}, and {in_force[:16]} was in force"
    return None


def _anonymous_faults(tx: Transaction, keys: dict[str, bytes]) -> Iterator[str]:
    """Yield a sentence if there are events without a key that no keyed event vouches for."""
    anonymous = sa.select(sa.func.max(_EVENTS.number)).where(_EVENTS.key_id.is_(None))
    first = tx.connection.execute(
        sa.select(_EVENTS.number, _EVENTS.action).where(_EVENTS.key_id.is_not(None)).order_by(_EVENTS.number).limit(1)
    ).first()
    if first is not None:
        anonymous = anonymous.where(_EVENTS.number < first.number)
    last = tx.connection.scalar(anonymous)
    if last is None or (first is None and not keys) or (first is not None and first.action == KEYED):
        return
    yield f"events up to {last} are not keyed and no event vouches for them: they were written outside Relook"


def _head_faults(head: str, hash_at: Callable[[int], str | None]) -> Iterator[str]:
    # The chain may be one event ahead of the file, so the event is looked up by its number.
    number, _, expected = head.partition(" ")
    found = hash_at(int(number)) if number.isdigit() else None
    if found is None:
        yield f"the chain was cut off: event {number}, anchored outside the database, is missing"
    elif found != expected:
        yield f"event {number} is not the one anchored outside the database"


def _move_head(ledger: Ledger) -> None:
    if ledger.audit is None:
        return
    head = write_head(ledger)
    if head is None or ledger.audit.anchor is None:
        return
    try:
        # Outside the write lock: the other store may be slow. Heads may arrive in any order, since each has its number.
        anchor.write_head(ledger.audit.anchor, head)
    except UnavailableError as error:
        # The action is done and recorded. The next event's head covers this one, and `verify --anchor` counts both.
        logger.warning("event %d of the audit chain is not anchored: %s", head.number, error)


def write_head(ledger: Ledger) -> anchor.Head | None:
    """Write the number and hash of the newest event to the head file, as happens after each `append`.

    Returns the head; None, and the file stays as it is, if it holds evidence that the chain was cut off. ContractError
    is raised if the ledger was opened without a place for it, UnavailableError if it cannot be written.
    """
    if ledger.audit is None:
        raise ContractError("this ledger was opened without a place for the head of its audit chain")
    path = ledger.audit.head
    try:
        # Under the write lock, so that of two processes neither replaces a newer head by an older one.
        with ledger.begin() as tx:
            before, last = _read_head(path), _last(tx)
            if before is not None and any(_head_faults(before, lambda number: _hash_at(tx, number))):
                return None
            key_id = tx.connection.scalar(sa.select(_EVENTS.key_id).where(_EVENTS.number == last.number))
            _flush(ledger)
            write_file(path, chain_head(tx), mode=0o600)
    except (OSError, UnavailableError) as error:
        raise UnavailableError(
            f"the head of the audit chain cannot be written ({error}); its events are recorded"
        ) from error
    return anchor.Head(last.number, last.hash, key_id)


def _flush(ledger: Ledger) -> None:
    """Wait until the events are on disk, so that no head, after a power cut, names an event that was lost."""
    file = ledger.engine.url.database
    if ledger.engine.dialect.name == "sqlite" and file is not None:
        log = Path(f"{file}-wal")
        sync_file(log if log.exists() else Path(file))


def _read_head(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


def _id_of(key: str) -> str:
    # The key has 256 random bits, so its hash tells nothing about it.
    return sha256_hex(f"audit key {key}".encode())[:16]


def _key_for_next(places: AuditPlaces, last: _Last) -> tuple[str, bytes]:
    keys = read_keys(places.keys)
    key_id = last.key_id or next(reversed(keys), "")
    if key_id not in keys:
        named = f" {key_id}" if key_id else ""
        raise ConfigError(
            f"the audit chain needs the key{named}, which is not in {places.keys}; restore that file, or name the one "
            "that has it with records.audit_key_file"
        )
    return key_id, keys[key_id]


def _last(tx: Transaction) -> _Last:
    newest = sa.select(_EVENTS.number, _EVENTS.hash).order_by(_EVENTS.number.desc()).limit(1)
    row = tx.connection.execute(newest).first()
    if row is None:
        return _Last(0, GENESIS, None)
    keyed = sa.select(_EVENTS.key_id, _EVENTS.action, _EVENTS.subject).where(_EVENTS.key_id.is_not(None))
    found = tx.connection.execute(keyed.order_by(_EVENTS.number.desc()).limit(1)).first()
    key_id = None if found is None else str(found.subject if found.action == ROTATED else found.key_id)
    return _Last(int(row.number), str(row.hash), key_id)


def _hash_at(tx: Transaction, number: int) -> str | None:
    if number == 0:
        return GENESIS
    table = TABLES[AuditEvent]
    return tx.connection.scalar(sa.select(table.c.hash).where(table.c.number == number))
