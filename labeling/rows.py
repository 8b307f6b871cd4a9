"""Projects, tasks and annotations as Label Studio's API returns them, without the images of the tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from records.parts import attempt
from records.types.base import moment

_LONGEST_S = 1e9


@dataclass(frozen=True)
class ProjectRow:
    """A project: `description` holds the marker of its store, `label_config` is stripped XML."""

    id: int
    description: str
    label_config: str


@dataclass(frozen=True)
class AnnotationRow:
    """An annotation.

    Args:
        id: unique in a Label Studio.
        result: its regions, one per control that was used.
        completed_by: user id of the annotator.
        was_cancelled: true if the annotator skipped the task.
        updated_at: of the last edit.
        lead_time_s: how long the annotator had the task open, seconds.
    """

    id: int
    result: list[dict[str, Any]]
    completed_by: int | None
    was_cancelled: bool
    updated_at: datetime
    lead_time_s: float | None


@dataclass(frozen=True)
class TaskRow:
    """A task without its images.

    Args:
        id: unique in a Label Studio, larger for later imports.
        meta: what the import stored beside the data.
        updated_at: moves with every change of the task or its annotations.
        annotations: empty unless they were requested.
        fault: why its annotations cannot be read, one sentence.
        data: what the task shows; empty unless it was requested.
        predictions: how many predictions it has; 0 unless it was requested.
    """

    id: int
    meta: Mapping[str, Any]
    updated_at: datetime
    annotations: tuple[AnnotationRow, ...] = ()
    fault: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)
    predictions: int = 0

    @property
    def is_touched(self) -> bool:
        """Whether somebody annotated or skipped it, as far as that can be read."""
        return bool(self.annotations) or self.fault is not None


@dataclass(frozen=True)
class ProjectState:
    """What one small request says about a project; two equal states in a row mean that nothing changed.

    Args:
        total: number of tasks.
        total_annotations: number of annotations that are not skips.
        newest_update: of any task; None if there is none.
    """

    total: int
    total_annotations: int
    newest_update: datetime | None


def task_row(task: Mapping[str, Any]) -> TaskRow:
    """Return the row of a task from the server's JSON; a KeyError means that it is not a task."""
    meta = task["meta"] if isinstance(task["meta"], dict) else {}
    data = task["data"] if isinstance(task.get("data"), dict) else {}
    row = TaskRow(
        int(task["id"]), meta, datetime.fromisoformat(task["updated_at"]), data=data,
        predictions=int(task.get("total_predictions") or 0),
    )  # fmt: skip
    # Any program with an annotator's token can write annotations, and one of them must not end the whole listing.
    read = attempt(lambda found: tuple(map(_annotation_row, found)), task.get("annotations") or ())
    if isinstance(read, Exception):
        return replace(row, fault=f"an annotation cannot be read ({type(read).__name__}: {read})")
    return replace(row, annotations=read)


def filter_by(field: str, operator: str, kind: str, value: Any) -> dict[str, Any]:
    """Return a condition on tasks in the format of the Data Manager's `filters`."""
    return {"filter": f"filter:tasks:{field}", "operator": operator, "type": kind, "value": value}


def _annotation_row(row: Mapping[str, Any]) -> AnnotationRow:
    return AnnotationRow(
        id=int(row["id"]),
        result=[region for region in row["result"] or () if isinstance(region, dict)],
        completed_by=None if row["completed_by"] is None else int(row["completed_by"]),
        was_cancelled=bool(row["was_cancelled"]),
        updated_at=moment(datetime.fromisoformat(row["updated_at"])),
        lead_time_s=_seconds(row["lead_time"]),
    )


def _seconds(value: Any) -> float | None:
    """Return a time that the annotator's browser measured, or None if it is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < _LONGEST_S else None
