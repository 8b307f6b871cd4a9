"""Tasks and annotations as Label Studio tells them, without the images."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx


@dataclass(frozen=True)
class ProjectRow:
    """A project.

    Args:
        id: of the project.
        description: holds the marker of the store that made it.
        label_config: XML of its labeling page, without white space around it.
    """

    id: int
    description: str
    label_config: str


@dataclass(frozen=True)
class AnnotationRow:
    """An annotation as Label Studio has it.

    Args:
        id: of the annotation.
        result: its regions, one per control that was used.
        completed_by: user id of the reader.
        was_cancelled: true if the reader skipped the task.
        updated_at: of the last edit.
        lead_time_s: how long the reader had the task open, seconds.
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
        id: of the task.
        meta: what the import put beside the data.
        updated_at: moves with every change of the task or its annotations.
        annotations: empty unless they were asked for.
    """

    id: int
    meta: Mapping[str, Any]
    updated_at: datetime
    annotations: tuple[AnnotationRow, ...] = ()


@dataclass(frozen=True)
class ProjectState:
    """What one cheap request says about a project; equal twice in a row means nothing happened.

    Args:
        total: number of tasks.
        total_annotations: number of annotations that are not skips.
        newest_update: of any task; None if there is none.
    """

    total: int
    total_annotations: int
    newest_update: datetime | None


def time_of(text: str) -> datetime:
    """Return the time of a text such as 2026-01-31T12:00:00.000000Z."""
    return datetime.fromisoformat(text)


def task_row(task: Mapping[str, Any]) -> TaskRow:
    """Return the row of a task from the server's JSON; a KeyError means that it is not one."""
    return TaskRow(
        id=int(task["id"]),
        meta=task["meta"] if isinstance(task["meta"], dict) else {},
        updated_at=time_of(task["updated_at"]),
        annotations=tuple(_annotation_row(row) for row in task.get("annotations") or ()),
    )


def _annotation_row(row: Mapping[str, Any]) -> AnnotationRow:
    return AnnotationRow(
        id=int(row["id"]),
        result=list(row["result"] or ()),
        completed_by=row["completed_by"],
        was_cancelled=bool(row["was_cancelled"]),
        updated_at=time_of(row["updated_at"]),
        lead_time_s=row["lead_time"],
    )


def known_id(value: int | None) -> int:
    """Return an id that the server must have given; KeyError if it did not."""
    if value is None:
        raise KeyError("id")
    return value


def body_of(response: httpx.Response) -> Any:
    """Return what a response says, parsed if it is JSON."""
    try:
        return response.json()
    except ValueError:
        return response.text


def filter_by(field: str, operator: str, kind: str, value: Any) -> dict[str, Any]:
    """Return a condition on tasks as the server's lists take it."""
    return {"filter": f"filter:tasks:{field}", "operator": operator, "type": kind, "value": value}
