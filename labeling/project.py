"""The Label Studio projects of a store: one shared, one per blind reader, one for blind items without a reader.

A project that somebody else made may be linked in place of the shared one. It is a project of the store as well, whose
page is never changed and which is never made anew.

Blind readers have projects of their own since they would see each other's annotations in a shared one. A project is
found again by a marker in its description, which the ledger keeps in a cursor. A project that was deleted in Label
Studio is made anew and its open review items are requeued; annotations that were read from it stay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from labeling.cases import are_shown
from labeling.client import LabelStudioClient
from labeling.existing.page import LabelPage, read_page
from labeling.queue import Read
from labeling.servers import PROJECT, at_known_address, server_name, settle
from labeling.settings import LabelingSettings
from labeling.tasks import PRIORITY_VERSION, label_config
from labeling.webhooks import ensure_webhook, webhook_fingerprint
from records.errors import LabelStudioRefusedError, UserError
from records.ids import new_id
from records.lease import hold
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.store import Store
from records.types import Annotation, Cursor, LabelValueRecord, ReviewItem, ReviewState

LEASE = "labeling.sync"
"""Name of the lease that push and pull hold while they run, so that only one of them runs at a time."""

# Longer than a lease lasts, so that the lease of a holder that was killed on another machine has run out.
LEASE_WAIT_S = 60.0


@dataclass(frozen=True)
class Project:
    """A project in Label Studio.

    Args:
        id: in Label Studio.
        marker: unique text in its description.
        requeued: review items that are new again because an earlier project was deleted.
        page: its labeling page, if somebody else made it.
        cases: whether its page shows confirmed cases.
    """

    id: int
    marker: str
    requeued: int = 0
    page: LabelPage | None = None
    cases: bool = False


@dataclass(frozen=True)
class ProjectKey:
    """Tells the projects of a store apart.

    Args:
        blind: whether the prediction is left out of its tasks.
        reader: e-mail address of the only reader; None if the project is for everybody.
        linked: number of a project that somebody else made; None if Relook made it.
    """

    blind: bool = False
    reader: str | None = None
    linked: int | None = None

    @property
    def suffix(self) -> str:
        """End of its cursor's name; empty for the shared project."""
        if self.linked is not None:
            return f"{LINKED}{self.linked}"
        return f" blind {self.reader or ''}".rstrip() if self.blind else ""

    def title(self, settings: LabelingSettings) -> str:
        """Return the title of its project; Label Studio takes at most 50 characters."""
        if not self.blind:
            return settings.project_title
        return f"{settings.project_title[:22]}, blind: {self.reader or 'anyone'}"[:50]


SHARED = ProjectKey()
LINKED = " linked "
"""Between the name of a Label Studio and the number of a linked project, in the name of its cursor."""


def settle_address(store: Store, client: LabelStudioClient, *, moved: bool = False) -> str | None:
    """Do what `servers.settle` does, under the lease; neither lease nor request if the address is the one before."""
    if at_known_address(store, client):
        return None
    with hold(store.ledger, LEASE, wait_s=LEASE_WAIT_S):
        return settle(store, client, moved=moved)


def project_key_of(read: Read) -> ProjectKey:
    """Return the key of the project of ours that review items belong to."""
    return ProjectKey(read.blind, read.reader) if read.blind else SHARED


def destinations(store: Store, client: LabelStudioClient) -> Callable[[Read], ProjectKey]:
    """Return what says which project waiting review items go to: the linked one, if there is one, or one of ours."""
    with store.ledger.read() as tx:
        links = [cursor.position for cursor in link_cursors(tx, client) if cursor.position["active"]]
    if not links:
        return project_key_of
    link = links[0]

    def destination(read: Read) -> ProjectKey:
        own = project_key_of(read)
        # A reader has a project of their own. A page that shows no prediction is as good for a blind read as ours.
        fits = own == SHARED or (own == ProjectKey(blind=True) and not link["shows_model"])
        return ProjectKey(linked=link["linked"]) if fits else own

    return destination


def link_cursors(tx: Transaction, client: LabelStudioClient) -> list[Cursor]:
    """Return the cursors of the projects that were linked at a server, the active one among them."""
    start = f"{cursor_name(tx, client)}{LINKED}"
    return [cursor for cursor in tx.find(Cursor, order_by=("name",)) if cursor.name.startswith(start)]


def linked_page(store: Store, label_config: str, position: dict[str, Any]) -> LabelPage:
    """Return the page of a linked project as the link reads it; LabelStudioRefusedError if it does not fit any more."""
    try:
        return read_page(label_config, store.taxonomy, choices=position["choices"], said=position["labels"])
    except UserError as error:
        raise LabelStudioRefusedError(
            f"{error}; the page of the linked project {position['linked']} was changed: change it back or link it again"
        ) from error


def _open_linked(store: Store, client: LabelStudioClient, settings: LabelingSettings, cursor: Cursor) -> Project:
    position, number = cursor.position, int(cursor.position["linked"])
    present = client.project(number)
    if present is not None and position["marker"] in present.description:
        webhook = webhook_fingerprint(store.home, settings.webhook_url)
        if position.get("webhook") != webhook:
            ensure_webhook(store.home, client, number, settings.webhook_url)
            with store.ledger.begin() as tx:
                tx.update(Cursor, cursor.name, position={**position, "webhook": webhook})
        page = linked_page(store, present.label_config, position)
        return Project(number, position["marker"], page=page, cases="cases" in page.keys)
    if position["active"]:
        raise LabelStudioRefusedError(
            f"the linked project {number} is gone from Label Studio, or its description lost {position['marker']}; "
            "`relook label unlink` sends its open review items to a project of Relook's own"
        )
    with store.ledger.begin() as tx:
        tx.update(Cursor, cursor.name, position={**position, "project_id": None})
        return Project(number, position["marker"], requeue(tx, number))


def open_project(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, project_key: ProjectKey = SHARED
) -> Project:
    """Return a project of this store, made or updated if needed; one request if nothing changed."""
    # The marker is in the ledger before the project is made: a process that is killed in between finds its project
    # by the marker instead of making a second one.
    with store.ledger.begin() as tx:
        name = cursor_name(tx, client, project_key)
        cursor = tx.get(Cursor, name)
        if cursor is None:
            whose = {"blind": project_key.blind, "reader": project_key.reader}
            cursor = Cursor(name=name, position={"marker": f"[relook:{new_id()}]", "project_id": None, **whose})
            tx.add(cursor)
    if project_key.linked is not None:
        return _open_linked(store, client, settings, cursor)
    marker: str = cursor.position["marker"]
    known: int | None = cursor.position["project_id"]
    config, cases = own_page(store, settings, project_key)
    present = client.project(known) if known is not None else None
    # The id alone is not enough: a Label Studio that was set up anew counts its projects from 1 again.
    ours = present is not None and marker in present.description
    webhook = webhook_fingerprint(store.home, settings.webhook_url)
    registered = cursor.position.get("webhook") == webhook
    # What an annotator or administrator wrote instead stays until something new was measured.
    text, told = _instruction(store), cursor.position.get("instruction", "") if ours else ""
    if present is not None and ours and registered and text == told and present.label_config == config.strip():
        return Project(present.id, marker, cases=cases)
    project_id = client.ensure_project(project_key.title(settings), config, marker, PRIORITY_VERSION)
    if text != told:
        body = {"expert_instruction": text}
        client.request("PATCH", f"api/projects/{project_id}", "write the instruction", body=body)
    ensure_webhook(store.home, client, project_id, settings.webhook_url)
    requeued = 0
    with store.ledger.begin() as tx:
        position = {**cursor.position, "project_id": project_id, "webhook": webhook, "instruction": text}
        tx.update(Cursor, name, position=position)
        if known is not None and not ours:
            requeued = requeue(tx, known)
    return Project(project_id, marker, requeued, cases=cases)


def own_page(store: Store, settings: LabelingSettings, project_key: ProjectKey) -> tuple[str, bool]:
    """Return the labeling page of a project of Relook's own, and whether it shows confirmed cases."""
    cases = not project_key.blind and are_shown(store, settings)
    # Label Studio refuses a page without a control that annotations have used.
    outline = settings.outline or _is_painted(store)
    return label_config(store.taxonomy, blind=project_key.blind, cases=cases, outline=outline), cases


def _instruction(store: Store) -> str:
    """Return what Label Studio shows as a project's instruction: what the last annotations bought, once measured."""
    with store.ledger.read() as tx:
        newest = tx.find(LabelValueRecord, order_by=("-created_at", "-id"), limit=1)
    found = newest[0].figures["last_round"] if newest else None
    if found is None or found["gain"]["value"] is None:
        return ""
    gain = "{value:+.3f} (95 % interval {low:+.3f} to {high:+.3f})".format_map(found["gain"])
    changed = sum(found["changed"].values())
    return (
        f"<p>The annotations of round {found['number']} gave {found['new']} images their first label and changed that "
        f"of {changed}. With them balanced accuracy is {gain}: {found['set_right']} images of val are decided right "
        f"only with them, {found['set_wrong']} only without.</p>"
    )


def _is_painted(store: Store) -> bool:
    column = TABLES[Annotation].c.outline
    with store.ledger.read() as tx:
        return tx.connection.scalar(sa.select(sa.literal(1)).where(column.is_not(None)).limit(1)) is not None


def known_project(store: Store, client: LabelStudioClient, project_key: ProjectKey = SHARED) -> int | None:
    """Return the id of a project of this store from the ledger, without a request; None before the first push."""
    with store.ledger.read() as tx:
        cursor = tx.get(Cursor, cursor_name(tx, client, project_key))
    found = cursor.position["project_id"] if cursor is not None else None
    return int(found) if found is not None else None


def known_projects(store: Store, client: LabelStudioClient) -> dict[int, ProjectKey]:
    """Return this store's projects at a server by id, from the ledger, without a request."""
    with store.ledger.read() as tx:
        name = cursor_name(tx, client)
        ours = (f"{name} blind", f"{name}{LINKED}")
        cursors = [c for c in tx.find(Cursor) if c.name == name or c.name.startswith(ours)]
    found = {c.position["project_id"]: c.position for c in cursors if c.position["project_id"] is not None}
    keys = {number: (at.get("blind", False), at.get("reader"), at.get("linked")) for number, at in found.items()}
    return {number: ProjectKey(*keys[number]) for number in sorted(keys)}


def is_ours(store: Store, client: LabelStudioClient, project_id: int, project_key: ProjectKey = SHARED) -> bool:
    """Return whether a project carries the marker of this store."""
    with store.ledger.read() as tx:
        cursor = tx.get(Cursor, cursor_name(tx, client, project_key))
    project = client.project(project_id)
    return cursor is not None and project is not None and cursor.position["marker"] in project.description


def cursor_name(tx: Transaction, client: LabelStudioClient, project_key: ProjectKey = SHARED) -> str:
    """Return the name of the cursor that holds a project's id and marker at this server."""
    return f"{PROJECT}{server_name(tx, client)}{project_key.suffix}"


def requeue(tx: Transaction, project_id: int) -> int:
    """Let the open review items of a project wait again; return their number."""
    # Items that were answered stay answered: their annotations are in the ledger.
    open_items = tx.find(ReviewItem, where={"project_id": project_id, "state": ReviewState.PUSHED})
    waits = {"state": ReviewState.NEW, "project_id": None, "task_id": None, "pushed_at": None}
    tx.update_many(ReviewItem, {item.id: waits for item in open_items})
    return len(open_items)
