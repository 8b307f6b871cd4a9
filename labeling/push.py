"""Questions out: review items become tasks, the most urgent first, each exactly once.

A task carries its item's key. Before anything is imported, tasks that are newer than the ledger
knows of are looked at: those that a killed or cut-off push left behind are adopted instead of being
imported again. Nothing is lost while Label Studio is down; the items wait in the ledger.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from labeling.client import LabelStudioClient
from labeling.project import LEASE, LEASE_WAIT_S, Project, ProjectKey, known_projects, open_project, project_key_of
from labeling.reads import content_hash, plan_reads, stale_items
from labeling.rows import TaskRow
from labeling.settings import LabelingSettings
from labeling.tasks import task_document
from records.errors import DataError, UnknownIdError
from records.ids import utc_now
from records.lease import hold
from records.ledger import Transaction
from records.store import Store, read_image
from records.types import Image, Prediction, ReviewItem, ReviewState

Advance = Callable[[int, int], None]
"""Called with (done, total) after each batch."""

_ENCODERS = 2
_REFRESHED_AT_ONCE = 4
_ADDED = ("pushed", "adopted", "refreshed", "blind", "doubled", "requeued", "withdrawn")


class PushReport(BaseModel):
    """What one push did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project_id: int | None = Field(default=None, description="of the shared project; empty if nothing waited for it")
    pushed: int = Field(default=0, ge=0, description="tasks that were imported")
    adopted: int = Field(default=0, ge=0, description="tasks that an earlier, killed push had imported")
    refreshed: int = Field(default=0, ge=0, description="tasks whose question had changed since they were sent")
    blind: int = Field(default=0, ge=0, description="tasks imported without the model's opinion")
    doubled: int = Field(default=0, ge=0, description="second tasks of an item that were removed")
    requeued: int = Field(default=0, ge=0, description="questions asked again, since their project was deleted")
    withdrawn: int = Field(default=0, ge=0, description="questions about images that were erased meanwhile")
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
        store: with the outbox, the images and the overlays.
        client: connected.
        settings: batch size and image size.
        model_id: of the model that answers now; goes into the meta data of items without a prediction.
        advance: hears how far it is.
    Returns:
        What was done. A second push adds nothing, and asks nothing if no item waits or changed.
    Raises:
        LabelStudioError: Label Studio does not answer or refuses; what was pushed so far is recorded.
        RefusedError: another process keeps pushing or pulling for over a minute.
    """
    with store.ledger.read() as tx:
        waits = tx.count(ReviewItem, where={"state": ReviewState.NEW}) > 0
    if not waits and not stale_items(store):
        return PushReport()
    with hold(store.ledger, LEASE, wait_s=LEASE_WAIT_S):
        return _push(store, client, settings, model_id, advance)


def _push(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, model_id: str | None, advance: Advance
) -> PushReport:
    plan_reads(store, settings)
    refreshed = _refresh(store, client, settings, model_id)
    with store.ledger.read() as tx:
        waiting = tx.find(ReviewItem, where={"state": ReviewState.NEW}, order_by=("-priority", "id"))
    by_project: dict[ProjectKey, list[ReviewItem]] = {}
    for item in waiting:
        by_project.setdefault(project_key_of(item), []).append(item)
    done, reports = 0, [PushReport(refreshed=refreshed)]
    for project_key in sorted(by_project, key=lambda project_key: (project_key.blind, project_key.reader or "")):
        told = partial(_advance, advance, done, len(waiting))
        reports.append(_Sending(store, client, settings, model_id, project_key, told).run())
        done += len(by_project[project_key])
    return _joined(reports)


def _advance(advance: Advance, before: int, total: int, done: int) -> None:
    advance(before + done, total)


def _joined(reports: Sequence[PushReport]) -> PushReport:
    numbers = {name: sum(getattr(r, name) for r in reports) for name in _ADDED}
    project_id = next((r.project_id for r in reports if r.project_id is not None), None)
    return PushReport(project_id=project_id, unreadable=[s for r in reports for s in r.unreadable], **numbers)


@dataclass(frozen=True)
class _Sending:
    """One project's share of a push; `advance` hears how many of its items are done."""

    store: Store
    client: LabelStudioClient
    settings: LabelingSettings
    model_id: str | None
    project_key: ProjectKey
    advance: Callable[[int], None]

    def run(self) -> PushReport:
        """Import what waits for this project, the most urgent first."""
        project = open_project(self.store, self.client, self.settings, self.project_key)
        adopted, doubled = adopt(self.store, self.client, project)
        where = {"state": ReviewState.NEW, "blind": self.project_key.blind, "reader": self.project_key.reader}
        with self.store.ledger.read() as tx:
            waiting = tx.find(ReviewItem, where=where, order_by=("-priority", "id"))
        pushed, withdrawn = 0, 0
        unreadable: list[str] = []
        size = self.settings.push_batch
        for start in range(0, len(waiting), size):
            part = waiting[start : start + size]
            batch = _prepare(self.store, part, project, self.settings, self.model_id)
            task_ids = self.client.import_tasks(project.id, batch.documents) if batch.documents else []
            with self.store.ledger.begin() as tx:
                for item, task_id in zip(batch.items, task_ids, strict=True):
                    _mark_pushed(tx, item, project.id, task_id)
                for item in batch.erased:
                    tx.update(ReviewItem, item.id, state=ReviewState.WITHDRAWN)
            pushed += len(batch.items)
            withdrawn += len(batch.erased)
            unreadable.extend(batch.unreadable)
            self.advance(min(start + size, len(waiting)))
        return PushReport(
            project_id=None if self.project_key.blind else project.id,
            pushed=pushed,
            adopted=adopted,
            blind=pushed if self.project_key.blind else 0,
            doubled=doubled,
            requeued=project.requeued,
            withdrawn=withdrawn,
            unreadable=unreadable,
        )


def _refresh(store: Store, client: LabelStudioClient, settings: LabelingSettings, model_id: str | None) -> int:
    """Bring open tasks in line whose question changed since: a new rank, another reason, a comment."""
    stale = stale_items(store)
    projects = known_projects(store, client) if stale else {}
    refreshed = 0
    for number, project_key in projects.items():
        mine = [item for item in stale if item.project_id == number]
        if not mine:
            continue
        project = open_project(store, client, settings, project_key)
        for start in range(0, len(mine) if project.id == number else 0, settings.push_batch):
            batch = _prepare(store, mine[start : start + settings.push_batch], project, settings, model_id)
            task_ids = [item.task_id or 0 for item in batch.items]
            with ThreadPoolExecutor(_REFRESHED_AT_ONCE) as pool:
                # A task that is gone is found by the next pull.
                for item, found in zip(
                    batch.items, pool.map(client.refresh_task, task_ids, batch.documents), strict=True
                ):
                    refreshed += found
                    with store.ledger.begin() as tx:
                        tx.update(ReviewItem, item.id, sent_hash=content_hash(item))
    return refreshed


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
                    _mark_pushed(tx, item, project.id, row.id, adopted=True)
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


def _mark_pushed(tx: Transaction, item: ReviewItem, project_id: int, task_id: int, *, adopted: bool = False) -> None:
    """Record where a question went; what an adopted task says is not known, so it is refreshed once."""
    changes = {"state": ReviewState.PUSHED, "project_id": project_id, "task_id": task_id, "pushed_at": utc_now()}
    tx.update(ReviewItem, item.id, **changes, sent_hash="adopted" if adopted else content_hash(item))


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
            return f"review item {item.id}: its image {item.image_id[:12]} is not in the ledger"
        try:
            made = task_document(
                item,
                image,
                read_image(store, image),
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
