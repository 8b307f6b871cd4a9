from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from records.ledger.tables import LEDGER_TYPES
from records.types import LABEL_RANK, Confirmation, Cursor, Image, Prediction, Record, ReviewItem


def _subclasses(base: type[Record]) -> set[type[Record]]:
    return {*base.__subclasses__(), *(s for c in base.__subclasses__() for s in _subclasses(c))}


def test_every_record_type_but_the_manifest_is_in_the_ledger() -> None:
    assert {t.__name__ for t in _subclasses(Record) if t.__module__.startswith("records.")} - {
        t.__name__ for t in LEDGER_TYPES
    } == {"ManifestRow"}
    assert len(LEDGER_TYPES) == 23


@pytest.mark.parametrize("record_type", LEDGER_TYPES, ids=lambda t: t.__name__)
def test_class_variables_name_fields(record_type: type[Record]) -> None:
    named = {record_type.key, *record_type.mutable, *(n for names in record_type.indexed for n in names)}
    named |= {n for names in record_type.unique for n in names}
    assert named <= set(record_type.model_fields)
    assert record_type.key not in record_type.mutable


def test_every_confirmation_has_a_rank_and_histopathology_is_strongest() -> None:
    assert set(LABEL_RANK) == set(Confirmation)
    assert min(LABEL_RANK, key=lambda c: LABEL_RANK[c]) == Confirmation.HISTOPATHOLOGY
    assert max(LABEL_RANK, key=lambda c: LABEL_RANK[c]) == Confirmation.FLAG


def test_records_are_frozen_and_closed(sample: Callable[..., Any]) -> None:
    cursor = sample(Cursor)
    with pytest.raises(ValidationError, match="frozen"):
        cursor.name = "other"
    with pytest.raises(ValidationError, match="Extra inputs"):
        Cursor(name="x", position={}, more=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(sample: Callable[..., Any], value: float) -> None:
    for record_type, field in (
        (ReviewItem, "priority"),
        (Prediction, "out_of_distribution_score"),
        (Image, "age_years"),
    ):
        with pytest.raises(ValidationError, match=field):
            sample(record_type, **{field: value})


def test_times_without_a_zone_are_refused(sample: Callable[..., Any]) -> None:
    naive = sample(Image).created_at.replace(tzinfo=None)
    with pytest.raises(ValidationError, match="created_at"):
        sample(Image, created_at=naive)
