"""SQL tables, derived from the record types.

A test compares the migrations with these tables, so a record type that changes without a migration fails the build.
"""

import json
from collections.abc import Collection
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, get_origin

import sqlalchemy as sa
from pydantic import AwareDatetime
from sqlalchemy.sql import operators

from records.errors import ContractError, DataError
from records.types import (
    Annotation,
    ApiKey,
    AuditEvent,
    Cursor,
    DatasetChange,
    DatasetRecord,
    EventRecord,
    Flag,
    Group,
    Image,
    Incident,
    IncidentPrediction,
    LabelValueRecord,
    Lease,
    ModelRecord,
    Outcome,
    Prediction,
    Quarantined,
    Record,
    ReviewItem,
    Rollout,
    RoundRecord,
    RoundStep,
    SourceLabel,
)
from records.types.base import field_type, storable

LEDGER_TYPES: tuple[type[Record], ...] = (
    Image, Group, SourceLabel, Quarantined, Prediction, ReviewItem, Flag, Outcome, Annotation,
    DatasetRecord, DatasetChange, ModelRecord, RoundRecord, RoundStep, Lease, Cursor, AuditEvent, EventRecord,
    ApiKey, Rollout, Incident, IncidentPrediction, LabelValueRecord,
)  # fmt: skip


class UtcTime(sa.types.TypeDecorator[datetime]):
    """A timestamp that comes back aware and in UTC from both databases; SQLite alone would lose the zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Convert a time to UTC before it is stored."""
        if value is None:
            return None
        try:
            value = value.astimezone(UTC)
        except OverflowError as error:
            raise DataError(
                f"{value.isoformat()} lies outside the years 1 to 9999 in UTC; give another time"
            ) from error
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Attach UTC to a stored time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class PlainText(sa.types.TypeDecorator[str]):
    """Text that both databases can hold: SQLite would take U+0000, on which PostgreSQL fails a whole statement."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        """Refuse what cannot be stored, in rows and in conditions."""
        try:
            return value if value is None else storable(value)
        except ValueError as error:
            raise DataError(str(error)) from error


def _column_type(annotation: Any) -> sa.types.TypeEngine[Any]:
    plain, _ = field_type(annotation)
    if plain is AwareDatetime:
        return UtcTime()
    simple: dict[Any, sa.types.TypeEngine[Any]] = {
        str: PlainText(),
        int: sa.BigInteger(),
        float: sa.Double(),
        bool: sa.Boolean(),
    }
    if plain in simple:
        return simple[plain]
    # Text, not a database enum, which would need a migration for every new value.
    if isinstance(plain, type) and issubclass(plain, StrEnum):
        return sa.Text()
    # none_as_null: None becomes SQL NULL, so `IS NULL` finds it; JSON null would be a value.
    if get_origin(plain) in (list, dict):
        return sa.JSON(none_as_null=True)
    raise ContractError(f"no column type for {annotation!r}")


def _table(record_type: type[Record], metadata: sa.MetaData) -> sa.Table:
    columns = [
        sa.Column(
            name,
            _column_type(info.annotation),
            primary_key=name == record_type.key,
            nullable=field_type(info.annotation)[1],
            # Keys are chosen by the program; PostgreSQL would otherwise make an integer key a sequence.
            autoincrement=False,
        )
        for name, info in record_type.model_fields.items()
    ]
    indexes = [sa.Index(f"ix_{record_type.table}_{'_'.join(names)}", *names) for names in record_type.indexed]
    uniques = [
        sa.Index(f"ux_{record_type.table}_{'_'.join(names)}", *names, unique=True) for names in record_type.unique
    ]
    return sa.Table(record_type.table, metadata, *columns, *indexes, *uniques)


def any_of(column: sa.ColumnElement[Any], values: Collection[Any], dialect: sa.Dialect) -> sa.ColumnElement[bool]:
    """Return the condition that a column of texts or integers has one of many values.

    The values are sent as one bound parameter (JSON text or an array): databases accept only 32,766 (SQLite) or
    65,535 (PostgreSQL) parameters in a statement.
    """
    plain = [value.value if isinstance(value, StrEnum) else value for value in values]
    if dialect.name == "sqlite":
        return column.in_(sa.select(sa.func.json_each(json.dumps(plain)).table_valued("value").c.value))
    return column == sa.any_(sa.literal(plain, sa.ARRAY(column.type)))


def unindexed(column: sa.ColumnElement[Any], dialect: sa.Dialect) -> sa.ColumnElement[Any]:
    """Return a column whose condition leaves the choice of an index to the other conditions.

    SQLite has no statistics here and takes a state for as selective as an id: the open items of ten images were found
    by reading all open items. A unary plus excludes the column's indexes. PostgreSQL has statistics.
    """
    if dialect.name != "sqlite":
        return column
    return sa.UnaryExpression(column, operator=operators.custom_op("+"), type_=column.type)


SCHEMA_FLOOR = sa.Table("schema_floor", sa.MetaData(), sa.Column("oldest", sa.Text, primary_key=True))
"""One row: the oldest schema version whose program may use this ledger. It is not a record type, so backups lack it."""
CONSENSUS = sa.Table(
    "consensus",
    sa.MetaData(),
    sa.Column("image_id", sa.Text, primary_key=True),
    sa.Column("stale", sa.Boolean, nullable=False, index=True),
    sa.Column("resolved", sa.JSON(none_as_null=True), nullable=True),
)
"""What the annotations of each image come to, as JSON of a `ResolvedLabel`. It follows from other tables, so backups
lack it. Triggers mark a row `stale` and empty it when an annotation of its image is added, changed, deleted or erased.
"""
METADATA = sa.MetaData()
TABLES: dict[type[Record], sa.Table] = {record_type: _table(record_type, METADATA) for record_type in LEDGER_TYPES}
