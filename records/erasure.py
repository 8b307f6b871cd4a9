"""The right to erasure: what shows an image goes, and the tombstone that it was there stays.

In: the id of an image. Out: what was removed. Gone are the stored bytes, the heat maps over them and
everything that was said of the person; the id, the answers that were given and the labels stay, so
that the audit and the content hashes of dataset versions still hold. Loading a dataset version leaves
out what was erased, so nothing trains on it again. Decoded pixels belong to `images.forget`.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

from records import audit
from records.ids import utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES, any_of
from records.store import Store
from records.types import Flag, Image, Prediction, ReviewItem, ReviewState

PERSONAL = (
    "source_id",
    "lesion_id",
    "patient_hash",
    "age_years",
    "sex",
    "localization",
    "device",
    "site",
    "acquired_at",
    "perceptual_hash",
)
"""Fields of an image that may point at the person in it."""


class Erasure(BaseModel):
    """What an erasure removed."""

    model_config = ConfigDict(frozen=True)

    image_id: str
    blobs: int = Field(ge=0, description="images and heat maps removed from the blob store")
    withdrawn: int = Field(ge=0, description="open questions to annotators that were taken back")
    left_in_place: str | None = Field(
        default=None, description="path of an image that was imported in place; its file belongs to somebody else"
    )


def erase_image(store: Store, image_id: str, *, actor: str) -> Erasure:
    """Erase an image; erasing it again finishes what a killed run left and is no second event.

    Args:
        store: with ledger and blobs.
        image_id: 64 hex characters.
        actor: who asks, for the audit.
    Returns:
        What was removed.
    Raises:
        UnknownIdError: there is no such image.
        UnavailableError: a blob cannot be removed; run it again.
    """
    # First nobody may read it any more, then the bytes go: a kill in between leaves nothing readable by Relook.
    with store.ledger.begin() as tx:
        image = tx.require(Image, image_id)
        items = tx.find(ReviewItem, where={"image_id": image_id})
        open_items = [item for item in items if item.state in (ReviewState.NEW, ReviewState.PUSHED)]
        for item in open_items:
            tx.update(ReviewItem, item.id, state=ReviewState.WITHDRAWN)
        # One whose time was over might come back; one that a person wants gone may not.
        if not image.is_erased_for_good:
            forget_people(tx, [image_id])
            tx.update(Image, image_id, erased_at=utc_now(), expired_at=None)
            audit.append(tx, actor=actor, action="image.erased", subject=image_id)
    stored_here = image.uri.endswith(image.id)
    blobs = [item.overlay_blob for item in items if item.overlay_blob is not None]
    for blob_id in [*blobs, *([image.id] if stored_here else [])]:
        store.blobs.delete(blob_id)
    with store.ledger.begin() as tx:
        for item in items:
            if item.overlay_blob is not None:
                tx.update(ReviewItem, item.id, overlay_blob=None)
    return Erasure(
        image_id=image_id,
        blobs=len(blobs) + stored_here,
        withdrawn=len(open_items),
        left_in_place=None if stored_here else urlsplit(image.uri).path,
    )


def erased_ids(tx: Transaction) -> set[str]:
    """Return the ids of all images that were erased.

    Args:
        tx: any transaction.
    Returns:
        Image ids.
    """
    images = TABLES[Image].c
    return set(tx.connection.scalars(sa.select(images.id).where(images.erased_at.is_not(None))))


def forget_people(tx: Transaction, image_ids: Collection[str]) -> None:
    """Blank what was said of the people in images.

    Args:
        tx: a write transaction.
        image_ids: of the images; their ids, answers and labels stay.
    """
    # These fields never change otherwise, so records cannot express it.
    images, predictions, flags, items = (TABLES[t] for t in (Image, Prediction, Flag, ReviewItem))
    dialect = tx.connection.dialect
    about = any_of(predictions.c.image_id, image_ids, dialect)
    answers = sa.select(predictions.c.id).where(about)
    for statement in (
        sa.update(images).where(any_of(images.c.id, image_ids, dialect)).values(dict.fromkeys(PERSONAL)),
        sa.update(predictions).where(about).values(context={}),
        sa.update(flags).where(flags.c.prediction_id.in_(answers)).values(comment=None),
        sa.update(items).where(any_of(items.c.image_id, image_ids, dialect)).values(comment=None),
    ):
        tx.connection.execute(statement)


def make_way(tx: Transaction, image_ids: Collection[str]) -> None:
    """Remove the tombstones of images whose time was over, so that they can be entered anew.

    Args:
        tx: a write transaction, which enters them.
        image_ids: of images that come in; the tombstone of one that was erased on request stays.
    """
    images = TABLES[Image]
    known = any_of(images.c.id, image_ids, tx.connection.dialect)
    tx.connection.execute(sa.delete(images).where(known, images.c.expired_at.is_not(None)))
