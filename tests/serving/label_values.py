"""What `relook labels value` keeps, with made-up figures that differ from each other."""

from typing import Any

from records.ids import new_id, utc_now
from records.types import LabelValueRecord


def figure(value: float, half: float) -> dict[str, float]:
    """Return a figure with its interval."""
    return {"value": value, "low": value - half, "high": value + half}


def measured_labels(last_round: dict[str, Any] | None = None) -> LabelValueRecord:
    """Return a record with a curve of five points and two classes."""
    curve = [
        [labels, figure(accuracy, 0.06)]
        for labels, accuracy in ((90, 0.42), (180, 0.49), (360, 0.55), (540, 0.58), (720, 0.6))
    ]
    mel = {"code": "mel", "labels": 81, "lesions_on_val": 30, "recall": figure(0.5, 0.1), "lacks_labels": True}
    df = {"code": "df", "labels": 9, "lesions_on_val": 0, "recall": dict.fromkeys(("value", "low", "high"))}
    figures = {
        "curve": curve,
        "gain_of_next": figure(0.012, 0.008),
        "checked": [figure(0.59, 0.03), 0.6],
        "classes": [{**mel, "gain_of_next": figure(0.02, 0.01)}, {**df, "gain_of_next": None, "lacks_labels": False}],
        "last_round": last_round,
    }
    return LabelValueRecord(
        id=new_id(), created_at=utc_now(), dataset_id="d" * 64, model_id="e" * 64, labels=720, figures=figures
    )


def round_value() -> dict[str, Any]:
    """Return what the annotations of a second round changed."""
    return {
        "number": 2, "new": 41, "changed": {"nv -> mel": 3}, "gain": figure(0.031, 0.02),
        "recall_gain": {"mel": figure(0.045, 0.03), "df": figure(0.0, 0.0)}, "set_right": 17, "set_wrong": 6,
    }  # fmt: skip
