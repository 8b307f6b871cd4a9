"""Questions out: review items become tasks, the most urgent first, each exactly once.

A task carries its item's key. Before anything is imported, tasks that are newer than the ledger
knows of are looked at: those that a killed or cut-off push left behind are adopted instead of being
imported again. Nothing is lost while Label Studio is down; the items wait in the ledger.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from labeling.client import LabelStudioClient
from labeling.project import LEASE, LEASE_WAIT_S, Project, open_project
from labeling.rows import TaskRow
from labeling.settings import LabelingSettings
from labeling.tasks import task_document
from records.errors import DataError, UnknownIdError
from records.ids import utc_now
from records.lease import hold
from records.ledger import Transaction
from records.store import Store
from records.stored import read_picture
from records.types import Image, Prediction, ReviewItem, ReviewState

Advance = Callable[[int, int], None]
"""Called with (done, total) after each batch."""

_ENCODERS = 2


class PushReport(BaseModel):
    """What one push did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project_id: int | None = Field(default=None, description="empty if nothing waited")
    pushed: int = Field(default=0, ge=0, description="tasks that were imported")
    adopted: int = Field(default=0, ge=0, description="tasks that an earlier, killed push had imported")
    doubled: int = Field(default=0, ge=0, description="second tasks of an item that were removed")
    requeued: int = Field(default=0, ge=0, description="questions asked again, since their project was deleted")
    withdrawn: int = Field(default=0, ge=0, description="questions about pictures that were erased meanwhile")
    unreadable: list[str] = Field(default_factory=list, description="one sentence per item that could not be sent")


def push(
    store: Store,
    client: LabelStudioClient,
    settings: LabelingSettings,
    model_id: str | None = None,
    *,
    advance: Advance = lambda done, total: None,
) -> PushReport:
    """Send all review items that wait to Label Studio.

    Args:
        store: with the outbox, the pictures and the overlays.
        client: connected.
        settings: batch size and picture size.
        model_id: of the model that answers now; goes into the meta data of items without a prediction.
        advance: hears how far it is.
    Returns:
        What was done. A second push adds nothing, and asks nothing if no item waits.
    Raises:
        LabelStudioError: Label Studio does not answer or refuses; what was pushed so far is recorded.
        RefusedError: another process keeps pushing or pulling for over a minute.
    """
    with store.ledger.read() as tx:
        if tx.count(ReviewItem, where={"state": ReviewState.NEW}) == 0:
            return PushReport()
    with hold(store.ledger, LEASE, wait_s=LEASE_WAIT_S):
        return _push(store, client, settings, model_id, advance)


def _push(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, model_id: str | None, advance: Advance
) -> PushReport:
    project = open_project(store, client, settings)
    adopted, doubled = adopt(store, client, project)
    with store.ledger.read() as tx:
        waiting = tx.find(ReviewItem, where={"state": ReviewState.NEW}, order_by=("-priority", "id"))
    pushed, withdrawn = 0, 0
    unreadable: list[str] = []
    for start in range(0, len(waiting), settings.push_batch):
        batch = _prepare(store, waiting[start : start + settings.push_batch], project, settings, model_id)
        task_ids = client.import_tasks(project.id, batch.documents) if batch.documents else []
        with store.ledger.begin() as tx:
            for item, task_id in zip(batch.items, task_ids, strict=True):
                _mark_pushed(tx, item.id, project.id, task_id)
            for item in batch.erased:
                tx.update(ReviewItem, item.id, state=ReviewState.WITHDRAWN)
        pushed += len(batch.items)
        withdrawn += len(batch.erased)
        unreadable.extend(batch.unreadable)
        advance(min(start + settings.push_batch, len(waiting)), len(waiting))
    return PushReport(
        project_id=project.id,
        pushed=pushed,
        adopted=adopted,
        doubled=doubled,
        requeued=project.requeued,
        withdrawn=withdrawn,
        unreadable=unreadable,
    )


def adopt(store: Store, client: LabelStudioClient, project: Project) -> tuple[int, int]:
    """Record tasks that were imported without the ledger hearing of it.

    Args:
        store: with the ledger.
        client: connected.
        project: of this store.
    Returns:
        How many tasks were adopted, and how many second tasks of an item were removed.
    Raises:
        LabelStudioError: Label Studio does not answer.
    """
    with store.ledger.read() as tx:
        newest = tx.find(ReviewItem, where={"project_id": project.id}, order_by=("-task_id",), limit=1)
    after_id = (newest[0].task_id or 0) if newest else 0
    adopted, doubled = 0, 0
    for page in client.list_tasks(project.id, after_id=after_id, with_annotations=True):
        ours = [row for row in page if str(row.meta.get("relook_key", "")).endswith(project.marker)]
        second: list[TaskRow] = []
        with store.ledger.begin() as tx:
            for row in ours:
                item = tx.get(ReviewItem, str(row.meta["relook_item"]))
                if item is not None and item.task_id is None and item.state == ReviewState.NEW:
                    _mark_pushed(tx, item.id, project.id, row.id)
                    adopted += 1
                elif item is not None and item.task_id != row.id and not row.annotations:
                    second.append(row)
        for row in second:
            client.delete_task(row.id)
        doubled += len(second)
    return adopted, doubled


def item_key(item_id: str, project: Project) -> str:
    """Return the idempotency key of an item's task: item and project."""
    return f"{item_id}{project.marker}"


def _mark_pushed(tx: Transaction, item_id: str, project_id: int, task_id: int) -> None:
    tx.update(
        ReviewItem, item_id, state=ReviewState.PUSHED, project_id=project_id, task_id=task_id, pushed_at=utc_now()
    )


@dataclass(frozen=True)
class _Batch:
    """Items sorted by what can be done with them; `documents` are the tasks of `items`."""

    items: list[ReviewItem]
    documents: list[dict[str, Any]]
    erased: list[ReviewItem]
    unreadable: list[str]


def _prepare(
    store: Store, waiting: Sequence[ReviewItem], project: Project, settings: LabelingSettings, model_id: str | None
) -> _Batch:
    with store.ledger.read() as tx:
        images = {i.id: i for i in tx.find(Image, where={"id": {item.image_id for item in waiting}})}
        asked = {item.prediction_id for item in waiting if item.prediction_id is not None}
        predictions = {p.id: p for p in tx.find(Prediction, where={"id": asked})}

    def document(item: ReviewItem) -> dict[str, Any] | str:
        image = images.get(item.image_id)
        prediction = predictions.get(item.prediction_id) if item.prediction_id is not None else None
        if image is None:
            return f"review item {item.id}: its picture {item.image_id[:12]} is not in the ledger"
        try:
            made = task_document(
                item,
                image,
                read_picture(store, image),
                store.blobs.get(item.overlay_blob) if item.overlay_blob is not None else None,
                prediction,
                taxonomy=store.taxonomy,
                settings=settings,
                key=item_key(item.id, project),
            )
        except (DataError, UnknownIdError) as error:
            return f"review item {item.id}: {error}"
        made["meta"]["relook_model"] = prediction.model_id if prediction is not None else model_id
        return made

    batch = _Batch([], [], [], [])
    erased = {image.id for image in images.values() if image.erased_at is not None}
    batch.erased.extend(item for item in waiting if item.image_id in erased)
    wanted = [item for item in waiting if item.image_id not in erased]
    with ThreadPoolExecutor(_ENCODERS) as pool:
        for item, made in zip(wanted, pool.map(document, wanted), strict=True):
            if isinstance(made, str):
                batch.unreadable.append(made)
            else:
                batch.items.append(item)
                batch.documents.append(made)
    return batch
