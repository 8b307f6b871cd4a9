from datetime import UTC, datetime, timedelta, timezone

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from records.ledger.tables import LEDGER_TYPES, TABLES, UtcTime, any_of
from records.types import Image, Prediction


def test_every_field_is_a_column_and_keys_are_primary() -> None:
    for record_type in LEDGER_TYPES:
        table = TABLES[record_type]
        assert [c.name for c in table.columns] == list(record_type.model_fields)
        assert [c.name for c in table.primary_key] == [record_type.key]


def test_columns_are_nullable_where_the_record_may_be_empty() -> None:
    columns = TABLES[Prediction].c
    assert columns.label.nullable
    assert not columns.decision.nullable
    assert not columns.reasons.nullable


def test_times_keep_their_instant() -> None:
    there = datetime(2026, 5, 1, 14, tzinfo=timezone(timedelta(hours=2)))
    column = UtcTime()
    for dialect in (sqlite.dialect(), postgresql.dialect()):
        bound = column.process_bind_param(there, dialect)
        assert bound is not None
        back = column.process_result_value(bound, dialect)
        assert back == there
        assert back is not None
        assert back.tzinfo is UTC
        assert column.process_bind_param(None, dialect) is None


def test_many_values_are_one_bound_value() -> None:
    for dialect in (sqlite.dialect(), postgresql.dialect()):
        condition = any_of(TABLES[Image].c.id, [str(n) for n in range(100_000)], dialect)
        compiled = sa.select(TABLES[Image].c.id).where(condition).compile(dialect=dialect)
        assert len(compiled.params) == 1
