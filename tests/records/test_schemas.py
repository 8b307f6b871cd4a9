from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from records.errors import ContractError
from records.ledger.tables import LEDGER_TYPES
from records.schemas import arrow_schema, arrow_type, from_arrow, to_arrow
from records.types import AuditEvent, ManifestRow, Prediction, Record
from records.types.base import field_type

ALL_TYPES = (*LEDGER_TYPES, ManifestRow)


def test_there_are_twenty_four_record_types() -> None:
    assert len(ALL_TYPES) == 24


@pytest.mark.parametrize("record_type", ALL_TYPES, ids=lambda t: t.__name__)
def test_records_come_back_from_parquet_as_they_were(
    record_type: type[Record], sample: Callable[..., Any], tmp_path: Path
) -> None:
    full = [sample(record_type, number) for number in range(3)]
    optional = {name: None for name, info in record_type.model_fields.items() if field_type(info.annotation)[1]}
    written = [*full, sample(record_type, 3, **optional)]
    pq.write_table(to_arrow(record_type, written), tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.schema.names == list(record_type.model_fields)
    assert from_arrow(record_type, table) == written


def test_class_order_of_probabilities_survives(sample: Callable[..., Any]) -> None:
    (back,) = from_arrow(Prediction, to_arrow(Prediction, [sample(Prediction)]))
    assert list(back.probabilities or {}) == ["b", "a"]


def test_nullable_exactly_where_the_record_may_be_empty() -> None:
    schema = arrow_schema(Prediction)
    assert schema.field("label").nullable
    assert not schema.field("decision").nullable
    assert schema.field("probabilities").type == pa.map_(pa.string(), pa.float64())
    assert schema.field("context").type == pa.string()


def test_a_frame_that_does_not_fit_is_refused(sample: Callable[..., Any]) -> None:
    frame = pd.DataFrame([sample(ManifestRow, n).model_dump() for n in range(2)])
    assert to_arrow(ManifestRow, frame).num_rows == 2
    with pytest.raises(ContractError, match="ManifestRow"):
        to_arrow(ManifestRow, frame.drop(columns="label"))
    with pytest.raises(ContractError, match="ManifestRow"):
        to_arrow(ManifestRow, frame.assign(label_rank="x"))
    with pytest.raises(ContractError, match="split"):
        to_arrow(ManifestRow, frame.assign(split=["train", None]))


def test_values_that_are_not_json_are_refused(sample: Callable[..., Any]) -> None:
    with pytest.raises(ContractError, match="JSON compliant"):
        to_arrow(AuditEvent, [sample(AuditEvent, details={"x": float("nan")})])


def test_a_type_without_an_arrow_type_is_named() -> None:
    with pytest.raises(ContractError, match="complex"):
        arrow_type(complex)
