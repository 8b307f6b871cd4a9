"""From what annotators said to what a dataset version reads: the one place where labeling and trainers meet."""

from datetime import datetime

from images.grouping import group_images
from labeling.consensus import ConsensusMethod, resolve
from records.store import Store
from records.types import Annotation, Image, ReasonCode, ResolvedLabel, ReviewItem


def resolved_labels(
    store: Store, until: datetime | None = None, method: ConsensusMethod = "majority"
) -> list[ResolvedLabel]:
    """Return what the readers of each image together say.

    Args:
        store: with the labels.
        until: leave out what was read after this moment; default: everything that was ever pulled.
        method: setting `labeling.consensus`.
    Returns:
        One entry per image.
    """
    with store.ledger.read() as tx:
        labels = tx.find(Annotation, order_by=("created_at", "id"))
        items = tx.find(ReviewItem)
    if until is not None:
        labels = [label for label in labels if label.created_at <= until]
    # A reader who saw the model's answer leans on it, which an evaluation of the model must not.
    by_chance_alone = {item.id for item in items if item.blind and item.reasons == [ReasonCode.AUDIT_SAMPLE]}
    decided = {item.id for item in items if ReasonCode.ADJUDICATION in item.reasons}
    return resolve(labels, by_chance_alone, adjudications=decided, method=method)


def audit_labels(store: Store, method: ConsensusMethod = "majority") -> list[ResolvedLabel]:
    """Return what blind readers say of the images that were drawn at random.

    A drawn image counts whatever else was thought of it, or the sample would lack what is doubted and flagged;
    what was answered to any other question about it does not.

    Args:
        store: with the labels.
        method: setting `labeling.consensus`.
    Returns:
        One entry per image that a blind question about a drawn answer was answered for.
    """
    with store.ledger.read() as tx:
        labels = tx.find(Annotation, where={"blind": True}, order_by=("created_at", "id"))
        drawn = {item.id for item in tx.find(ReviewItem) if ReasonCode.AUDIT_SAMPLE in item.reasons}
    return resolve([label for label in labels if label.review_item_id in drawn], drawn, method=method)


def group_labelled_images(store: Store) -> int:
    """Put images that annotators labelled and that are in no group yet into groups.

    Args:
        store: with the images.
    Returns:
        How many were grouped.
    """
    with store.ledger.read() as tx:
        labelled = {label.image_id for label in tx.find(Annotation, where={"deleted": False})}
        waiting = [image.id for image in tx.find(Image, where={"group_id": None}) if image.id in labelled]
    return group_images(store, waiting) if waiting else 0
