"""Pull: a reconciling poll that brings the ledger in line with the annotations in Label Studio.

Each revision of an annotation becomes one `Annotation` row: an edit adds a row, and a deletion, or a skip of a task
that was annotated, adds a tombstone. Drafts and skips are not read. A poll of an unchanged project is one request.
Duplicate tasks, and tasks that were deleted in Label Studio, are found by the number of tasks in the project.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from labeling.client import PAGE_SIZE, LabelStudioClient
from labeling.deletion import delete_tasks
from labeling.existing.page import LabelPage
from labeling.outlines import outline_of
from labeling.project import LEASE, LEASE_WAIT_S, ProjectKey, is_ours, known_projects, open_project, settle_address
from labeling.push import Advance, sums
from labeling.reads import ADOPTED
from labeling.rows import AnnotationRow, ProjectState, TaskRow
from labeling.servers import server_name
from labeling.settings import LabelingSettings
from labeling.tasks import parse_annotation
from records.cursors import set_position
from records.errors import DataError, LabelStudioRefusedError, UnknownIdError
from records.ids import hash_of, new_id, utc_now
from records.lease import hold
from records.ledger import Transaction
from records.parts import ahead, attempt, in_parts
from records.store import Store
from records.types import Annotation, AnnotationKind, Cursor, Image, ReasonCode, ReviewItem, ReviewState
from records.types.base import LINE

_OVERLAP = timedelta(seconds=60)
_DELETED_AT_ONCE = 4
_ADDED = (
    "annotations", "new_labels", "edited", "deleted", "cant_tell", "other", "not_understood", "failed",
    "tasks_deleted", "doubled", "requeued",
)  # fmt: skip


class PullReport(BaseModel):
    """What one pull found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project_id: int | None = Field(default=None, description="empty before the first push")
    idle: bool = Field(default=False, description="true if nothing had changed, which one request shows")
    annotations: int = Field(default=0, ge=0, description="submitted annotations of the tasks that changed")
    new_labels: int = Field(default=0, ge=0, description="rows added for new and edited annotations")
    edited: int = Field(default=0, ge=0, description="those of them that revise an earlier row")
    deleted: int = Field(default=0, ge=0, description="tombstones added")
    cant_tell: int = Field(default=0, ge=0, description="new rows that say can't tell")
    other: int = Field(default=0, ge=0, description="new rows that say no class fits")
    not_understood: list[str] = Field(
        default_factory=list, description="one sentence per annotation that is kept but not used"
    )
    failed: list[str] = Field(
        default_factory=list,
        description="one sentence per task that could not be read or deleted; the next pull tries again",
    )
    tasks_deleted: int = Field(default=0, ge=0, description="tasks that were deleted in Label Studio")
    doubled: int = Field(default=0, ge=0, description="second tasks of a review item that were removed")
    requeued: int = Field(default=0, ge=0, description="review items that wait again, since their project was deleted")
    moved: str | None = Field(default=None, description="what a new address of Label Studio meant, one sentence")


def pull(
    store: Store,
    client: LabelStudioClient,
    settings: LabelingSettings,
    *,
    advance: Advance = lambda done, total: None,
    moved: bool = False,
) -> PullReport:
    """Read what annotators did since the last pull. Idempotent: a second pull adds nothing.

    Args:
        store: its ledger gets the annotations.
        client: connected.
        settings: used to make a project anew that was deleted.
        advance: called with the number of changed tasks that were read, as both numbers: the total is not known.
        moved: whether to send open review items again that are not at this address.
    Returns:
        Counts over all projects of the store.
    Raises:
        LabelStudioError: Label Studio cannot be reached; what was read so far is kept.
        RefusedError: another process held the lease for over a minute, or review items are open at an old address.
    """
    said = settle_address(store, client, moved=moved)
    projects = known_projects(store, client)
    if not projects:
        return PullReport(moved=said)
    reports: list[PullReport] = []
    with hold(store.ledger, LEASE, wait_s=LEASE_WAIT_S):
        _, undeleted = delete_tasks(store, client)
        for number, project_key in projects.items():
            try:
                reports.append(_pull(store, client, settings, number, project_key, advance))
            except LabelStudioRefusedError as error:
                reports.append(PullReport(project_id=number, failed=[f"project {number} was not read: {error}"]))
    found = _joined(reports)
    return found.model_copy(update={"failed": [*undeleted, *found.failed], "moved": said})


def _joined(reports: Sequence[PullReport]) -> PullReport:
    """Add up the reports of several projects; the id is that of the first, the oldest one."""
    first = reports[0]
    if len(reports) == 1:
        return first
    return PullReport(project_id=first.project_id, idle=all(r.idle for r in reports), **sums(reports, _ADDED))


def _pull(
    store: Store,
    client: LabelStudioClient,
    settings: LabelingSettings,
    project_id: int,
    project_key: ProjectKey,
    advance: Advance,
) -> PullReport:
    with store.ledger.read() as tx:
        server = server_name(tx, client)
        name = f"labeling.pull {server} {project_id}"
        cursor = tx.get(Cursor, name)
    before = dict(cursor.position) if cursor is not None else {}
    try:
        state = client.state(project_id)
        seen = _position(state)
        # Label Studio sets `updated_at` before it commits, so a change can become visible after another one with a
        # later time. A state therefore counts as read only once two pulls in a row have seen it.
        if before == {**seen, "settled": True}:
            return PullReport(project_id=project_id, idle=True)
        # The page of a linked project may be another one than at the last pull.
        linked = open_project(store, client, settings, project_key) if project_key.linked is not None else None
        page_of_linked = linked.page if linked is not None else None
        reading = _Pass(store, client, project_id, project_key, server, page_of_linked)
        done = 0
        # The overlap covers such late commits and a server clock that was set back; rows that are read again are
        # recognised by their revision.
        since = datetime.fromisoformat(before["newest_update"]) - _OVERLAP if before.get("newest_update") else None
        with ahead(client.list_tasks(project_id, updated_since=since, with_annotations=True)) as pages:
            for page in pages:
                reading.record(page)
                done += len(page)
                advance(done, done)
        reading.compare_totals(state)
    except UnknownIdError:
        # Deleting a project does not withdraw its annotations: the rows in the ledger stay, and open items requeue.
        project = open_project(store, client, settings, project_key)
        return PullReport(project_id=project.id, requeued=project.requeued)
    # Written last: a pull that is killed before reads the same tasks again. The position is the state from before the
    # listing, so what changes during the listing is read by the next pull. A task that could not be read holds the
    # position back, so that the next pull lists it again.
    settled = {key: before.get(key) for key in seen} == seen and not reading.failed_at
    if reading.failed_at:
        seen["newest_update"] = min(reading.failed_at).isoformat()
    with store.ledger.begin() as tx:
        set_position(tx, name, {**seen, "settled": settled})
    return reading.report()


def revision_of(annotation: AnnotationRow) -> str:
    """Return the hash of an annotation's result and update time, which every edit changes."""
    return hash_of([annotation.result, annotation.updated_at.isoformat()])


def _position(state: ProjectState) -> dict[str, str | int | None]:
    return {
        "newest_update": state.newest_update.isoformat() if state.newest_update is not None else None,
        "total": state.total,
        "total_annotations": state.total_annotations,
    }


@dataclass
class _Counts:
    """What was read of tasks."""

    added: list[Annotation] = field(default_factory=list)
    not_understood: list[str] = field(default_factory=list)
    annotations: int = 0
    edited: int = 0
    deleted: int = 0

    def add(self, more: "_Counts") -> None:
        """Add what was read of another task."""
        self.added += more.added
        self.not_understood += more.not_understood
        self.annotations += more.annotations
        self.edited += more.edited
        self.deleted += more.deleted


@dataclass
class _Pass:
    """One pass over the changed tasks of a project, page by page, with the counts so far."""

    store: Store
    client: LabelStudioClient
    project_id: int
    project_key: ProjectKey
    server: str
    page: LabelPage | None
    annotators: dict[int, str] = field(default_factory=dict)
    counts: "_Counts" = field(default_factory=lambda: _Counts())
    failed: list[str] = field(default_factory=list)
    failed_at: list[datetime] = field(default_factory=list)
    tasks_deleted: int = 0
    doubled: int = 0

    def record(self, page: Sequence[TaskRow]) -> None:
        """Bring the ledger in line with a page of tasks, in one transaction."""
        self._look_up_annotators(page)
        rows = [row for row in page if "relook_item" in row.meta]
        read: list[_Read] = []
        with self.store.ledger.begin() as tx:
            found = tx.find(ReviewItem, where={"id": {str(row.meta["relook_item"]) for row in rows}})
            # An image that was erased during this pull: nothing about it is written down again.
            gone = _erased(tx, {item.image_id for item in found})
            items = {item.id: item for item in found if item.image_id not in gone}
            known, now = self._newest_labels(tx, items), tx.now_after(Annotation)
            for row in rows:
                item = items.get(str(row.meta["relook_item"]))
                if item is None:
                    continue
                one = attempt(partial(self._read_task, now, row, item), known.get(row.id, {}))
                if isinstance(one, Exception):
                    self._fail(row, one)
                else:
                    read.append(one)
            for part in in_parts(read, partial(self._write, tx)):
                if isinstance(part.result, Exception):
                    self._fail(part.members[0].row, part.result)
                else:
                    for written in part.members:
                        self.counts.add(written.counts)

    def _write(self, tx: Transaction, read: Sequence["_Read"]) -> None:
        """Write the rows of some tasks, all or none of them."""
        with tx.connection.begin_nested():
            tx.add(*(label for one in read for label in (*one.counts.added, *one.tombstones)))
            _settle(tx, self.project_id, read)

    def compare_totals(self, state: ProjectState) -> None:
        """Find deleted tasks and duplicate tasks, which do not show in a listing of changed tasks."""
        sent = {"project_id": self.project_id, "state": (ReviewState.PUSHED, ReviewState.ANSWERED)}
        with self.store.ledger.read() as tx:
            # Counted first: most pulls find both numbers equal, and there may be a million items.
            if self.project_key.linked is None and tx.count(ReviewItem, sent) == state.total:
                return
            items = tx.find(ReviewItem, where=sent)
        if self.project_key.linked is not None:
            # Tasks of others are counted as well, so that the numbers say nothing.
            if is_ours(self.store, self.client, self.project_id, self.project_key):
                self._record_deleted_tasks(items)
                self.doubled += _remove_duplicates(self.store, self.client, self.project_id, {i.id: i for i in items})
            return
        # Before anything is withdrawn: a Label Studio that was set up anew can have a project with this id, too.
        if not is_ours(self.store, self.client, self.project_id, self.project_key):
            return
        if len(items) > state.total:
            self._record_deleted_tasks(items)
        else:
            by_id = {item.id: item for item in items}
            self.doubled += _remove_duplicates(self.store, self.client, self.project_id, by_id)

    def _record_deleted_tasks(self, items: Sequence[ReviewItem]) -> None:
        present = {row.id for page in self.client.list_tasks(self.project_id, page_size=5000) for row in page}
        missing = {item.id: item for item in items if item.task_id not in present}
        with self.store.ledger.begin() as tx:
            newest, now = self._newest_labels(tx, missing), tx.now_after(Annotation)
            held = [one for item in missing.values() for one in newest.get(item.task_id or 0, {}).values()]
            gone = [_tombstone(now, one) for one in held if not one.deleted]
            tx.add(*gone)
            tx.update_many(ReviewItem, {item_id: {"state": ReviewState.WITHDRAWN} for item_id in missing})
        self.counts.deleted += len(gone)
        self.tasks_deleted += len(missing)

    def report(self) -> PullReport:
        """Return the counts as a report."""
        counts = self.counts
        kinds = [label.kind for label in counts.added]
        return PullReport(
            project_id=self.project_id,
            annotations=counts.annotations,
            new_labels=len(counts.added),
            edited=counts.edited,
            deleted=counts.deleted,
            cant_tell=kinds.count(AnnotationKind.CANT_TELL),
            other=kinds.count(AnnotationKind.OTHER) - len(counts.not_understood),
            not_understood=counts.not_understood,
            failed=self.failed,
            tasks_deleted=self.tasks_deleted,
            doubled=self.doubled,
        )

    def _fail(self, row: TaskRow, error: Exception) -> None:
        """Report a task that could not be recorded; the next pull reads it again."""
        self.failed.append(LINE.keep(" ".join(f"task {row.id}: {error or type(error).__name__}".split())))
        self.failed_at.append(row.updated_at)

    def _look_up_annotators(self, page: Sequence[TaskRow]) -> None:
        wanted = {a.completed_by for row in page for a in row.annotations if a.completed_by is not None}
        if not wanted <= self.annotators.keys():
            # A user who was deleted keeps a name here, so that the annotation still has an annotator.
            self.annotators.update({user_id: f"user {user_id}" for user_id in wanted})
            self.annotators.update({user_id: LINE.keep(name) for user_id, name in self.client.users().items()})

    def _newest_labels(self, tx: Transaction, item_ids: Iterable[str]) -> dict[int, dict[int, Annotation]]:
        """Return the newest row of each annotation, by task id and annotation id."""
        where = {"review_item_id": list(item_ids), "server": self.server, "project_id": self.project_id}
        newest: dict[int, dict[int, Annotation]] = {}
        for label in tx.find(Annotation, where=where, order_by=("created_at", "id")):
            newest.setdefault(label.task_id, {})[label.annotation_id] = label
        return newest

    def _read_task(self, now: datetime, row: TaskRow, item: ReviewItem, known: Mapping[int, Annotation]) -> "_Read":
        """Return what a task adds to the ledger."""
        if row.fault is not None:
            raise DataError(row.fault)
        submitted = {a.id: a for a in row.annotations if not a.was_cancelled}
        found = _Counts(annotations=len(submitted))
        for annotation in submitted.values():
            last = known.get(annotation.id)
            if last is None or last.revision != revision_of(annotation):
                found.added.append(self._label(now, row, item, annotation, found.not_understood))
                found.edited += last is not None
        # Label Studio does not report deletions. An annotation that the ledger holds and the task no longer has was
        # deleted or turned into a skip. The listing holds all annotations of a task, so a missing one is really gone.
        gone = [one for one in known.values() if not one.deleted and one.annotation_id not in submitted]
        found.deleted = len(gone)
        return _Read(row, item, bool(submitted), found, [_tombstone(now, one) for one in gone])

    def _label(
        self, now: datetime, row: TaskRow, item: ReviewItem, annotation: AnnotationRow, not_understood: list[str]
    ) -> Annotation:
        parse = self.page.parse if self.page is not None else parse_annotation
        parsed = parse(annotation.result, self.store.taxonomy)
        annotator = self.annotators[annotation.completed_by] if annotation.completed_by is not None else "unknown"
        if not parsed.understood:
            not_understood.append(
                f"annotation {annotation.id} of task {row.id} by {annotator}: {parsed.other_text}; kept, not trained on"
            )
        return Annotation(
            id=new_id(),
            created_at=now,
            review_item_id=item.id,
            image_id=item.image_id,
            kind=parsed.kind,
            label=parsed.label,
            other_text=parsed.other_text,
            image_quality=parsed.image_quality,
            comment=parsed.comment,
            annotator=annotator,
            annotated_at=annotation.updated_at,
            lead_time_s=annotation.lead_time_s,
            outline=outline_of(annotation.result) if self.page is None else None,
            gold=ReasonCode.GOLD in item.reasons,
            blind=item.blind or (self.page is not None and not self.page.shows_model),
            server=self.server,
            project_id=self.project_id,
            task_id=row.id,
            annotation_id=annotation.id,
            revision=revision_of(annotation),
        )


@dataclass(frozen=True)
class _Read:
    """A task as it was read, with the rows that it adds; `answered` if somebody submitted an annotation."""

    row: TaskRow
    item: ReviewItem
    answered: bool
    counts: _Counts
    tombstones: list[Annotation]


def _tombstone(now: datetime, label: Annotation) -> Annotation:
    """Return the row that says that an annotation is gone."""
    changes = {"id": new_id(), "created_at": now, "annotated_at": now, "deleted": True}
    # Derived from the revision that it ends: revisions are unique per annotation, and an annotation can be skipped,
    # submitted and skipped again, which takes a tombstone each time.
    return label.model_copy(update={**changes, "revision": hash_of(["deleted", label.revision])})


def _erased(tx: Transaction, image_ids: Collection[str]) -> set[str]:
    return {image.id for image in tx.find(Image, where={"id": set(image_ids)}) if image.erased_at is not None}


def _settle(tx: Transaction, project_id: int, read: Sequence[_Read]) -> None:
    """Bring the states of items in line with their tasks; a withdrawn item stays withdrawn."""
    now = utc_now()
    adopted, states = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    for one in read:
        item = one.item
        if item.state not in (ReviewState.NEW, ReviewState.PUSHED, ReviewState.ANSWERED):
            continue
        # It was annotated in another Label Studio, and this one has had a task of it since before.
        if item.task_id is None and item.state == ReviewState.ANSWERED and not one.answered:
            continue
        if item.task_id is None:
            # A push imported this task and was killed before it wrote its id. What the task shows is unknown, so the
            # next push refreshes it.
            at = {"project_id": project_id, "task_id": one.row.id, "pushed_at": now}
            adopted[item.id] = {**at, "sent_hash": ADOPTED}
        wanted = ReviewState.ANSWERED if one.answered else ReviewState.PUSHED
        if item.state != wanted:
            states[item.id] = {"state": wanted, "answered_at": now if one.answered else None}
    tx.update_many(ReviewItem, adopted)
    tx.update_many(ReviewItem, states)


def _remove_duplicates(
    store: Store, client: LabelStudioClient, project_id: int, items: Mapping[str, ReviewItem]
) -> int:
    """Delete duplicate tasks, which come of an import that a network sent twice; returns how many were deleted.

    The annotated task of an item stays, else the one in the ledger. A task that somebody annotated or skipped is never
    deleted. What cannot be deleted now is deleted by a later pull.
    """
    found: dict[str, list[int]] = defaultdict(list)
    for page in client.list_tasks(project_id, page_size=5000):
        for row in page:
            found[str(row.meta.get("relook_item"))].append(row.id)
    several = {item_id: task_ids for item_id, task_ids in found.items() if len(task_ids) > 1 and item_id in items}
    touched = _touched(client, project_id, {task_id for task_ids in several.values() for task_id in task_ids})
    spare: list[int] = []
    # The ledger first: if the process is killed before a task is deleted, its item points to the task that stays, and
    # the next pull deletes the spare one.
    with store.ledger.begin() as tx:
        for item_id, task_ids in several.items():
            kept = _kept(items[item_id], task_ids, touched)
            spare.extend(task_id for task_id in task_ids if task_id != kept and task_id not in touched)
            if kept != items[item_id].task_id:
                _move(tx, items[item_id], kept, touched.get(kept))

    def delete(task_id: int) -> bool:
        # Checked again right before, since somebody may have annotated the task since the listing.
        if _touched(client, project_id, {task_id}):
            return False
        try:
            client.delete_task(task_id)
        except LabelStudioRefusedError:
            return False
        return True

    with ThreadPoolExecutor(_DELETED_AT_ONCE) as pool:
        return sum(pool.map(delete, spare))


def _kept(item: ReviewItem, task_ids: list[int], touched: Mapping[int, TaskRow]) -> int:
    among = [task_id for task_id in task_ids if task_id in touched] or task_ids
    return item.task_id if item.task_id in among else min(among)


def _move(tx: Transaction, item: ReviewItem, task_id: int, touched: TaskRow | None) -> None:
    tx.update(ReviewItem, item.id, task_id=task_id)
    was_answered = touched is not None and any(not annotation.was_cancelled for annotation in touched.annotations)
    if item.state is ReviewState.PUSHED and was_answered:
        tx.update(ReviewItem, item.id, state=ReviewState.ANSWERED)


def _touched(client: LabelStudioClient, project_id: int, task_ids: Collection[int]) -> dict[int, TaskRow]:
    """Return the tasks that somebody annotated or skipped, as they are now."""
    found: dict[int, TaskRow] = {}
    if task_ids:
        size = min(len(task_ids), PAGE_SIZE)
        for page in client.list_tasks(project_id, after_id=min(task_ids) - 1, with_annotations=True, page_size=size):
            found.update({row.id: row for row in page if row.id in task_ids and row.is_touched})
            if page[-1].id >= max(task_ids):
                break
    return found
