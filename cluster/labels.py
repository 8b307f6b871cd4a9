"""Labels from annotations: resolved by consensus for dataset versions, and from blind reads for monitoring."""

import logging
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from images.grouping import group_images
from labeling.consensus import ConsensusMethod, resolve
from records.ledger import Transaction
from records.ledger.tables import CONSENSUS, TABLES, any_of
from records.parts import in_parts
from records.store import Store
from records.types import Annotation, Image, ReasonCode, ResolvedLabel, ReviewItem

logger = logging.getLogger(__name__)
_KEPT_AT_ONCE = 10_000
_SAID = TABLES[Annotation].c


def resolved_labels(
    store: Store, until: datetime | None = None, method: ConsensusMethod = "majority"
) -> list[ResolvedLabel]:
    """Return the consensus of the annotations of each image.

    That of a majority is kept: only annotations of images about which something was said since are read. Dawid-Skene
    weighs annotators by everything that they said, so all annotations are read.

    Args:
        store: with the annotations.
        until: leave out annotations pulled after this moment; default: none.
        method: setting `labeling.consensus`.
    Returns:
        One entry per image.
    """
    if method != "majority":
        with store.ledger.read() as tx:
            return _resolved(tx, None, until, method)
    _keep(store)
    with store.ledger.read() as tx:
        fresh = set(tx.connection.scalars(sa.select(CONSENSUS.c.image_id).where(CONSENSUS.c.stale.is_(True))))
        if until is not None:
            late = sa.select(_SAID.image_id).where(_SAID.created_at > until)
            fresh.update(tx.connection.scalars(late))
        rows = tx.connection.execute(sa.select(CONSENSUS.c.resolved).where(CONSENSUS.c.resolved.is_not(None)))
        known = [ResolvedLabel.model_validate(row.resolved) for row in rows if row.resolved["image_id"] not in fresh]
        found = [*known, *(_resolved(tx, fresh, until, method) if fresh else ())]
    return sorted(found, key=lambda one: one.image_id)


def _keep(store: Store) -> None:
    """Write down the consensus of images about which something was said since it was last computed."""
    while True:
        stale = sa.select(CONSENSUS.c.image_id).where(CONSENSUS.c.stale.is_(True)).limit(_KEPT_AT_ONCE)
        with store.ledger.read() as tx:
            if not tx.connection.scalars(stale).first():
                return
        with store.ledger.begin() as tx:
            ids = list(tx.connection.scalars(stale))
            found = {one.image_id: one.model_dump(mode="json") for one in _resolved(tx, ids, None, "majority")}
            rows = [{"of": image_id, "kept": found.get(image_id)} for image_id in ids]
            changed = sa.update(CONSENSUS).where(CONSENSUS.c.image_id == sa.bindparam("of"))
            if rows:
                tx.connection.execute(changed.values(stale=False, resolved=sa.bindparam("kept")), rows)


def _resolved(
    tx: Transaction, image_ids: Collection[str] | None, until: datetime | None, method: ConsensusMethod
) -> list[ResolvedLabel]:
    """Return the consensus of some images, or of all that were annotated."""
    where: dict[str, Any] = {"gold": False} if image_ids is None else {"gold": False, "image_id": list(image_ids)}
    labels = tx.find(Annotation, where=where, order_by=("created_at", "id"))
    if until is not None:
        labels = [label for label in labels if label.created_at <= until]
    items = TABLES[ReviewItem].c
    mine = any_of(items.id, {label.review_item_id for label in labels}, tx.connection.dialect)
    about = tx.connection.execute(sa.select(items.id, items.blind, items.reasons).where(mine)).all()
    # Evaluation uses random images only, read blind: an annotator who sees a prediction tends to agree with it.
    by_chance_alone = {row.id for row in about if row.blind and row.reasons == [ReasonCode.AUDIT_SAMPLE]}
    decided = {row.id for row in about if ReasonCode.ADJUDICATION in row.reasons}
    return resolve(labels, by_chance_alone, adjudications=decided, method=method)


def newest_annotation(store: Store) -> datetime:
    """Return `created_at` of the newest annotation, tombstones included; 1970 without any. A later one is greater."""
    with store.ledger.read() as tx:
        newest: datetime | None = tx.connection.scalar(sa.select(sa.func.max(TABLES[Annotation].c.created_at)))
    return newest or datetime.fromtimestamp(0, UTC)


def audit_labels(store: Store, method: ConsensusMethod = "majority") -> list[ResolvedLabel]:
    """Return the consensus of blind readers on the images of the random audit sample, one entry per read image.

    An image stays in the sample if it was also doubted or flagged, or the sample would lack the hard cases. Only the
    annotations of the audit's own review item count, not those of other review items of the image.
    """
    with store.ledger.read() as tx:
        drawn = {item.id for item in drawn_items(tx)}
        labels = tx.find(Annotation, {"review_item_id": drawn, "blind": True}, order_by=("created_at", "id"))
    return resolve(labels, drawn, method=method)


def drawn_items(tx: Transaction) -> list[ReviewItem]:
    """Return the review items of the random audit sample, found by an index instead of among all items."""
    # `> 0` and not `is_not(None)`, for which SQLite reads the table.
    table = TABLES[ReviewItem]
    query = sa.select(table).where(table.c.selection_probability > 0)
    items = (ReviewItem.model_validate(dict(row)) for row in tx.connection.execute(query).mappings())
    return [item for item in items if ReasonCode.AUDIT_SAMPLE in item.reasons]


def group_labelled_images(store: Store) -> int:
    """Assign groups to annotated images that have none; return how many.

    An image that cannot be read is logged and gets no group, so no model learns from it until it is restored.
    """
    with store.ledger.read() as tx:
        labelled = {label.image_id for label in tx.find(Annotation, where={"deleted": False})}
        waiting = [image.id for image in tx.find(Image, where={"group_id": None}) if image.id in labelled]
    parts = in_parts(waiting, lambda some: group_images(store, list(some)))
    for part in parts:
        if isinstance(part.result, Exception):
            logger.warning("image %s was annotated and cannot be grouped: %s", part.members[0][:12], part.result)
    return sum(part.result for part in parts if isinstance(part.result, int))
