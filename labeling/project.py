"""The project that holds this store's questions, found again by a marker that the ledger keeps.

The marker is written to the ledger before the project is made, so a process killed in between finds
its project again instead of making another. A project that was deleted by hand is made anew, and
its open questions wait to be pushed again; answers that were read from it stay.
"""

from dataclasses import dataclass

from labeling.client import LabelStudioClient
from labeling.settings import LabelingSettings
from labeling.tasks import PRIORITY_VERSION, label_config
from records.ids import new_id
from records.ledger import Transaction
from records.store import Store
from records.types import Cursor, ReviewItem, ReviewState

LEASE = "labeling.sync"
"""The right to push or pull; both take it for as long as they run."""

LEASE_WAIT_S = 60.0


@dataclass(frozen=True)
class Project:
    """A project in Label Studio.

    Args:
        id: of the project.
        marker: unique text in its description.
        requeued: questions that wait again because an earlier project was deleted.
    """

    id: int
    marker: str
    requeued: int = 0


def open_project(store: Store, client: LabelStudioClient, settings: LabelingSettings) -> Project:
    """Return the project of this store, made or brought up to date where that is needed.

    Args:
        store: with the ledger and the taxonomy.
        client: connected.
        settings: with its title.
    Returns:
        The project. One request if nothing changed.
    Raises:
        LabelStudioError: Label Studio does not answer, or refuses.
    """
    name = cursor_name(client)
    with store.ledger.begin() as tx:
        cursor = tx.get(Cursor, name)
        if cursor is None:
            cursor = Cursor(name=name, position={"marker": f"[relook:{new_id()}]", "project_id": None})
            tx.add(cursor)
    marker: str = cursor.position["marker"]
    known: int | None = cursor.position["project_id"]
    config = label_config(store.taxonomy)
    present = client.project(known) if known is not None else None
    ours = present is not None and marker in present.description
    if present is not None and ours and present.label_config == config.strip():
        return Project(present.id, marker)
    project_id = client.ensure_project(settings.project_title, config, marker, PRIORITY_VERSION)
    requeued = 0
    with store.ledger.begin() as tx:
        tx.update(Cursor, name, position={"marker": marker, "project_id": project_id})
        if known is not None and not ours:
            requeued = _requeue(tx, known)
    return Project(project_id, marker, requeued)


def known_project(store: Store, client: LabelStudioClient) -> int | None:
    """Return the id of this store's project as the ledger has it, without asking; None before the first push."""
    with store.ledger.read() as tx:
        cursor = tx.get(Cursor, cursor_name(client))
    found = cursor.position["project_id"] if cursor is not None else None
    return int(found) if found is not None else None


def is_ours(store: Store, client: LabelStudioClient, project_id: int) -> bool:
    """Return whether a project is the one of this store, by its marker; an emptied server counts from 1 again."""
    with store.ledger.read() as tx:
        cursor = tx.get(Cursor, cursor_name(client))
    project = client.project(project_id)
    return cursor is not None and project is not None and cursor.position["marker"] in project.description


def cursor_name(client: LabelStudioClient) -> str:
    """Return the name of the cursor that keeps the project at this server."""
    return f"labeling.project {client.server}"


def _requeue(tx: Transaction, project_id: int) -> int:
    open_items = tx.find(ReviewItem, where={"project_id": project_id, "state": ReviewState.PUSHED})
    for item in open_items:
        tx.update(ReviewItem, item.id, state=ReviewState.NEW, project_id=None, task_id=None, pushed_at=None)
    return len(open_items)
