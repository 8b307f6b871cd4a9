"""The ledger's one way in: transactions over records.

    with ledger.begin() as tx:      # writes: all of it or none of it
        tx.add(prediction, review_item)
    with ledger.read() as tx:       # reads: one consistent view
        tx.find(ReviewItem, where={"state": ReviewState.NEW}, order_by=("-priority",))

Rows are added, never replaced; only the fields that a record type names as mutable can change.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import sqlalchemy as sa

from records.errors import ContractError, RefusedError, UnavailableError, UnknownIdError
from records.ids import utc_now
from records.ledger.engine import WRITE_OPTION, make_engine
from records.ledger.migrate import upgrade
from records.ledger.tables import TABLES
from records.types import Lease, Record

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Transaction:
    """One transaction, typed by records.

    Args:
        connection: the SQLAlchemy connection, for the rare query that records cannot express.
    """

    connection: sa.Connection

    def add(self, *records: Record) -> None:
        """Insert records.

        Args:
            records: any mix of types; rows of one type go in together.
        Raises:
            RefusedError: a key or unique value exists already; nothing is ever overwritten.
        """
        by_type: dict[type[Record], list[dict[str, Any]]] = {}
        for record in records:
            by_type.setdefault(type(record), []).append(record.model_dump(mode="python"))
        for record_type, rows in by_type.items():
            try:
                self.connection.execute(sa.insert(TABLES[record_type]), rows)
            except sa.exc.IntegrityError as error:
                raise RefusedError(f"{record_type.__name__} exists already: {error.orig}") from error

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
        query = sa.select(table).where(*_conditions(record_type, where or {}))
        for name in order_by:
            column = _column(record_type, name.removeprefix("-"))
            query = query.order_by(column.desc() if name.startswith("-") else column.asc())
        if limit is not None:
            query = query.limit(limit)
        return [record_type.model_validate(dict(row)) for row in self.connection.execute(query).mappings()]

    def count(self, record_type: type[Record], where: Mapping[str, Any] | None = None) -> int:
        """Return how many records match; see `find` for `where`."""
        query = sa.select(sa.func.count()).select_from(TABLES[record_type])
        return int(self.connection.execute(query.where(*_conditions(record_type, where or {}))).scalar_one())

    def update(self, record_type: type[Record], key: str | int, **changes: Any) -> None:
        """Change mutable fields of one record.

        Args:
            record_type: its type.
            key: the value of its key field.
            changes: new values, mutable fields only.
        Raises:
            ContractError: a field is not mutable.
            UnknownIdError: there is no such record.
        """
        forbidden = sorted(set(changes) - record_type.mutable)
        if forbidden:
            raise ContractError(f"{record_type.__name__}.{forbidden[0]} never changes after it was written")
        table = TABLES[record_type]
        result = self.connection.execute(
            sa.update(table).where(_column(record_type, record_type.key) == key).values(**changes)
        )
        if result.rowcount != 1:
            raise UnknownIdError(f"no {record_type.__name__} has the id {key!r}")


@dataclass(frozen=True)
class Ledger:
    """An open ledger. Safe to use from several threads; see `open_ledger`.

    Args:
        url: where it is, without its password.
        engine: the SQLAlchemy engine.
    """

    url: str
    engine: sa.Engine = field(repr=False)

    @contextmanager
    def begin(self) -> Generator[Transaction]:
        """Open a write transaction; it commits at the end of the block and rolls back on an error."""
        with _reachable(self.url), self.engine.connect() as connection:
            connection = connection.execution_options(**{WRITE_OPTION: True})
            with connection.begin():
                yield Transaction(connection)

    @contextmanager
    def read(self) -> Generator[Transaction]:
        """Open a read transaction: one consistent view, no lock held against writers."""
        with _reachable(self.url), self.engine.connect() as connection, connection.begin():
            yield Transaction(connection)

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


def open_ledger(url: str, *, durability: Literal["normal", "full"] = "normal", busy_timeout_s: float = 30.0) -> Ledger:
    """Open a ledger and bring its schema up to date.

    Args:
        url: a SQLAlchemy URL, SQLite or PostgreSQL.
        durability: SQLite's synchronous mode.
        busy_timeout_s: how long a writer waits for another, seconds.
    Returns:
        The open ledger.
    Raises:
        ConfigError: the URL cannot work, or the schema is newer than this program.
        UnavailableError: the database does not answer.
    """
    engine = make_engine(url, durability=durability, busy_timeout_s=busy_timeout_s)
    shown = engine.url.render_as_string(hide_password=True)
    with _reachable(shown):
        upgrade(engine)
    return Ledger(url=shown, engine=engine)


@contextmanager
def _reachable(url: str) -> Generator[None]:
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
        raise UnavailableError(f"ledger {url} does not answer: {' '.join(str(error.orig).split())}") from error


def _column(record_type: type[Record], name: str) -> sa.Column[Any]:
    if name not in record_type.model_fields:
        raise ContractError(f"{record_type.__name__} has no field {name!r}")
    return TABLES[record_type].c[name]


def _conditions(record_type: type[Record], where: Mapping[str, Any]) -> Iterable[sa.ColumnElement[bool]]:
    for name, value in where.items():
        column = _column(record_type, name)
        if value is None:
            yield column.is_(None)
        elif isinstance(value, (list, tuple, set, frozenset)):
            yield column.in_(list(value))
        else:
            yield column == value
