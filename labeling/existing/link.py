"""Linking: a project that somebody else made becomes the one that new review items go to, in place of the shared one.

What is open in another project stays there and is read there. Relook appends the store's marker to the description of
the linked project, by which it is found again; it changes neither its page nor its settings nor other tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from labeling.client import LabelStudioClient
from labeling.existing.fit import require_fit
from labeling.existing.page import LabelPage, read_page
from labeling.project import (
    LEASE,
    LEASE_WAIT_S,
    ProjectKey,
    cursor_name,
    known_projects,
    link_cursors,
    linked_page,
    open_project,
    requeue,
    settle_address,
)
from labeling.settings import LabelingSettings
from records.cursors import set_position
from records.errors import LabelStudioRefusedError, RefusedError, UnknownIdError
from records.ids import new_id
from records.lease import hold
from records.ledger import Transaction
from records.parts import attempt
from records.store import Store
from records.types import Cursor, ReviewItem, ReviewState


@dataclass(frozen=True)
class Linked:
    """What a link means.

    Args:
        project_id: to which new review items go.
        classes: choice of its page to class.
        no_class: choices that mean no class; such annotations are kept and not trained on.
        shows_model: whether its page shows the model's prediction.
        unlinked: number of the project that was linked before.
        open_elsewhere: project to number of review items that are open there and are still read there.
    """

    project_id: int
    classes: dict[str, str]
    no_class: list[str]
    shows_model: bool
    unlinked: int | None
    open_elsewhere: dict[int, int]


@dataclass(frozen=True)
class Unlinked:
    """What became of a link.

    Args:
        project_id: that was linked; None if none was.
        still_open: review items that are open in it and are still read there.
        requeued: review items that wait again, because the project is gone.
    """

    project_id: int | None
    still_open: int = 0
    requeued: int = 0


def link(
    store: Store,
    client: LabelStudioClient,
    settings: LabelingSettings,
    project_id: int,
    *,
    choices: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Linked:
    """Send new review items to a project that somebody else made. Safe to repeat; another link replaces the first.

    Args:
        store: its ledger remembers the link.
        client: connected.
        settings: its webhook is registered for the project.
        project_id: number of the project.
        choices: name of the control whose choices are classes; None takes the only one.
        labels: choice to class, where they are not written alike.
    Returns:
        What it means.
    Raises:
        UnknownIdError: there is no such project.
        RefusedError: it is one of Relook's own, or another process held the lease for over a minute.
        DataError: its page cannot ask for every class, or shows what Relook does not have.
        LabelStudioError: Label Studio cannot be reached.
    """
    settle_address(store, client)
    with hold(store.ledger, LEASE, wait_s=LEASE_WAIT_S):
        own = known_projects(store, client).get(project_id)
        if own is not None and own.linked is None:
            raise RefusedError(f"project {project_id} is Relook's own, to which review items go without a link")
        project = client.project(project_id)
        if project is None:
            raise UnknownIdError(f"the Label Studio at {client.url} has no project {project_id}")
        page = read_page(project.label_config, store.taxonomy, choices=choices, said=labels)
        no_class = require_fit(page, store.taxonomy)
        before = active_link(store, client)
        with store.ledger.begin() as tx:
            marker = _write(tx, client, project_id, page)
        if marker not in project.description:
            body = {"description": f"{project.description} {marker}".strip()}
            client.request("PATCH", f"api/projects/{project_id}/", f"mark project {project_id}", body=body)
        open_project(store, client, settings, ProjectKey(linked=project_id))
        # Last: until here a failure leaves everything as it was.
        with store.ledger.begin() as tx:
            _activate(tx, client, project_id)
        open_items = {number: _open(store, number) for number in known_projects(store, client) if number != project_id}
    replaced = before if before != project_id else None
    return Linked(
        project_id, page.classes(store.taxonomy), no_class, page.shows_model, replaced,
        {number: count for number, count in open_items.items() if count},
    )  # fmt: skip


def unlink(store: Store, client: LabelStudioClient) -> Unlinked:
    """Send new review items to a project of Relook's own again; what is open in the linked one is still read there."""
    settle_address(store, client)
    with hold(store.ledger, LEASE, wait_s=LEASE_WAIT_S):
        number = active_link(store, client)
        if number is None:
            return Unlinked(None)
        present = client.project(number)
        with store.ledger.begin() as tx:
            cursor = next(one for one in link_cursors(tx, client) if one.position["linked"] == number)
            gone = present is None or cursor.position["marker"] not in present.description
            place = {"project_id": None} if gone else {}
            tx.update(Cursor, cursor.name, position={**cursor.position, "active": False, **place})
            requeued = requeue(tx, number) if gone else 0
    return Unlinked(number, _open(store, number), requeued)


def active_link(store: Store, client: LabelStudioClient) -> int | None:
    """Return the number of the linked project, from the ledger, without a request; None without a link."""
    with store.ledger.read() as tx:
        found = [cursor.position["linked"] for cursor in link_cursors(tx, client) if cursor.position["active"]]
    return int(found[0]) if found else None


def linked_pages(store: Store, client: LabelStudioClient, only: int | None = None) -> dict[int, LabelPage]:
    """Return the pages of the projects that are or were linked; LabelStudioRefusedError if `only` has none any more."""
    with store.ledger.read() as tx:
        cursors = [one for one in link_cursors(tx, client) if one.position["project_id"] is not None]
    found = {}
    for cursor in cursors:
        number = int(cursor.position["linked"])
        page = attempt(partial(_page, store, client), cursor) if only in (None, number) else None
        if isinstance(page, LabelPage):
            found[number] = page
        elif isinstance(page, Exception) and only is not None:
            raise page
    return found


def _page(store: Store, client: LabelStudioClient, cursor: Cursor) -> LabelPage:
    project = client.project(cursor.position["linked"])
    if project is None or cursor.position["marker"] not in project.description:
        raise LabelStudioRefusedError(
            f"the linked project {cursor.position['linked']} is gone from Label Studio; `relook label unlink` sends "
            "its open review items to a project of Relook's own"
        )
    return linked_page(store, project.label_config, cursor.position)


def _write(tx: Transaction, client: LabelStudioClient, project_id: int, page: LabelPage) -> str:
    """Write what the link says about the page; return the marker of the project, which stays the same."""
    name = cursor_name(tx, client, ProjectKey(linked=project_id))
    present = tx.get(Cursor, name)
    position = {
        "marker": f"[relook:{new_id()}]" if present is None else present.position["marker"],
        "active": False if present is None else present.position["active"],
        "project_id": project_id,
        "linked": project_id,
        "choices": page.from_name,
        "labels": dict(page.said),
        "shows_model": page.shows_model,
    }
    set_position(tx, name, position)
    return str(position["marker"])


def _activate(tx: Transaction, client: LabelStudioClient, project_id: int) -> None:
    for cursor in link_cursors(tx, client):
        is_wanted = cursor.position["linked"] == project_id
        if cursor.position["active"] != is_wanted:
            tx.update(Cursor, cursor.name, position={**cursor.position, "active": is_wanted})


def _open(store: Store, project_id: int) -> int:
    with store.ledger.read() as tx:
        return tx.count(ReviewItem, where={"state": ReviewState.PUSHED, "project_id": project_id})
