"""The projects that hold this store's questions, found again by a marker that the ledger keeps.

The marker is written to the ledger before the project is made, so a process killed in between finds
its project again instead of making another. A project that was deleted by hand is made anew, and
its open questions wait to be pushed again; answers that were read from it stay.

One project is shared. Blind questions have others: one for each named reader, since readers would see
each other's answers in a shared one, and one for blind questions that are nobody's own.
"""

from dataclasses import dataclass

from labeling.client import LabelStudioClient
from labeling.settings import LabelingSettings
from labeling.tasks import PRIORITY_VERSION, label_config
from labeling.webhooks import ensure_webhook, webhook_fingerprint
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


@dataclass(frozen=True)
class ProjectKey:
    """Which of a store's projects.

    Args:
        blind: whether the model's opinion is left out.
        reader: whose own it is, an e-mail address; None for a shared one.
    """

    blind: bool = False
    reader: str | None = None

    @property
    def suffix(self) -> str:
        """What tells its cursor from that of the shared project."""
        return f" blind {self.reader or ''}".rstrip() if self.blind else ""

    def title(self, settings: LabelingSettings) -> str:
        """Return the title of its project, at most 50 characters."""
        if not self.blind:
            return settings.project_title
        return f"{settings.project_title[:22]}, blind: {self.reader or 'anyone'}"[:50]


SHARED = ProjectKey()


def project_key_of(item: ReviewItem) -> ProjectKey:
    """Return the project that a question belongs to."""
    return ProjectKey(item.blind, item.reader) if item.blind else SHARED


def open_project(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, project_key: ProjectKey = SHARED
) -> Project:
    """Return a project of this store, made or brought up to date where that is needed.

    Args:
        store: with the ledger and the taxonomy.
        client: connected.
        settings: with its title.
        project_key: which one.
    Returns:
        The project. One request if nothing changed.
    Raises:
        LabelStudioError: Label Studio does not answer, or refuses.
    """
    name = cursor_name(client, project_key)
    with store.ledger.begin() as tx:
        cursor = tx.get(Cursor, name)
        if cursor is None:
            whose = {"blind": project_key.blind, "reader": project_key.reader}
            cursor = Cursor(name=name, position={"marker": f"[relook:{new_id()}]", "project_id": None, **whose})
            tx.add(cursor)
    marker: str = cursor.position["marker"]
    known: int | None = cursor.position["project_id"]
    config = label_config(store.taxonomy, blind=project_key.blind)
    present = client.project(known) if known is not None else None
    ours = present is not None and marker in present.description
    bell = webhook_fingerprint(store.home, settings.webhook_url)
    told = cursor.position.get("webhook") == bell
    if present is not None and ours and told and present.label_config == config.strip():
        return Project(present.id, marker)
    project_id = client.ensure_project(project_key.title(settings), config, marker, PRIORITY_VERSION)
    ensure_webhook(store.home, client, project_id, settings.webhook_url)
    requeued = 0
    with store.ledger.begin() as tx:
        position = {**cursor.position, "project_id": project_id, "webhook": bell}
        tx.update(Cursor, name, position=position)
        if known is not None and not ours:
            requeued = _requeue(tx, known)
    return Project(project_id, marker, requeued)


def known_project(store: Store, client: LabelStudioClient, project_key: ProjectKey = SHARED) -> int | None:
    """Return the id of a project of this store as the ledger has it, without asking; None before the first push."""
    with store.ledger.read() as tx:
        cursor = tx.get(Cursor, cursor_name(client, project_key))
    found = cursor.position["project_id"] if cursor is not None else None
    return int(found) if found is not None else None


def known_projects(store: Store, client: LabelStudioClient) -> dict[int, ProjectKey]:
    """Return this store's projects at a server as the ledger has them, by id, without asking."""
    name = cursor_name(client)
    with store.ledger.read() as tx:
        cursors = [c for c in tx.find(Cursor) if c.name == name or c.name.startswith(f"{name} blind")]
    found = {c.position["project_id"]: c.position for c in cursors if c.position["project_id"] is not None}
    return {number: ProjectKey(at.get("blind", False), at.get("reader")) for number, at in sorted(found.items())}


def is_ours(store: Store, client: LabelStudioClient, project_id: int, project_key: ProjectKey = SHARED) -> bool:
    """Return whether a project is the one of this store, by its marker; an emptied server counts from 1 again."""
    with store.ledger.read() as tx:
        cursor = tx.get(Cursor, cursor_name(client, project_key))
    project = client.project(project_id)
    return cursor is not None and project is not None and cursor.position["marker"] in project.description


def cursor_name(client: LabelStudioClient, project_key: ProjectKey = SHARED) -> str:
    """Return the name of the cursor that keeps a project at this server."""
    return f"labeling.project {client.server}{project_key.suffix}"


def _requeue(tx: Transaction, project_id: int) -> int:
    open_items = tx.find(ReviewItem, where={"project_id": project_id, "state": ReviewState.PUSHED})
    for item in open_items:
        tx.update(ReviewItem, item.id, state=ReviewState.NEW, project_id=None, task_id=None, pushed_at=None)
    return len(open_items)
