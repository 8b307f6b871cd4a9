"""Deletion of the tasks of erased images in Label Studio, with image, heat map, annotations and comments.

A review item whose `sent_hash` is not `erased` still has to be looked for, so a Label Studio that was down, or a push
that was killed before it recorded its tasks, only delays the deletion: every pull finishes it.
"""

import re
import sqlite3
from contextlib import closing

import sqlalchemy as sa

from labeling.cases import TAKEN_OUT, forbidden_cases, take_out
from labeling.client import LabelStudioClient
from labeling.connection import connect
from labeling.environment import DATABASE
from labeling.project import LEASE, LEASE_WAIT_S, known_projects
from labeling.servers import DELETED, settle
from labeling.settings import LabelingSettings
from records.erasure import Place
from records.errors import LabelStudioError, LabelStudioRefusedError, UnknownIdError
from records.lease import hold
from records.ledger.tables import TABLES, any_of
from records.store import Store
from records.types import Image, ReviewItem, ReviewState

_LOCKED_S = 60.0


def tasks_place(settings: LabelingSettings) -> Place:
    """Return the Label Studio of these settings as a place that holds images."""

    def erase(store: Store, image_ids: object) -> int:
        if not pending_items(store) and not forbidden_cases(store):
            return 0
        client = connect(store.home, settings)
        if client is None:
            return 0
        with client, hold(store.ledger, LEASE, wait_s=LEASE_WAIT_S):
            settle(store, client)
            deleted, failed = delete_tasks(store, client)
        if failed:
            raise LabelStudioError(f"{failed[0]}; erase again ({len(failed)} such failures)")
        return deleted

    return Place("tasks", "label-studio", "images, heat maps, context, annotations and comments in Label Studio", erase)


def delete_tasks(store: Store, client: LabelStudioClient) -> tuple[int, list[str]]:
    """Delete all tasks of erased and expired images, and take cases that may be shown no more out of other tasks.

    The caller holds the lease `labeling.sync`.

    What cannot be deleted keeps nothing else from it: it stays pending, so that the next pull tries it again.

    Args:
        store: its ledger says which items are about such images.
        client: connected.
    Returns:
        The number of deleted tasks, and a sentence for everything that could not be deleted.
    Raises:
        LabelStudioError: Label Studio cannot be reached.
    """
    pending, forbidden = pending_items(store), forbidden_cases(store)
    if not pending and not forbidden:
        return 0, []
    without, failed = take_out(client, [item for item_id, item in forbidden.items() if item_id not in pending])
    deleted, left, refused = _delete(store, client, pending) if pending else (0, set[str](), list[str]())
    failed.extend(refused)
    if client.server == "local":
        try:
            _delete_exports(store, {*pending, *forbidden})
            # Also if nothing was deleted this time: a run before may have failed right here.
            if pending - left or without:
                _rewrite_database(store)
        except LabelStudioError as error:
            left, without = left | pending, set()
            failed.append(str(error))
    items = TABLES[ReviewItem]
    with store.ledger.begin() as tx:
        mine = any_of(items.c.id, pending - left, tx.connection.dialect)
        gone = {"sent_hash": DELETED, "project_id": None, "task_id": None}
        tx.connection.execute(sa.update(items).where(mine).values(gone))
        tx.update_many(ReviewItem, {item_id: {"cases": None, "sent_hash": TAKEN_OUT} for item_id in without})
    return deleted, failed


def _delete(store: Store, client: LabelStudioClient, pending: set[str]) -> tuple[int, set[str], list[str]]:
    """Delete the tasks of items; returns how many, the items of those that were not deleted, and sentences."""
    deleted, left, failed = 0, set[str](), list[str]()
    # All tasks are listed, not only those in the ledger: a push that was killed, or a network that sent an import
    # twice, leaves tasks that no item knows.
    for project_id in known_projects(store, client):
        try:
            rows = [row for page in client.list_tasks(project_id, page_size=5000) for row in page]
        except UnknownIdError:
            continue
        except LabelStudioRefusedError as error:
            # Any of them may be in this project.
            left |= pending
            failed.append(f"project {project_id} was not searched for tasks of erased images: {error}")
            continue
        for row in rows:
            item_id = str(row.meta.get("relook_item"))
            if item_id not in pending:
                continue
            try:
                client.delete_task(row.id)
                deleted += 1
            except LabelStudioRefusedError as error:
                left.add(item_id)
                failed.append(f"task {row.id} of an erased image was not deleted: {error}")
    return deleted, left, failed


def pending_items(store: Store) -> set[str]:
    """Return the ids of review items of erased or expired images whose tasks may still be in Label Studio."""
    items, images = TABLES[ReviewItem].c, TABLES[Image].c
    query = sa.select(items.id).join(TABLES[Image], images.id == items.image_id)
    query = query.where(images.erased_at.is_not(None), items.sent_hash.is_distinct_from(DELETED))
    # An item of an imported annotation never had a task of ours; the task that it is about is somebody else's.
    imported = sa.and_(items.state == ReviewState.ANSWERED, items.task_id.is_(None), items.pushed_at.is_(None))
    query = query.where(sa.not_(imported))
    with store.ledger.read() as tx:
        return set(tx.connection.scalars(query))


def _delete_exports(store: Store, item_ids: set[str]) -> None:
    """Delete what the local Label Studio exported of these items: it keeps a copy of every export."""
    for path in (store.home.label_studio / "export").glob("*"):
        try:
            if path.is_file() and item_ids & set(re.findall(r"\b[0-9a-f]{32}\b", path.read_text(errors="replace"))):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise LabelStudioError(
                f"the export {path} cannot be deleted ({error.strerror}); delete it by hand"
            ) from error


def _rewrite_database(store: Store) -> None:
    """Rewrite the file of the local Label Studio, in which deleted rows stay readable as free space."""
    path = store.home.label_studio / DATABASE
    if not path.is_file():
        return
    try:
        with closing(sqlite3.connect(path, timeout=_LOCKED_S, isolation_level=None)) as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.OperationalError as error:
        raise LabelStudioError(
            f"the database of the local Label Studio cannot be rewritten ({error}); `relook label sync` tries again"
        ) from error
