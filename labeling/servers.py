"""Which Label Studio holds the tasks of a store, also after its address changed.

A store has its open tasks in one Label Studio, whose name and address are in the ledger. The markers of the store's
projects tell whether another address leads to the same one. If it does, the name stays, so everything that was read
keeps its place. If it does not, push and pull refuse to go on while review items are open at the old address, because
their annotations would never be read.
"""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from labeling.client import LabelStudioClient
from records.cursors import set_position
from records.errors import RefusedError
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.redaction import without_secrets
from records.store import Store
from records.types import Cursor, Image, ReviewItem, ReviewState

DELETED = "erased"
"""`sent_hash` of a review item whose task was deleted because its image was erased."""
_CURRENT = "labeling.server"
PROJECT = "labeling.project "
"""Start of the name of a cursor that says which project the store has in a Label Studio."""


@dataclass(frozen=True)
class Move:
    """A Label Studio at another address than the last one that was used.

    Args:
        name: of the Label Studio at the new address, under which its annotations are stored.
        same: whether it is the one that holds the open tasks.
        old_url: the address before.
        items: review items that are open there.
        erased: erased images whose tasks may still be there.
        sent: review items with a task there, annotated or not.
    """

    name: str
    same: bool
    old_url: str
    items: int
    erased: int
    sent: int

    @property
    def is_loss(self) -> bool:
        """Whether going on would leave tasks behind that nobody reads or deletes."""
        return not self.same and bool(self.items or self.erased)


def server_name(tx: Transaction, client: LabelStudioClient) -> str:
    """Return the name under which projects and annotations of this Label Studio are stored."""
    current = tx.get(Cursor, _CURRENT)
    if current is not None and current.position["url"] == _address(client):
        return str(current.position["name"])
    return client.server


def at_known_address(store: Store, client: LabelStudioClient) -> bool:
    """Return whether the address is the one that was used last."""
    with store.ledger.read() as tx:
        current = tx.get(Cursor, _CURRENT)
    return current is not None and current.position["url"] == _address(client)


def find_move(store: Store, client: LabelStudioClient) -> Move | None:
    """Return what became of the open tasks if the address changed, else None; no request if it did not."""
    if at_known_address(store, client):
        return None
    with store.ledger.read() as tx:
        current = tx.get(Cursor, _CURRENT)
        projects = [cursor for cursor in tx.find(Cursor, order_by=("name",)) if cursor.name.startswith(PROJECT)]
        counts = _counts(tx)
    names = [cursor.name.removeprefix(PROJECT).split(" ")[0] for cursor in projects]
    if current is not None:
        position = current.position
    else:
        first = client.server if client.server in names or not names else names[0]
        position = {"name": first, "url": first}
    if not names:
        return Move(client.server, True, position["url"], *counts)
    descriptions = " ".join(client.descriptions().values())
    known = [name for name, one in zip(names, projects, strict=True) if one.position["marker"] in descriptions]
    if position["name"] in known:
        return Move(position["name"], True, position["url"], *counts)
    return Move(known[0] if known else _unused(client, names), False, position["url"], *counts)


def settle(store: Store, client: LabelStudioClient, *, moved: bool = False) -> str | None:
    """Make the ledger agree with a new address of Label Studio; the caller holds the lease `labeling.sync`.

    Args:
        store: its ledger says where the open tasks are.
        client: connected to the address of the settings.
        moved: whether to send open review items again if they are not at this address.
    Returns:
        One sentence about what was done; None if the address is the one before, or nothing depends on it.
    Raises:
        RefusedError: review items are open at the old address and not at this one, and `moved` is not set.
        LabelStudioError: Label Studio cannot be reached.
    """
    move = find_move(store, client)
    if move is None:
        return None
    if move.is_loss and not moved:
        raise RefusedError(unsettled(move, client))
    with store.ledger.begin() as tx:
        if not move.same:
            _detach(tx)
        position = {"name": move.name, "url": _address(client)}
        set_position(tx, _CURRENT, position)
    if move.same:
        said = f"Label Studio moved from {move.old_url} to {_address(client)}, with {move.items} open review items"
        return said if move.items and move.name != "local" else None
    if not move.sent:
        return None
    return (
        f"{move.items} open review items of {move.old_url} go to {_address(client)}, except those that have a task "
        "there already; annotations that were not read stay at the old address, and tasks of images that are erased "
        "have to be deleted there by hand"
    )


def unsettled(move: Move, client: LabelStudioClient) -> str:
    """Return the sentence about tasks that lie at an old address."""
    what = [f"{move.items} open review items"] if move.items else []
    what += [f"tasks of {move.erased} erased images"] if move.erased else []
    here = _address(client)
    return (
        f"{' and '.join(what)} are in the Label Studio at {move.old_url}, and the one at {here} has none of their "
        "projects; set labeling.url back to read their annotations, or run `relook label sync --moved` to send "
        "them again to the new address"
    )


def _counts(tx: Transaction) -> tuple[int, int, int]:
    """Return how many review items are open, how many erased images have tasks, and how many items have one."""
    items, images = TABLES[ReviewItem].c, TABLES[Image].c
    sent = sa.select(sa.func.count()).where(items.task_id.is_not(None))
    erased = sa.select(sa.func.count(items.image_id.distinct())).join(TABLES[Image], images.id == items.image_id)
    erased = erased.where(images.erased_at.is_not(None), items.sent_hash.is_distinct_from(DELETED))
    erased = erased.where(items.task_id.is_not(None))
    open_items = tx.count(ReviewItem, where={"state": ReviewState.PUSHED})
    return open_items, int(tx.connection.execute(erased).scalar_one()), int(tx.connection.execute(sent).scalar_one())


def _detach(tx: Transaction) -> None:
    """Take review items off their tasks: numbers of projects and tasks mean nothing in another Label Studio."""
    table = TABLES[ReviewItem]
    at: dict[str, Any] = {"project_id": None, "task_id": None, "pushed_at": None}
    sent = sa.update(table).where(table.c.task_id.is_not(None))
    waiting = {**at, "state": ReviewState.NEW, "sent_hash": None}
    tx.connection.execute(sent.where(table.c.state == ReviewState.PUSHED).values(**waiting))
    # Their annotations are in the ledger and say where they came from.
    tx.connection.execute(sent.where(table.c.state != ReviewState.NEW).values(project_id=None, task_id=None))


def _address(client: LabelStudioClient) -> str:
    """Return the address as it may be stored and shown."""
    return without_secrets(client.url)


def _unused(client: LabelStudioClient, names: list[str]) -> str:
    """Return a name that no Label Studio of this store has; local ones at other ports are all called local."""
    url = _address(client)
    candidates = [client.server, url, *(f"{url}#{number}" for number in range(2, len(names) + 3))]
    return next(name for name in candidates if name not in names)
