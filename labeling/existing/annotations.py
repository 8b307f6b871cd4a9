"""The annotations of a project that somebody else made, as rows of the ledger: one per revision, each its annotator's.

An imported annotation has a review item, as every annotation has. It names no project and no task, because the tasks
are somebody else's: no sync updates or deletes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labeling.existing.page import LabelPage
from labeling.pull import revision_of
from labeling.rows import TaskRow
from records.ids import hash_of, new_id, utc_now
from records.ledger import Transaction
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import Annotation, Image, ReviewItem, ReviewState
from records.types.base import LINE

NOBODY = "unknown"
"""Annotator of the annotations that have none."""
_WRITTEN_AT_ONCE = 200


@dataclass
class ForeignTask:
    """A task as it is imported.

    Args:
        row: as Label Studio lists it, without its image.
        name: of its image, unique in a Label Studio.
        path: of its image, fetched; None if there is none.
        image_id: empty if it cannot be stored.
        problem: why there is no image.
        said: its submitted annotations.
        skips: how many of its annotations are skips.
        was_kept: whether an interrupted run had fetched its image.
    """

    row: TaskRow
    name: str
    path: Path | None = None
    image_id: str = ""
    problem: str | None = None
    said: list[Annotation] = field(default_factory=list)
    skips: int = 0
    was_kept: bool = False


def read_annotations(
    task: ForeignTask, page: LabelPage, taxonomy: Taxonomy, names: Mapping[int, str], server: str, project_id: int
) -> None:
    """Put the submitted annotations of a task into it; skips are counted, drafts are not listed.

    Args:
        task: whose image was looked for.
        page: parses the annotations.
        taxonomy: has the classes.
        names: of the users, by id.
        server: name under which annotations of this Label Studio are stored.
        project_id: of the task.
    """
    if task.row.fault is not None:
        task.problem, task.path = f"task {task.row.id} is not taken: {task.row.fault}", None
    now = utc_now()
    # Somebody who saw a prediction tends to agree with it, whoever's prediction it was.
    blind = not page.shows_model and task.row.predictions == 0
    for one in task.row.annotations:
        if one.was_cancelled:
            task.skips += 1
            continue
        parsed = page.parse(one.result, taxonomy)
        known = names.get(one.completed_by or 0)
        annotator = NOBODY if one.completed_by is None else LINE.keep(known or f"user {one.completed_by}")
        task.said.append(
            Annotation(
                id=new_id(),
                created_at=now,
                review_item_id=hash_of(["imported", server, project_id, task.row.id, task.image_id])[:32],
                image_id=task.image_id,
                kind=parsed.kind,
                label=parsed.label,
                other_text=parsed.other_text,
                annotator=annotator,
                annotated_at=one.updated_at,
                lead_time_s=one.lead_time_s,
                blind=blind,
                server=server,
                project_id=project_id,
                task_id=task.row.id,
                annotation_id=one.id,
                revision=revision_of(one),
            )
        )


def without_own(store: Store, rows: Sequence[TaskRow]) -> list[TaskRow]:
    """Return the tasks that this store did not send there itself; those are read by `relook label pull`."""
    sent = {str(row.meta["relook_item"]) for row in rows if "relook_item" in row.meta}
    with store.ledger.read() as tx:
        known = {item.id for item in tx.find(ReviewItem, where={"id": sent})} if sent else set()
    return [row for row in rows if row.meta.get("relook_item") not in known]


def write_annotations(store: Store, server: str, project_id: int, tasks: Sequence[ForeignTask]) -> tuple[int, int]:
    """Write what is new of the annotations of images that were imported.

    Args:
        store: has the images.
        server: see `read_annotations`.
        project_id: of the tasks.
        tasks: all tasks of the project.
    Returns:
        The number of rows for new and edited annotations, and of tombstones for those that are gone.
    """
    added = deleted = 0
    usable = [task for task in tasks if task.image_id and task.row.fault is None]
    for start in range(0, len(usable), _WRITTEN_AT_ONCE):
        part = usable[start : start + _WRITTEN_AT_ONCE]
        with store.ledger.begin() as tx:
            images = tx.find(Image, where={"id": {task.image_id for task in part}})
            # An image that was refused or erased leaves nothing about it.
            there = {image.id for image in images if image.erased_at is None}
            counts = _write(tx, server, project_id, [task for task in part if task.image_id in there])
        added, deleted = added + counts[0], deleted + counts[1]
    return added, deleted


def _write(tx: Transaction, server: str, project_id: int, tasks: Sequence[ForeignTask]) -> tuple[int, int]:
    where = {"server": server, "project_id": project_id, "task_id": {task.row.id for task in tasks}}
    rows: dict[int, dict[int, list[Annotation]]] = {}
    for row in tx.find(Annotation, where=where, order_by=("created_at", "id")):
        rows.setdefault(row.task_id, {}).setdefault(row.annotation_id, []).append(row)
    now, fresh, gone = tx.now_after(Annotation), list[Annotation](), list[Annotation]()
    for task in tasks:
        known = rows.get(task.row.id, {})
        for one in task.said:
            before = known.get(one.annotation_id, [])
            if not before or _content(before[-1]) != _content(one):
                fresh.append(_following(one, before).model_copy(update={"created_at": now}))
        present = {one.annotation_id for one in task.said}
        for annotation_id, before in known.items():
            last = before[-1]
            if not last.deleted and annotation_id not in present:
                changes = {"id": new_id(), "created_at": now, "annotated_at": now, "deleted": True}
                gone.append(last.model_copy(update={**changes, "revision": hash_of(["deleted", last.revision])}))
    items = {one.review_item_id: one for one in fresh}
    for item in tx.find(ReviewItem, where={"id": set(items)}):
        del items[item.id]
    tx.add(*(_item(one) for one in items.values()))
    tx.add(*fresh, *gone)
    return len(fresh), len(gone)


def _content(row: Annotation) -> tuple[object, ...]:
    """Return what makes a further row necessary: an edit there, or another meaning of the same choice here."""
    return row.annotated_at, row.kind, row.label, row.other_text, row.image_id, row.deleted


def _following(row: Annotation, before: Sequence[Annotation]) -> Annotation:
    """Return a row whose revision no earlier row of its annotation has, which `--labels` back and forth would give."""
    return row.model_copy(update={"revision": hash_of([before[-1].revision, row.revision])}) if before else row


def _item(about: Annotation) -> ReviewItem:
    return ReviewItem(
        id=about.review_item_id,
        created_at=about.created_at,
        image_id=about.image_id,
        reasons=[],
        priority=0.0,
        blind=True,
        state=ReviewState.ANSWERED,
        answered_at=about.created_at,
    )
