"""Labels from annotations: resolved by consensus for dataset versions, and from blind reads for monitoring."""

import logging
from datetime import UTC, datetime

import sqlalchemy as sa

from images.grouping import group_images
from labeling.consensus import ConsensusMethod, resolve
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.parts import in_parts
from records.store import Store
from records.types import Annotation, Image, ReasonCode, ResolvedLabel, ReviewItem

logger = logging.getLogger(__name__)


def resolved_labels(
    store: Store, until: datetime | None = None, method: ConsensusMethod = "majority"
) -> list[ResolvedLabel]:
    """Return the consensus of the annotations of each image.

    Args:
        store: with the annotations.
        until: leave out annotations pulled after this moment; default: none.
        method: setting `labeling.consensus`.
    Returns:
        One entry per image.
    """
    with store.ledger.read() as tx:
        labels = tx.find(Annotation, where={"gold": False}, order_by=("created_at", "id"))
        items = tx.find(ReviewItem)
    if until is not None:
        labels = [label for label in labels if label.created_at <= until]
    # Evaluation uses random images only, read blind: an annotator who sees a prediction tends to agree with it.
    by_chance_alone = {item.id for item in items if item.blind and item.reasons == [ReasonCode.AUDIT_SAMPLE]}
    decided = {item.id for item in items if ReasonCode.ADJUDICATION in item.reasons}
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
