"""Erasure on request: everything that shows an image is deleted, and a tombstone remains.

The stored bytes, the heat maps over them and all personal data are deleted. The id, the predictions and the labels
stay, so that the audit chain and the content hashes of dataset versions still hold. Loading a dataset version leaves
out erased images, so no model is trained on them again. Decoded pixels are blanked by `images.cache.blank_pixels`.
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
    "source_id", "lesion_id", "patient_hash", "age_years", "sex", "localization", "device", "site", "acquired_at",
    "perceptual_hash",
)  # fmt: skip
"""Fields of an image that may point at the person in it."""


class Erasure(BaseModel):
    """What an erasure removed."""

    model_config = ConfigDict(frozen=True)

    image_id: str
    blobs: int = Field(ge=0, description="images and heat maps removed from the blob store")
    withdrawn: int = Field(ge=0, description="open review items that were withdrawn")
    left_in_place: str | None = Field(
        default=None,
        description="path of an image that was imported in place; Relook does not delete files it did not write",
    )


def erase_image(store: Store, image_id: str, *, actor: str) -> Erasure:
    """Erase an image; repeating it finishes what a killed run left and adds no second audit event.

    Args:
        store: its ledger and blobs are changed.
        image_id: 64 hex characters.
        actor: who asked for it, for the audit.
    Returns:
        What was removed.
    Raises:
        UnknownIdError: there is no such image.
        UnavailableError: a blob cannot be removed; run it again.
    """
    # The ledger first: once the tombstone is committed Relook serves the image no more, so a kill before the bytes
    # are deleted leaves nothing that can be read through it.
    with store.ledger.begin() as tx:
        image = tx.require(Image, image_id)
        items = tx.find(ReviewItem, where={"image_id": image_id})
        open_items = [item for item in items if item.state in (ReviewState.NEW, ReviewState.PUSHED)]
        for item in open_items:
            tx.update(ReviewItem, item.id, state=ReviewState.WITHDRAWN)
        # An image that merely expired could be added again, so its tombstone becomes a permanent one.
        if not image.is_erased_for_good:
            blank_personal_fields(tx, [image_id])
            tx.update(Image, image_id, erased_at=utc_now(), expired_at=None)
            audit.append(tx, actor=actor, action="image.erased", subject=image_id)
    # A blob's URI ends in its id; any other URI is a file that was imported in place.
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
    """Return the ids of all erased images."""
    images = TABLES[Image].c
    return set(tx.connection.scalars(sa.select(images.id).where(images.erased_at.is_not(None))))


def blank_personal_fields(tx: Transaction, image_ids: Collection[str]) -> None:
    """Blank what the records say about the people in images; ids, predictions and labels stay."""
    # In SQL, since the record types declare these fields immutable.
    images, predictions, flags, items = (TABLES[t] for t in (Image, Prediction, Flag, ReviewItem))
    dialect = tx.connection.dialect
    about = any_of(predictions.c.image_id, image_ids, dialect)
    prediction_ids = sa.select(predictions.c.id).where(about)
    for statement in (
        sa.update(images).where(any_of(images.c.id, image_ids, dialect)).values(dict.fromkeys(PERSONAL)),
        sa.update(predictions).where(about).values(context={}),
        sa.update(flags).where(flags.c.prediction_id.in_(prediction_ids)).values(comment=None),
        sa.update(items).where(any_of(items.c.image_id, image_ids, dialect)).values(comment=None),
    ):
        tx.connection.execute(statement)


def remove_expired_tombstones(tx: Transaction, image_ids: Collection[str]) -> None:
    """Remove the tombstones of expired images, so that the caller's write transaction can add them anew.

    The tombstone of an image that was erased on request stays.
    """
    images = TABLES[Image]
    known = any_of(images.c.id, image_ids, tx.connection.dialect)
    tx.connection.execute(sa.delete(images).where(known, images.c.expired_at.is_not(None)))
