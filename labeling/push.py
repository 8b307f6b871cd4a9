"""Push: waiting review items become tasks in Label Studio, the most urgent first, each exactly once.

Each task carries the id of its item. Before an import, tasks that are newer than the newest one in the ledger are
listed: those that an earlier push imported without recording it are adopted instead of being imported again. While
Label Studio is down the items wait in the ledger. Tasks whose item has changed since are refreshed. An item that cannot
be sent is reported and tried again by the next push; the others are sent. While a batch is imported the next one is
made ready. One import is in flight at a time, since adopting relies on growing task ids.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from images.decode import decode_image
from images.overlay import overlay
from labeling.cases import AT_ONCE, AboutTask, CaseSource, TaskCase, case_data
from labeling.client import LabelStudioClient
from labeling.existing.fit import fitted, require_fit
from labeling.existing.page import LabelPage
from labeling.project import (
    LEASE,
    LEASE_WAIT_S,
    Project,
    ProjectKey,
    destinations,
    known_projects,
    open_project,
    settle_address,
)
from labeling.queue import Read, first_waiting, waiting_pages, waiting_reads
from labeling.reads import content_hash, plan_reads, stale_items
from labeling.rows import TaskRow
from labeling.settings import LabelingSettings
from labeling.sittings import next_sitting
from labeling.tasks import task_document
from records import tracing
from records.arrays import UInt8Array
from records.errors import DataError, LabelStudioError, LabelStudioRefusedError, UnavailableError, UnknownIdError
from records.ids import utc_now
from records.lease import hold
from records.ledger import Transaction
from records.parts import ahead, attempt, each_in_parts, in_parts
from records.store import Store, read_image
from records.types import Image, Prediction, ReviewItem, ReviewState

Advance = Callable[[int, int], None]
"""Called with (done, total) after each batch."""

_ENCODERS = 2
_REFRESHED_AT_ONCE = 4
_ADDED = ("pushed", "adopted", "refreshed", "blind", "doubled", "requeued", "withdrawn", "unreadable")


class PushReport(BaseModel):
    """What one push did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project_id: int | None = Field(default=None, description="of the shared project; empty if nothing waited for it")
    pushed: int = Field(default=0, ge=0, description="tasks that were imported")
    adopted: int = Field(default=0, ge=0, description="tasks that an earlier push had imported without recording them")
    refreshed: int = Field(default=0, ge=0, description="tasks whose review item had changed since they were sent")
    blind: int = Field(default=0, ge=0, description="tasks imported without the prediction")
    doubled: int = Field(default=0, ge=0, description="second tasks of an item that were removed")
    requeued: int = Field(default=0, ge=0, description="review items that wait again, since their project was deleted")
    withdrawn: int = Field(default=0, ge=0, description="review items of images that were erased meanwhile")
    unreadable: list[str] = Field(
        default_factory=list, description="one sentence per item that could not be sent; the next push tries it again"
    )


def push(
    store: Store,
    client: LabelStudioClient,
    settings: LabelingSettings,
    model_id: str | None = None,
    *,
    advance: Advance = lambda done, total: None,
    cases: CaseSource | None = None,
) -> PushReport:
    """Send all waiting review items to Label Studio. Idempotent: a second push adds nothing.

    Args:
        store: its ledger is the outbox; its blobs hold images and overlays.
        client: connected.
        settings: batch size, image size, blind share and readers.
        model_id: of the champion; stored in the task's meta data if its item has no prediction.
        advance: called with (done, total) after each batch.
        cases: finds the confirmed cases that tasks show; None shows none.
    Returns:
        Counts over all projects of the store.
    Raises:
        LabelStudioError: Label Studio cannot be reached, or refuses the token; what was pushed so far is recorded.
        RefusedError: another process held the lease for over a minute, or review items are open at an old address.
    """
    settle_address(store, client)
    # Without the lease and without a request: most pushes of `sync --watch` find nothing to do.
    with store.ledger.read() as tx:
        waits = tx.count(ReviewItem, where={"state": ReviewState.NEW}, at_most=1) > 0
    if not waits and not stale_items(store):
        return PushReport()
    with hold(store.ledger, LEASE, wait_s=LEASE_WAIT_S):
        return _push(store, client, settings, _Beside(model_id, cases), advance)


def _push(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, beside: "_Beside", advance: Advance
) -> PushReport:
    plan_reads(store, settings)
    reports = [_refresh(store, client, settings, beside)]
    destination = destinations(store, client)
    with store.ledger.read() as tx:
        by_project = Counter[ProjectKey]()
        for read, count in waiting_reads(tx).items():
            by_project[destination(read)] += count
    done, total = 0, by_project.total()
    for project_key in sorted(by_project, key=lambda project_key: (project_key.blind, project_key.reader or "")):
        counted = partial(_advance, advance, done, total)
        pushing = _ProjectPush(store, client, settings, beside, project_key, destination, counted)
        try:
            reports.append(pushing.run())
        except LabelStudioRefusedError as error:
            items = by_project[project_key]
            reports.append(PushReport(unreadable=[f"{items} items of a {pushing.described} project: {error}"]))
        done += by_project[project_key]
    return _joined(reports)


def _advance(advance: Advance, before: int, total: int, done: int) -> None:
    advance(before + done, total)


def sums(reports: Sequence[BaseModel], names: Sequence[str]) -> dict[str, Any]:
    """Add up fields of one or more reports of one type: numbers are summed, lists joined."""
    return {name: sum((getattr(r, name) for r in reports), type(getattr(reports[0], name))()) for name in names}


def _joined(reports: Sequence[PushReport]) -> PushReport:
    project_id = next((r.project_id for r in reports if r.project_id is not None), None)
    return PushReport(project_id=project_id, **sums(reports, _ADDED))


@dataclass(frozen=True)
class _Beside:
    """What a task gets that is neither in its item nor in its prediction; `places` is by item, see `sittings`."""

    model_id: str | None = None
    cases: CaseSource | None = None
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _ProjectPush:
    """The push of one project's items; `advance` is called with the number of them that are done."""

    store: Store
    client: LabelStudioClient
    settings: LabelingSettings
    beside: _Beside
    project_key: ProjectKey
    destination: Callable[[Read], ProjectKey]
    advance: Callable[[int], None]

    @property
    def described(self) -> str:
        """Which project it is, for a sentence."""
        if self.project_key.linked is not None:
            return "linked"
        return f"blind reader's ({self.project_key.reader or 'anyone'})" if self.project_key.blind else "shared"

    def run(self) -> PushReport:
        """Import the items that wait for this project, the most urgent first."""
        project = open_project(self.store, self.client, self.settings, self.project_key)
        if project.page is not None:
            _require_fit(project.page, self.store)
        # In this order: opening the project may requeue items, and adopting takes items off the list that is read next.
        adopted, doubled = adopt(self.store, self.client, project)
        with self.store.ledger.read() as tx:
            counts = {read: n for read, n in waiting_reads(tx).items() if self.destination(read) == self.project_key}
        size = self.settings.push_batch
        parts, places = waiting_pages(self.store, counts, size), dict[str, str]()
        if self.settings.sitting_tasks > 0 and self.project_key.reader is not None:
            with self.store.ledger.read() as tx:
                first = first_waiting(tx, counts, self.settings.sitting_tasks) if counts else []
                sitting, places = next_sitting(tx, self.project_key, first, self.settings, utc_now())
            parts = iter([sitting[start : start + size] for start in range(0, len(sitting), size)])
        beside = replace(self.beside, places=places)
        pushed, withdrawn = 0, 0
        unreadable: list[str] = []
        ready = ahead(_prepare(self.store, part, project, self.settings, beside) for part in parts)
        for number, batch in enumerate(ready, start=1):
            refused = self._import(project, batch)
            with self.store.ledger.begin() as tx:
                tx.update_many(ReviewItem, {item.id: {"state": ReviewState.WITHDRAWN} for item in batch.erased})
            pushed += len(batch.items) - len(refused)
            withdrawn += len(batch.erased)
            unreadable.extend([*batch.unreadable, *refused])
            self.advance(min(number * size, sum(counts.values())))
        return PushReport(
            project_id=None if self.project_key.blind else project.id,
            pushed=pushed,
            adopted=adopted,
            blind=pushed if self.project_key.blind or not _shows_model(project) else 0,
            doubled=doubled,
            requeued=project.requeued,
            withdrawn=withdrawn,
            unreadable=unreadable,
        )

    def _adopted(self, project: Project) -> bool:
        try:
            return adopt(self.store, self.client, project)[0] > 0
        except LabelStudioRefusedError as error:
            # Without the list nobody knows what arrived; the next push looks again.
            raise LabelStudioError(str(error)) from error

    def _import(self, project: Project, batch: "_Batch") -> list[str]:
        """Import a batch and record its tasks; return a sentence for each item that Label Studio does not take."""

        def send(tasks: Sequence[tuple[ReviewItem, dict[str, Any]]]) -> None:
            try:
                task_ids = self.client.import_tasks(project.id, [document for _, document in tasks])
                # An import and this transaction cannot be one: a push that is killed between them, or loses the
                # response, leaves tasks that no item knows. The next push adopts them.
                with self.store.ledger.begin() as tx:
                    _mark_pushed(tx, project.id, dict(zip(task_ids, (item for item, _ in tasks), strict=True)))
            except Exception as error:
                _raise_outage(error)
                # A server that failed may have imported them all the same; then they must not be sent again in halves.
                if not self._adopted(project):
                    raise

        parts = in_parts(list(zip(batch.items, batch.documents, strict=True)), send, (LabelStudioRefusedError,))
        failed = [(part.members[0][0], part.result) for part in parts if part.result is not None]
        return [f"review item {item.id}: {error}" for item, error in failed]


def _refresh(store: Store, client: LabelStudioClient, settings: LabelingSettings, beside: _Beside) -> PushReport:
    """Update the open tasks whose review item changed: another priority or reason, a comment."""
    stale = stale_items(store)
    projects = known_projects(store, client) if stale else {}
    refreshed, failed = 0, list[str]()
    for number, project_key in projects.items():
        mine = [item for item in stale if item.project_id == number]
        if not mine:
            continue
        opened = attempt(partial(open_project, store, client, settings), project_key)
        if isinstance(opened, Exception):
            _raise_outage(opened)
            failed.append(f"{len(mine)} tasks of project {number} were not updated: {opened}")
            continue
        project = opened
        for start in range(0, len(mine) if project.id == number else 0, settings.push_batch):
            batch = _prepare(store, mine[start : start + settings.push_batch], project, settings, beside)
            failed.extend(batch.unreadable)

            def refresh(task: tuple[ReviewItem, dict[str, Any]]) -> bool:
                return client.refresh_task(task[0].task_id or 0, task[1])

            tasks = list(zip(batch.items, batch.documents, strict=True))
            with ThreadPoolExecutor(_REFRESHED_AT_ONCE) as pool:
                found = list(zip(batch.items, pool.map(partial(attempt, refresh), tasks), strict=True))
            # A task that is gone is found by the next pull. Its item counts as sent all the same, or every push would
            # try it again.
            done = [(item, one) for item, one in found if not isinstance(one, Exception)]
            with store.ledger.begin() as tx:
                tx.update_many(ReviewItem, {item.id: {"sent_hash": content_hash(item)} for item, _ in done})
            refreshed += sum(one for _, one in done)
            for item, one in found:
                if isinstance(one, Exception):
                    _raise_outage(one)
                    failed.append(f"review item {item.id}: {one}")
    return PushReport(refreshed=refreshed, unreadable=failed)


def _raise_outage(error: Exception) -> None:
    """Raise an error that every further request would meet, too."""
    if isinstance(error, UnavailableError) and not isinstance(error, LabelStudioRefusedError):
        raise error


def adopt(store: Store, client: LabelStudioClient, project: Project) -> tuple[int, int]:
    """Record tasks that were imported without being recorded, and delete second tasks; returns both counts."""
    # Task ids only grow, so tasks that are not recorded lie above the newest one that is. If a network sent an import
    # twice and the second copy was recorded, the first lies below; the pull finds it by the number of tasks.
    with store.ledger.read() as tx:
        newest = tx.find(ReviewItem, where={"project_id": project.id}, order_by=("-task_id",), limit=1)
    after_id = (newest[0].task_id or 0) if newest else 0
    adopted, doubled = 0, 0
    for page in client.list_tasks(project.id, after_id=after_id, with_annotations=True):
        ours = [row for row in page if str(row.meta.get("relook_key", "")).endswith(project.marker)]
        second: list[TaskRow] = []
        with store.ledger.begin() as tx:
            named = tx.find(ReviewItem, where={"id": {str(row.meta.get("relook_item")) for row in ours}})
            items = {item.id: item for item in named}
            first: dict[int, ReviewItem] = {}
            task_ids = {item.id: item.task_id for item in named}
            for row in ours:
                item = items.get(str(row.meta.get("relook_item")))
                if item is None:
                    continue
                if task_ids[item.id] is None and item.state == ReviewState.NEW:
                    first[row.id] = item
                    task_ids[item.id] = row.id
                # A duplicate that somebody annotated is left to the pull, which moves the item to it.
                elif task_ids[item.id] != row.id and not row.is_touched:
                    second.append(row)
            _mark_pushed(tx, project.id, first, adopted=True)
        adopted += len(first)
        for row in second:
            # A second task does no harm; one that cannot be deleted is left to the pull.
            with contextlib.suppress(LabelStudioRefusedError):
                client.delete_task(row.id)
                doubled += 1
    return adopted, doubled


def _require_fit(page: LabelPage, store: Store) -> None:
    """Refuse to send tasks to a linked page that was changed since, so that a class cannot be chosen any more."""
    try:
        require_fit(page, store.taxonomy)
    except DataError as error:
        raise LabelStudioRefusedError(str(error)) from error


def _shows_model(project: Project) -> bool:
    return project.page is None or project.page.shows_model


def item_key(item_id: str, project: Project) -> str:
    """Return the idempotency key of an item's task, made of the item's id and the project's marker."""
    return f"{item_id}{project.marker}"


def _mark_pushed(tx: Transaction, project_id: int, items: Mapping[int, ReviewItem], *, adopted: bool = False) -> None:
    """Record the items of tasks; what an adopted task shows is unknown, so its hash makes it refreshed once."""
    changes = {"state": ReviewState.PUSHED, "project_id": project_id, "pushed_at": utc_now()}
    tx.update_many(
        ReviewItem,
        {
            item.id: {**changes, "task_id": task_id, "sent_hash": "adopted" if adopted else content_hash(item)}
            for task_id, item in items.items()
        },
    )
    if tracing.is_on():
        for item in items.values():
            _trace_task(tx, item)


def _trace_task(tx: Transaction, item: ReviewItem) -> None:
    """Record the task in the trace of the request that it came from."""
    prediction = tx.get(Prediction, item.prediction_id) if item.prediction_id else None
    tracing.record("task", [prediction.request_id if prediction else item.id], now := time.time_ns(), now)


@dataclass(frozen=True)
class _Batch:
    """Items by what can be done with them; `documents` are the tasks of `items`, in the same order."""

    items: list[ReviewItem]
    documents: list[dict[str, Any]]
    erased: list[ReviewItem]
    unreadable: list[str]


def _drawn(store: Store, item: ReviewItem, content: bytes, side_px: int) -> tuple[UInt8Array | None, UInt8Array | None]:
    """Return an item's heat map over its image, and the image's pixels if they were needed for it.

    There is no map if the item has none, or its task shows none.
    """
    if item.blind or (item.heat_map is None and item.overlay_blob is None):
        return None, None
    if item.heat_map is None:
        return decode_image(store.blobs.get(str(item.overlay_blob)), side_px), None
    # Drawn over the pixels as they are: enlarging the drawn map costs a tenth of drawing over an enlarged image.
    pixels = decode_image(content, side_px)
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    return overlay(square, np.array(item.heat_map)), pixels


def _prepare(
    store: Store, waiting: Sequence[ReviewItem], project: Project, settings: LabelingSettings, beside: _Beside
) -> _Batch:
    with store.ledger.read() as tx:
        images = {i.id: i for i in tx.find(Image, where={"id": {item.image_id for item in waiting}})}
        predicted = {item.prediction_id for item in waiting if item.prediction_id is not None}
        predictions = {p.id: p for p in tx.find(Prediction, where={"id": predicted})}
    cases_of = _found_cases(store, waiting, images, predictions, beside.cases) if project.cases else {}

    def document(item: ReviewItem) -> dict[str, Any]:
        image = images.get(item.image_id)
        prediction = predictions.get(item.prediction_id) if item.prediction_id is not None else None
        if image is None:
            raise UnknownIdError(f"its image {item.image_id[:12]} is not in the ledger")
        content = read_image(store, image)
        if isinstance(alike := cases_of.get(item.id, ()), Exception):
            raise alike
        drawn, pixels = _drawn(store, item, content, settings.image_side_px)
        made = task_document(
            item,
            image,
            content,
            drawn,
            prediction,
            taxonomy=store.taxonomy,
            settings=settings,
            key=item_key(item.id, project),
            cases=case_data(alike, store.taxonomy, settings) if project.cases and not item.blind else None,
            place=beside.places.get(item.id, ""),
            pixels=pixels,
        )
        if project.page is not None:
            made = fitted(made, project.page, image, settings)
        if not item.blind:
            made["meta"]["relook_model"] = prediction.model_id if prediction is not None else beside.model_id
            made["meta"]["relook_cases"] = [case.image_id for case in alike]
        return made

    batch = _Batch([], [], [], [])
    erased = {image.id for image in images.values() if image.erased_at is not None}
    batch.erased.extend(item for item in waiting if item.image_id in erased)
    wanted = [item for item in waiting if item.image_id not in erased]
    # Decoding and encoding release the GIL. An image that cannot be read becomes a sentence in the report: one damaged
    # file must not hold up the others.
    with ThreadPoolExecutor(_ENCODERS) as pool:
        made = list(pool.map(partial(attempt, document), wanted))
    unavailable = [error for error in made if isinstance(error, UnavailableError)]
    # One file that cannot be read is damaged; if none can, the store is down.
    if len(unavailable) == len(made) > 1:
        raise unavailable[0]
    for item, found in zip(wanted, made, strict=True):
        if isinstance(found, Exception):
            batch.unreadable.append(f"review item {item.id}: {found or type(found).__name__}")
        else:
            batch.items.append(item)
            batch.documents.append(found)
    _note_cases(store, batch)
    return batch


def _found_cases(
    store: Store,
    waiting: Sequence[ReviewItem],
    images: Mapping[str, Image],
    predictions: Mapping[str, Prediction],
    source: CaseSource | None,
) -> dict[str, Sequence[TaskCase] | Exception]:
    """Return the cases of tasks that are not blind, or why there are none, by review item."""
    found: dict[str, Sequence[TaskCase] | Exception] = {}
    if source is None:
        return found
    shown = [item for item in waiting if not item.blind and item.image_id in images]
    for start in range(0, len(shown), AT_ONCE):
        about: dict[str, AboutTask] = {}
        for item in shown[start : start + AT_ONCE]:
            content = attempt(partial(read_image, store), image := images[item.image_id])
            if isinstance(content, bytes):
                about[item.id] = (image, content, predictions.get(item.prediction_id or ""))
        found.update(zip(about, each_in_parts(list(about.values()), source), strict=True))
    return found


def _note_cases(store: Store, batch: _Batch) -> None:
    """Write down which images the tasks are going to show, before they do: an erasure has to find them."""
    shown = {
        item.id: document["meta"].get("relook_cases") or None
        for item, document in zip(batch.items, batch.documents, strict=True)
    }
    changed = {item.id: {"cases": shown[item.id]} for item in batch.items if item.cases != shown[item.id]}
    if changed:
        with store.ledger.begin() as tx:
            tx.update_many(ReviewItem, changed)
