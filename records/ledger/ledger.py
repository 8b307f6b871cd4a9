"""The ledger: transactions over records.

    with ledger.begin() as tx:      # writes: all of it or none of it
        tx.add(prediction, review_item)
    with ledger.read() as tx:       # reads: one consistent view
        tx.find(ReviewItem, where={"state": ReviewState.NEW}, order_by=("-priority",))

Rows are added, never replaced; only the fields that a record type declares `mutable` can change.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from pydantic import ValidationError

from records.errors import ContractError, RefusedError, RelookError, UnavailableError, UnknownIdError
from records.ledger.engine import READ_OPTIONS, TOUCHES_OPTION, WRITE_OPTION, checkpoint, make_engine
from records.ledger.migrate import upgrade
from records.ledger.tables import TABLES, any_of, unindexed
from records.redaction import without_secrets
from records.types import Lease, Record

R = TypeVar("R", bound=Record)
_FEW = 1000
# Fields that few rows share, so that their index finds what others, like a state, do not narrow down.
_FINDS_ROWS = frozenset({"id", "image_id", "prediction_id", "request_id", "review_item_id"})
_KEY = "key_of_row"  # no column has this name, which SQLAlchemy would take for a new value
_UNREACHABLE = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)
_RELEASED = datetime.fromtimestamp(0, UTC)  # before every time that a clock can be set to
_LONGEST_LEASE = timedelta(hours=1)


@dataclass(frozen=True)
class Fence:
    """A held lease, which the write transactions of its holder check; see `FENCES`."""

    url: str
    name: str
    holder: str
    number: int

    def holds(self, lease: Lease) -> bool:
        """Return whether the lease is still this holder's, and was so without interruption."""
        # The name as well: a program without fences, before an upgrade, takes a lease and leaves the number.
        return lease.fence == self.number and lease.holder == self.holder


FENCES: ContextVar[tuple[Fence, ...]] = ContextVar("FENCES", default=())
"""The leases that the running code holds. A thread that it starts has them only in a copy of its context."""


@dataclass(frozen=True)
class AuditPlaces:
    """Where the audit chain is kept in check outside the database.

    Args:
        keys: the file of its keys, see `records.audit`.
        head: the file of its newest event.
        anchor: URL of a second store of heads, see `records.anchor`; None if there is none.
    """

    keys: Path
    head: Path
    anchor: str | None = None


@dataclass(frozen=True)
class Transaction:
    """One transaction.

    Args:
        connection: the SQLAlchemy connection, for the rare query that records cannot express.
        writes: false in a read transaction.
        after_commit: called with the ledger after this transaction was committed, each function once.
        audit: of the ledger.
    """

    connection: sa.Connection
    writes: bool = True
    after_commit: list[Callable[["Ledger"], None]] = field(default_factory=list, repr=False)
    audit: AuditPlaces | None = None

    def add(self, *records: Record) -> None:
        """Insert records of any types, all or none of them.

        Raises RefusedError if a key or unique value exists already; the transaction stays usable. Raises
        ContractError in a read transaction, or if a field holds a value that is not JSON.
        """
        self._require_writes()
        by_type: dict[type[Record], list[dict[str, Any]]] = {}
        for record in records:
            by_type.setdefault(type(record), []).append(record.model_dump(mode="python"))
        if not by_type:
            return
        # A savepoint: on PostgreSQL a failed statement would otherwise abort the caller's whole transaction.
        with self.connection.begin_nested():
            for record_type, rows in by_type.items():
                self._insert(record_type, rows)

    def _insert(self, record_type: type[Record], rows: list[dict[str, Any]]) -> None:
        try:
            self.connection.execute(sa.insert(TABLES[record_type]), rows)
        except sa.exc.IntegrityError as error:
            what = str(error.orig).splitlines()[0]
            raise RefusedError(f"{record_type.__name__} exists already: {what}") from error
        except sa.exc.StatementError as error:
            if isinstance(error.orig, (TypeError, ValueError)):
                raise ContractError(f"{record_type.__name__} cannot be stored: {error.orig}") from error
            raise

    def get(self, record_type: type[R], key: str | int) -> R | None:
        """Return the record with this key, or None."""
        found = self.find(record_type, where={record_type.key: key}, limit=1)
        return found[0] if found else None

    def require(self, record_type: type[R], key: str | int) -> R:
        """Return the record with this key; UnknownIdError if there is none."""
        found = self.get(record_type, key)
        if found is None:
            raise UnknownIdError(f"no {record_type.__name__} has the id {key!r}")
        return found

    def find(
        self,
        record_type: type[R],
        where: Mapping[str, Any] | None = None,
        order_by: Sequence[str] = (),
        limit: int | None = None,
    ) -> list[R]:
        """Return the records that match, in order.

        Args:
            record_type: the type, and with it the table.
            where: field to value; a list or set means any of them, None means empty.
            order_by: field names, a leading `-` for descending.
            limit: largest number of records.
        Returns:
            The records.
        Raises:
            ContractError: a field is unknown.
        """
        table = TABLES[record_type]
        query = sa.select(table).where(*self._conditions(record_type, where or {}))
        for name in order_by:
            column = _column(record_type, name.removeprefix("-"))
            query = query.order_by(column.desc() if name.startswith("-") else column.asc())
        if limit is not None:
            query = query.limit(limit)
        return [record_type.model_validate(dict(row)) for row in self.connection.execute(query).mappings()]

    def count(
        self, record_type: type[Record], where: Mapping[str, Any] | None = None, at_most: int | None = None
    ) -> int:
        """Return how many records match `where`, as in `find`.

        `at_most` stops the count there: counting all of millions takes seconds.
        """
        # The limit is inside the subquery, so the database stops scanning there.
        found = sa.select(sa.literal(1)).select_from(TABLES[record_type])
        found = found.where(*self._conditions(record_type, where or {})).limit(at_most)
        return int(self.connection.execute(sa.select(sa.func.count()).select_from(found.subquery())).scalar_one())

    def update(self, record_type: type[Record], key: str | int, **changes: Any) -> None:
        """Change mutable fields of one record.

        Raises ContractError if a field is not mutable, a value does not fit it, or this is a read transaction;
        UnknownIdError if there is no record with this key.
        """
        self.update_many(record_type, {key: changes})

    def update_many(self, record_type: type[Record], changes: Mapping[Any, Mapping[str, Any]]) -> None:
        """Change mutable fields of several records in two statements, whatever their number.

        Args:
            record_type: the type of all of them.
            changes: key to the new values; every record changes the same fields.
        Raises:
            ContractError: a field is not mutable, the records change different fields, a value does not fit, or this
                is a read transaction.
            UnknownIdError: there is no record with one of the keys.
        """
        self._require_writes()
        if not changes:
            return
        names = set[str]().union(*changes.values())
        if forbidden := sorted(names - record_type.mutable):
            raise ContractError(f"{record_type.__name__}.{forbidden[0]} never changes after it was written")
        if any(values.keys() != names for values in changes.values()):
            raise ContractError(f"records of {record_type.__name__} that are changed together change the same fields")
        current = {getattr(row, record_type.key): row for row in self.find(record_type, {record_type.key: [*changes]})}
        rows = []
        for key, values in changes.items():
            if key not in current:
                raise UnknownIdError(f"no {record_type.__name__} has the id {key!r}")
            try:
                # The whole record is validated: pydantic checks nothing in `model_copy(update=...)`.
                changed = record_type.model_validate(current[key].model_dump() | dict(values))
            except ValidationError as error:
                raise ContractError(f"{record_type.__name__} cannot become that: {error}") from error
            rows.append({_KEY: key} | {name: getattr(changed, name) for name in names})
        if names:
            matches = _column(record_type, record_type.key) == sa.bindparam(_KEY)
            self.connection.execute(sa.update(TABLES[record_type]).where(matches), rows)

    def now(self) -> datetime:
        """Return the time by the database's clock, which all machines that share the ledger read alike."""
        if self.connection.dialect.name == "sqlite":
            text = self.connection.exec_driver_sql("SELECT strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now')").scalar_one()
            return datetime.fromisoformat(text)
        # Not now(), which is when the transaction began: it may have waited for other writers since.
        now: datetime = self.connection.exec_driver_sql("SELECT clock_timestamp()").scalar_one()
        return now.astimezone(UTC)

    def now_after(self, record_type: type[Record]) -> datetime:
        """Return the time by the database's clock, moved after `created_at` of every record of a type.

        So `created_at` orders these records as they were written, also where the clock was set back. It holds in write
        transactions that touch everything, since only those follow one another.
        """
        newest = self.connection.scalar(sa.select(sa.func.max(TABLES[record_type].c.created_at)))
        return self.now() if newest is None else max(self.now(), newest + timedelta(microseconds=1))

    def _require_writes(self) -> None:
        if not self.writes:
            raise ContractError("a read transaction cannot write; open one with ledger.begin()")

    def _conditions(self, record_type: type[Record], where: Mapping[str, Any]) -> Iterable[sa.ColumnElement[bool]]:
        found_by = {name for name in _FINDS_ROWS if where.get(name) is not None}
        for name, value in where.items():
            column: sa.ColumnElement[Any] = _column(record_type, name)
            if found_by and name not in found_by:
                column = unindexed(column, self.connection.dialect)
            if value is None:
                yield column.is_(None)
            elif not isinstance(value, (list, tuple, set, frozenset)):
                yield column == value
            # Plain parameters let the planner estimate the number of rows; beyond a few it would be too many.
            elif len(value) <= _FEW:
                yield column.in_(list(value))
            else:
                yield any_of(column, value, self.connection.dialect)


@dataclass(frozen=True)
class Ledger:
    """An open ledger. Safe to use from several threads; see `open_ledger`.

    Args:
        url: its URL without the password.
        engine: the SQLAlchemy engine.
        audit: where the audit chain is kept in check; None leaves it without keys and head.
    """

    url: str
    engine: sa.Engine = field(repr=False)
    audit: AuditPlaces | None = None

    @contextmanager
    def begin(self, touches: Collection[str] | None = None) -> Generator[Transaction]:
        """Open a write transaction; it commits at the end of the block and rolls back on an error.

        Write transactions are serialized, so keep them short.

        Args:
            touches: names of everything it reads before it writes, for example image ids. On PostgreSQL such
                transactions run concurrently with those that touch other names, and share their disk flushes. Default:
                it touches everything.
        Yields:
            The transaction.
        Raises:
            RefusedError: it was opened in a block that holds a lease which another process has taken.
        """
        with reachable(self.url), self.engine.connect() as connection:
            connection = connection.execution_options(**{WRITE_OPTION: True, TOUCHES_OPTION: touches})
            with connection.begin():
                tx = Transaction(connection, audit=self.audit)
                # A lease is taken in a transaction that excludes this one, so it stays ours until the commit.
                for fence in FENCES.get():
                    if fence.url == self.url and not fence.holds(tx.require(Lease, fence.name)):
                        raise RefusedError(lost_lease(fence.name))
                yield tx
        # After the commit and outside the transaction, since an action may open one itself.
        for action in dict.fromkeys(tx.after_commit):
            action(self)

    @contextmanager
    def read(self) -> Generator[Transaction]:
        """Open a read transaction: one consistent view, no lock held against writers."""
        with reachable(self.url), self.engine.connect() as connection:
            connection = connection.execution_options(**READ_OPTIONS[connection.dialect.name])
            with connection.begin():
                yield Transaction(connection, writes=False)

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        """Take or renew a lease.

        Args:
            name: what is locked.
            holder: the caller's name; the current holder renews.
            seconds: how long it holds, counted from now by the database's clock.
        Returns:
            True if `holder` has it now, False if another holder does.
        """
        with self.begin() as tx:
            now = tx.now()
            current, expires_at = tx.get(Lease, name), now + timedelta(seconds=seconds)
            if current is None:
                tx.add(Lease(name=name, holder=holder, expires_at=expires_at, fence=1))
                return True
            if current.holder != holder and not is_expired(current, now):
                return False
            fence = current.fence + (current.holder != holder)
            tx.update(Lease, name, holder=holder, expires_at=expires_at, fence=fence)
            return True

    def release(self, name: str, holder: str) -> bool:
        """Release a lease and return whether `holder` had it; one that it does not have is left alone."""
        with self.begin() as tx:
            current = tx.get(Lease, name)
            is_ours = current is not None and current.holder == holder
            if is_ours:
                # Rows are never deleted: their fence numbers go on.
                tx.update(Lease, name, expires_at=_RELEASED)
        return is_ours

    def checkpoint(self) -> None:
        """Copy SQLite's log into its file, see `records.ledger.engine.checkpoint`; UnavailableError if that fails."""
        with reachable(self.url):
            checkpoint(self.engine)

    def close(self) -> None:
        """Close all connections; one that a thread still uses, when it comes back."""
        pool = self.engine.pool
        self.engine.dispose()
        # A connection that was lost meanwhile comes back as None.
        sa.event.listen(pool, "checkin", lambda connection, _: connection and connection.close())


def open_ledger(
    url: str | sa.URL,
    *,
    durability: Literal["normal", "full"] = "normal",
    busy_timeout_s: float = 30.0,
    audit: AuditPlaces | None = None,
) -> Ledger:
    """Open a ledger and migrate its schema.

    Args:
        url: a SQLAlchemy URL, SQLite or PostgreSQL.
        durability: SQLite's synchronous mode.
        busy_timeout_s: how long a writer waits for another writer, seconds.
        audit: where the audit chain is kept in check.
    Returns:
        The open ledger.
    Raises:
        ConfigError: the URL cannot work, or the schema is newer than this program.
        UnavailableError: the database does not respond.
    """
    engine = make_engine(url, durability=durability, busy_timeout_s=busy_timeout_s)
    shown = without_secrets(engine.url.render_as_string(hide_password=True))
    try:
        with reachable(shown):
            upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return Ledger(url=shown, engine=engine, audit=audit)


@contextmanager
def reachable(url: str) -> Generator[None]:
    """Turn the driver's errors of a database that does not respond into UnavailableError, which shows `url`."""
    try:
        yield
    except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
        is_disconnect = isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
        if not is_disconnect and not isinstance(error, _UNREACHABLE):
            raise
        reason = getattr(error, "orig", None) or error
        raise UnavailableError(f"ledger {url} does not respond: {' '.join(str(reason).split())}") from error
    except sa.exc.StatementError as error:
        # SQLAlchemy wraps what the column types raise: a value that no database can hold.
        if isinstance(error.orig, RelookError):
            raise error.orig from error
        raise


def is_expired(lease: Lease, now: datetime) -> bool:
    """Return whether a lease may be taken by another; `now` is by the database's clock.

    A time that is too far ahead was written before the clock was set back.
    """
    return not now < lease.expires_at <= now + _LONGEST_LEASE


def is_released(lease: Lease) -> bool:
    """Return whether the last holder released a lease, as opposed to one that expired."""
    return lease.expires_at == _RELEASED


def lost_lease(name: str) -> str:
    """Return the sentence of the error of a holder whose lease was taken."""
    return f"another process took the {name} lease while this ran; this wrote nothing since then, run it again"


def _column(record_type: type[Record], name: str) -> sa.Column[Any]:
    if name not in record_type.model_fields:
        raise ContractError(f"{record_type.__name__} has no field {name!r}")
    return TABLES[record_type].c[name]
