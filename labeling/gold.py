"""Gold tasks: images with a confirmed diagnosis among the blind tasks, which measure the readers.

Only blind tasks have some: all blind tasks look alike, while any other task shows why it was sent and what the model
predicted. The image is one of the train split that its reader has not been asked about. What is answered is kept as an
annotation with `gold` set, and counts neither as a label nor in a consensus.
"""

from collections.abc import Collection

import sqlalchemy as sa

from images.label_rows import Label, strongest
from records.cases import CONFIRMED_RANK
from records.ids import hash_of, utc_now
from records.labelled import counting
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.types import (
    LABEL_RANK,
    Consent,
    Group,
    Image,
    Prediction,
    ReasonCode,
    ReviewItem,
    ReviewState,
    SourceLabel,
    Split,
)

_CONFIRMED = [confirmation for confirmation, rank in LABEL_RANK.items() if rank <= CONFIRMED_RANK]


def add_gold(tx: Transaction, share: float) -> int:
    """Add gold tasks beside the blind review items that wait.

    Args:
        tx: a write transaction.
        share: setting `labeling.gold_share`.
    Returns:
        How many were added.
    """
    if share == 0.0:
        return 0
    added = 0
    waiting = tx.find(ReviewItem, where={"state": ReviewState.NEW, "blind": True}, order_by=("id",))
    for item in waiting:
        # Which items get one follows from their ids, so a push that was killed half-way adds the same ones.
        chosen = hash_of(["gold", item.id])
        if ReasonCode.GOLD in item.reasons or int(chosen[:8], 16) / 16**8 >= share / (1 - share):
            continue
        image_id = _unseen(tx, hash_of(["image", item.id]), item.reader)
        if image_id is None or tx.get(ReviewItem, chosen[:32]) is not None:
            continue
        # The priority of its neighbour: where it stands in the queue says nothing.
        tx.add(
            ReviewItem(
                id=chosen[:32], created_at=utc_now(), image_id=image_id, reasons=[ReasonCode.GOLD],
                priority=item.priority, blind=True, reader=item.reader,
            )
        )  # fmt: skip
        added += 1
    return added


def diagnoses(tx: Transaction, image_ids: Collection[str]) -> dict[str, str]:
    """Return the confirmed diagnosis of each image that has one now, by image id; a corrected label counts at once."""
    found: dict[str, list[Label]] = {}
    for row in tx.find(SourceLabel, where={"image_id": set(image_ids)}):
        found.setdefault(row.image_id, []).append(Label(row.label, row.confirmation, row.source))
    known = {image_id: strongest(counting(rows, lambda row: row.source)) for image_id, rows in found.items()}
    return {i: row.text for i, row in known.items() if row is not None and row.rank <= CONFIRMED_RANK}


def _unseen(tx: Transaction, start: str, reader: str | None) -> str | None:
    """Return a known image that this reader has not been asked about; None if there is none.

    Ids are hashes, so the first one after a hash is a random one.
    """
    images, groups, items = TABLES[Image].c, TABLES[Group].c, TABLES[ReviewItem].c
    labels, predictions = TABLES[SourceLabel].c, TABLES[Prediction].c
    asked = sa.exists().where(
        items.image_id == images.id, sa.or_(items.reader.is_(None), items.reader == reader, sa.literal(reader is None))
    )
    query = (
        sa.select(images.id)
        .join(TABLES[Group], groups.id == images.group_id)
        .where(groups.split == Split.TRAIN, images.erased_at.is_(None), images.consent != Consent.NONE)
        .where(sa.exists().where(labels.image_id == images.id, labels.confirmation.in_(_CONFIRMED)), sa.not_(asked))
        # An image that a caller sent as well is one whose annotations the caller is told about.
        .where(sa.not_(sa.exists().where(predictions.image_id == images.id)))
        .order_by(images.id)
        .limit(1)
    )
    found: str | None = tx.connection.scalar(query.where(images.id >= start))
    return found or tx.connection.scalar(query)
