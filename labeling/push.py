"""Push: waiting review items become tasks in Label Studio, the most urgent first, each exactly once.

Each task carries the id of its item. Before an import, tasks that are newer than the newest one in the ledger are
listed: those that an earlier push imported without recording it are adopted instead of being imported again. While
Label Studio is down the items wait in the ledger. Tasks whose item has changed since are refreshed. An item that cannot
be sent is reported and tried again by the next push; the others are sent. While batches are imported the next one is
made ready.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from labeling.batches import Batch, Beside, prepare
from labeling.cases import CaseSource
from labeling.client import LabelStudioClient
from labeling.existing.fit import require_fit
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
from labeling.reads import ADOPTED, STALE, note_sent, plan_reads, stale_items
from labeling.rows import TaskRow
from labeling.settings import LabelingSettings
from labeling.sittings import next_sitting
from records import tracing
from records.cursors import set_position
from records.errors import DataError, LabelStudioError, LabelStudioRefusedError, UnavailableError
from records.ids import utc_now
from records.lease import hold
from records.ledger import Transaction
from records.parts import ahead, attempt, in_flight, in_parts
from records.store import Store
from records.types import Cursor, Prediction, ReviewItem, ReviewState

Advance = Callable[[int, int], None]
"""Called with (done, total) after each batch."""

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
        changed = tx.count(ReviewItem, where={"state": ReviewState.PUSHED, "sent_hash": STALE}, at_most=1) > 0
    if not waits and not changed:
        return PushReport()
    with hold(store.ledger, LEASE, wait_s=LEASE_WAIT_S):
        return _push(store, client, settings, Beside(model_id, cases), advance)


def _push(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, beside: Beside, advance: Advance
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
class _ProjectPush:
    """The push of one project's items; `advance` is called with the number of them that are done."""

    store: Store
    client: LabelStudioClient
    settings: LabelingSettings
    beside: Beside
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
        made = (prepare(self.store, part, project, self.settings, beside) for part in parts)
        several = self.settings.imports_at_once > 1 and sum(counts.values()) > size
        if several:
            _note_floor(self.store, project)
        send, at_once = partial(self._import, project), self.settings.imports_at_once
        with ahead(made) as ready, in_flight(ready, send, at_once) as sent:
            for number, (batch, refused) in enumerate(sent, start=1):
                pushed += len(batch.items) - len(refused)
                withdrawn += len(batch.erased)
                unreadable.extend([*batch.unreadable, *refused])
                self.advance(min(number * size, sum(counts.values())))
        if several:
            _forget_floor(self.store, project)
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

    def _arrived(self, project: Project, items: Sequence[ReviewItem]) -> bool:
        """Return whether the tasks of an import that failed are there all the same; then they are recorded."""
        try:
            adopt(self.store, self.client, project)
        except LabelStudioRefusedError as error:
            # Without the list nobody knows what arrived; the next push looks again.
            raise LabelStudioError(str(error)) from error
        with self.store.ledger.read() as tx:
            waiting = {"id": [item.id for item in items], "state": ReviewState.NEW}
            return tx.count(ReviewItem, where=waiting, at_most=1) == 0

    def _import(self, project: Project, batch: Batch) -> list[str]:
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
                if not self._arrived(project, [item for item, _ in tasks]):
                    raise

        if batch.erased:
            with self.store.ledger.begin() as tx:
                tx.update_many(ReviewItem, {item.id: {"state": ReviewState.WITHDRAWN} for item in batch.erased})
        parts = in_parts(list(zip(batch.items, batch.documents, strict=True)), send, (LabelStudioRefusedError,))
        failed = [(part.members[0][0], part.result) for part in parts if part.result is not None]
        return [f"review item {item.id}: {error}" for item, error in failed]


def _refresh(store: Store, client: LabelStudioClient, settings: LabelingSettings, beside: Beside) -> PushReport:
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
            batch = prepare(store, mine[start : start + settings.push_batch], project, settings, beside)
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
                note_sent(tx, {}, [item for item, _ in done])
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


def newest_task(tx: Transaction, project: Project) -> int:
    """Return the largest id of a recorded task of a project; 0 if there is none."""
    newest = tx.find(ReviewItem, where={"project_id": project.id}, order_by=("-task_id",), limit=1)
    return (newest[0].task_id or 0) if newest else 0


def _floor_name(project: Project) -> str:
    return f"labeling.importing {project.marker}"


def _note_floor(store: Store, project: Project) -> None:
    """Write down, before imports are in flight together, that tasks above the newest one may be unrecorded."""
    with store.ledger.begin() as tx:
        set_position(tx, _floor_name(project), {"after": newest_task(tx, project)})


def _forget_floor(store: Store, project: Project) -> None:
    with store.ledger.begin() as tx:
        set_position(tx, _floor_name(project), {})


def adopt(store: Store, client: LabelStudioClient, project: Project) -> tuple[int, int]:
    """Record tasks that were imported without being recorded, and delete second tasks; returns both counts."""
    # Task ids only grow, so tasks that are not recorded lie above the newest one that is; of imports that were in
    # flight together the later one may have been recorded, so those lie above the newest one from before. If a network
    # sent an import twice and the second copy was recorded, the first lies below; the pull finds it by the number of
    # tasks.
    with store.ledger.read() as tx:
        after_id = newest_task(tx, project)
        floor = tx.get(Cursor, _floor_name(project))
    if floor is not None:
        after_id = min(after_id, floor.position.get("after", after_id))
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


def _mark_pushed(tx: Transaction, project_id: int, items: Mapping[int, ReviewItem], *, adopted: bool = False) -> None:
    """Record the items of tasks; what an adopted task shows is unknown, so it is refreshed once."""
    pushed = {"state": ReviewState.PUSHED, "project_id": project_id, "pushed_at": utc_now()}
    changes = {item.id: {**pushed, "task_id": task_id} for task_id, item in items.items()}
    if adopted:
        tx.update_many(ReviewItem, {item_id: {**one, "sent_hash": ADOPTED} for item_id, one in changes.items()})
    else:
        note_sent(tx, changes, items.values())
    if tracing.is_on():
        _trace_tasks(tx, items.values())


def _trace_tasks(tx: Transaction, items: Collection[ReviewItem]) -> None:
    """Record the tasks in the traces of the requests that they came from."""
    predicted = {item.prediction_id for item in items if item.prediction_id is not None}
    request_of = {p.id: p.request_id for p in tx.find(Prediction, where={"id": predicted})}
    for item in items:
        tracing.record("task", [request_of.get(item.prediction_id or "", item.id)], now := time.time_ns(), now)
