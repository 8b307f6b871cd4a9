"""Arrow schemas derived from the record types, and records as Arrow tables and back."""

import json
from collections.abc import Sequence
from enum import StrEnum
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin

import pandas as pd
import pyarrow as pa
from pydantic import AwareDatetime

from records.errors import ContractError
from records.types import Record
from records.types.base import field_type

R = TypeVar("R", bound=Record)

_SCALARS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    AwareDatetime: pa.timestamp("us", tz="UTC"),
}


def arrow_type(annotation: Any) -> pa.DataType:
    """Return the Arrow type of a field's annotation.

    It may be str, int, float, bool, a timestamp, a StrEnum, list[...] or dict[str, ...]; a dict whose values differ in
    type is kept as JSON text. Any other annotation raises ContractError.
    """
    plain, _ = field_type(annotation)
    if plain in _SCALARS:
        return _SCALARS[plain]
    if isinstance(plain, type) and issubclass(plain, StrEnum):
        return pa.string()
    origin, arguments = get_origin(plain), get_args(plain)
    if origin is Literal:
        return pa.string()
    if origin is list:
        return pa.list_(arrow_type(arguments[0]))
    if origin is dict:
        value, _ = field_type(arguments[1])
        # An Arrow map has one value type, and keeps the order of its keys, which for probabilities is class order.
        return pa.map_(pa.string(), arrow_type(value)) if value in _SCALARS else pa.string()
    raise ContractError(f"no arrow type for {annotation!r}")


@cache
def arrow_schema(record_type: type[Record]) -> pa.Schema:
    """Return the Arrow schema of a record type: its fields in declared order, nullable where the field is optional."""
    return pa.schema(
        [
            pa.field(name, arrow_type(info.annotation), nullable=field_type(info.annotation)[1])
            for name, info in record_type.model_fields.items()
        ]
    )


def to_arrow(record_type: type[Record], frame: pd.DataFrame | Sequence[Record]) -> pa.Table:
    """Return records as an Arrow table in the record's schema.

    Args:
        record_type: the type of every row.
        frame: a frame with the record's columns, or the records themselves.
    Returns:
        The table.
    Raises:
        ContractError: a column is missing, does not fit the schema, or is empty although the field is required.
    """
    schema = arrow_schema(record_type)
    try:
        if isinstance(frame, pd.DataFrame):
            # Checked against the schema here, so a manifest with a wrong column is never written.
            return pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
        return pa.Table.from_pylist([_plain_row(record) for record in frame], schema=schema)
    except (KeyError, ValueError, pa.ArrowTypeError) as error:
        raise ContractError(f"rows do not fit the schema of {record_type.__name__}: {error}") from error


def from_arrow(record_type: type[R], table: pa.Table) -> list[R]:
    """Return the validated records of an Arrow table, in its order; the inverse of `to_arrow`."""
    rows = table.to_pylist(maps_as_pydicts="strict")
    for name in _json_fields(record_type):
        for row in rows:
            row[name] = json.loads(row[name])
    return [record_type.model_validate(row) for row in rows]


@cache
def _json_fields(record_type: type[Record]) -> tuple[str, ...]:
    """Return the names of the fields that are JSON text in Arrow."""
    return tuple(
        name
        for name, info in record_type.model_fields.items()
        if get_origin(field_type(info.annotation)[0]) is dict and pa.types.is_string(arrow_type(info.annotation))
    )


def _plain_row(record: Record) -> dict[str, Any]:
    row = record.model_dump(mode="python")
    return row | {name: json.dumps(row[name], allow_nan=False) for name in _json_fields(type(record))}
