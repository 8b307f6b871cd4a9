"""The ledger's one way in: transactions over records.

    with ledger.begin() as tx:      # writes: all of it or none of it
        tx.add(prediction, review_item)
    with ledger.read() as tx:       # reads: one consistent view
        tx.find(ReviewItem, where={"state": ReviewState.NEW}, order_by=("-priority",))

Rows are added, never replaced; only the fields that a record type names as mutable can change.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from pydantic import ValidationError

from records.errors import ContractError, RefusedError, UnavailableError, UnknownIdError
from records.ids import utc_now
from records.ledger.engine import READ_OPTIONS, TOUCHES_OPTION, WRITE_OPTION, make_engine
from records.ledger.migrate import upgrade
from records.ledger.tables import TABLES, any_of
from records.types import Lease, Record

R = TypeVar("R", bound=Record)
_FEW = 1000


@dataclass(frozen=True)
class Transaction:
    """One transaction, typed by records.

    Args:
        connection: the SQLAlchemy connection, for the rare query that records cannot express.
        writes: false in a read transaction.
        after_commit: what to call with the ledger once this transaction is committed, each once.
    """

    connection: sa.Connection
    writes: bool = True
    after_commit: list[Callable[["Ledger"], None]] = field(default_factory=list, repr=False)

    def add(self, *records: Record) -> None:
        """Insert records.

        Args:
            records: any mix of types; they go in together, all or none.
        Raises:
            RefusedError: a key or unique value exists already; nothing is ever overwritten. The
                transaction can go on after it.
            ContractError: this is a read transaction, or a field holds something that is not JSON.
        """
        self._require_writes()
        by_type: dict[type[Record], list[dict[str, Any]]] = {}
        for record in records:
            by_type.setdefault(type(record), []).append(record.model_dump(mode="python"))
        if not by_type:
            return
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
        """Return the record with this key.

        Args:
            record_type: what is looked for.
            key: the value of its key field.
        Returns:
            The record.
        Raises:
            UnknownIdError: there is none.
        """
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
        """Return the records that match.

        Args:
            record_type: what is looked for.
            where: field to value; a list or set means any of them, None means empty.
            order_by: field names, a leading `-` for descending.
            limit: at most so many.
        Returns:
            The records, in order.
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
        """Return how many records match.

        Args:
            record_type: what is counted.
            where: as in `find`.
            at_most: stop there; counting all of millions takes seconds.
        Returns:
            The number, `at_most` if there are as many or more.
        Raises:
            ContractError: a field is unknown.
        """
        found = sa.select(sa.literal(1)).select_from(TABLES[record_type])
        found = found.where(*self._conditions(record_type, where or {})).limit(at_most)
        return int(self.connection.execute(sa.select(sa.func.count()).select_from(found.subquery())).scalar_one())

    def update(self, record_type: type[Record], key: str | int, **changes: Any) -> None:
        """Change mutable fields of one record.

        Args:
            record_type: its type.
            key: the value of its key field.
            changes: new values, mutable fields only.
        Raises:
            ContractError: a field is not mutable, a value does not fit it, or this is a read transaction.
            UnknownIdError: there is no such record.
        """
        self._require_writes()
        forbidden = sorted(set(changes) - record_type.mutable)
        if forbidden:
            raise ContractError(f"{record_type.__name__}.{forbidden[0]} never changes after it was written")
        current = self.require(record_type, key)
        try:
            changed = record_type.model_validate(current.model_dump() | changes)
        except ValidationError as error:
            raise ContractError(f"{record_type.__name__} cannot become that: {error}") from error
        values = {name: getattr(changed, name) for name in changes}
        if not values:
            return
        key_column = _column(record_type, record_type.key)
        self.connection.execute(sa.update(TABLES[record_type]).where(key_column == key).values(**values))

    def _require_writes(self) -> None:
        if not self.writes:
            raise ContractError("a read transaction cannot write; open one with ledger.begin()")

    def _conditions(self, record_type: type[Record], where: Mapping[str, Any]) -> Iterable[sa.ColumnElement[bool]]:
        for name, value in where.items():
            column = _column(record_type, name)
            if value is None:
                yield column.is_(None)
            elif not isinstance(value, (list, tuple, set, frozenset)):
                yield column == value
            elif len(value) <= _FEW:
                yield column.in_(list(value))
            else:
                yield any_of(column, value, self.connection.dialect)


@dataclass(frozen=True)
class Ledger:
    """An open ledger. Safe to use from several threads; see `open_ledger`.

    Args:
        url: where it is, without its password.
        engine: the SQLAlchemy engine.
        audit_head: the file outside the database that keeps the head of the audit chain, if there is one.
    """

    url: str
    engine: sa.Engine = field(repr=False)
    audit_head: Path | None = None

    @contextmanager
    def begin(self, touches: Collection[str] | None = None) -> Generator[Transaction]:
        """Open a write transaction; it commits at the end of the block and rolls back on an error.

        Write transactions follow one another, so keep them short: nobody else writes meanwhile.

        Args:
            touches: names of all that it reads before it writes, for example image ids. On PostgreSQL such
                transactions run beside those that touch other names, and share their waits for the disk; default:
                it touches everything.
        Yields:
            The transaction.
        """
        with reachable(self.url), self.engine.connect() as connection:
            connection = connection.execution_options(**{WRITE_OPTION: True, TOUCHES_OPTION: touches})
            with connection.begin():
                tx = Transaction(connection)
                yield tx
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
        """Take or prolong the right to do something alone.

        Args:
            name: of the right.
            holder: who asks; asking again prolongs.
            seconds: how long it holds, counted from now.
        Returns:
            True if `holder` has it now, False if somebody else does.
        """
        now = utc_now()
        expires_at = now + timedelta(seconds=seconds)
        with self.begin() as tx:
            current = tx.get(Lease, name)
            if current is None:
                tx.add(Lease(name=name, holder=holder, expires_at=expires_at))
                return True
            if current.holder != holder and current.expires_at > now:
                return False
            tx.update(Lease, name, holder=holder, expires_at=expires_at)
            return True

    def release(self, name: str, holder: str) -> None:
        """Give a right back; one that `holder` does not have is left alone."""
        with self.begin() as tx:
            current = tx.get(Lease, name)
            if current is not None and current.holder == holder:
                tx.update(Lease, name, expires_at=utc_now())

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def open_ledger(
    url: str | sa.URL,
    *,
    durability: Literal["normal", "full"] = "normal",
    busy_timeout_s: float = 30.0,
    audit_head: Path | None = None,
) -> Ledger:
    """Open a ledger and bring its schema up to date.

    Args:
        url: a SQLAlchemy URL, SQLite or PostgreSQL.
        durability: SQLite's synchronous mode.
        busy_timeout_s: how long a writer waits for another, seconds.
        audit_head: the file outside the database that keeps the head of the audit chain.
    Returns:
        The open ledger.
    Raises:
        ConfigError: the URL cannot work, or the schema is newer than this program.
        UnavailableError: the database does not answer.
    """
    engine = make_engine(url, durability=durability, busy_timeout_s=busy_timeout_s)
    shown = engine.url.render_as_string(hide_password=True)
    try:
        with reachable(shown):
            upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return Ledger(url=shown, engine=engine, audit_head=audit_head)


@contextmanager
def reachable(url: str) -> Generator[None]:
    """Turn the driver's errors of a database that does not answer into UnavailableError.

    Args:
        url: of the ledger, without its password.
    Yields:
        Nothing.
    Raises:
        UnavailableError: the database does not answer.
    """
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
        reason = getattr(error, "orig", None) or error
        raise UnavailableError(f"ledger {url} does not answer: {' '.join(str(reason).split())}") from error


def _column(record_type: type[Record], name: str) -> sa.Column[Any]:
    if name not in record_type.model_fields:
        raise ContractError(f"{record_type.__name__} has no field {name!r}")
    return TABLES[record_type].c[name]
