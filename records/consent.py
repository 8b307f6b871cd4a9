"""Consent that is taken back: it is lowered by a verb of its own, and no request raises it again.

`none` means that Relook keeps nothing of an image, so lowering to it is an erasure. After lowering to `review` the
image is in no dataset version that is built or loaded from then on; annotators may still see it.
"""

import sqlalchemy as sa

from records import audit
from records.errors import RefusedError, UnknownIdError
from records.ids import utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.store import Store
from records.types import Consent, Image, Prediction

ORDER = tuple(Consent)
"""Lowest first; each level includes the ones before."""
ACTION = "consent.lowered"


def lower(one: Consent, other: Consent) -> Consent:
    """Return the lower of two consents."""
    return min(one, other, key=ORDER.index)


def lower_consent(store: Store, image_id: str, consent: Consent, *, actor: str) -> None:
    """Lower the consent of an image; lowering to what it is already changes nothing.

    Args:
        store: with the image.
        image_id: 64 hex characters.
        consent: `review`; an image whose consent is `none` is erased instead.
        actor: who asked for it, for the audit.
    Raises:
        UnknownIdError: there is no such image, or it is erased.
        RefusedError: the image has a lower consent.
    """
    with store.ledger.begin() as tx:
        image = tx.get(Image, image_id)
        if image is None or image.erased_at is not None:
            raise UnknownIdError(f"no Image has the id {image_id!r}")
        if ORDER.index(consent) > ORDER.index(image.consent):
            raise RefusedError(
                f"the consent of this image is {image.consent}, and {consent} is more; it can be lowered only"
            )
        if consent is not image.consent:
            tx.update(Image, image_id, consent=consent, consent_lowered_at=utc_now())
            details = {"before": image.consent, "after": consent}
            audit.append(tx, actor=actor, action=ACTION, subject=image_id, details=details)


def as_allowed(image: Image | None, wanted: Consent) -> Consent:
    """Return the consent that a request may use, by the image's row: none once it was erased, none raised again."""
    if image is None:
        return wanted
    if image.is_erased_for_good:
        return Consent.NONE
    return lower(image.consent, wanted) if image.consent_lowered_at is not None else wanted


def organisations_of(tx: Transaction, image_id: str) -> set[str]:
    """Return the organisations that sent an image, and the empty name if it was imported."""
    predictions = TABLES[Prediction].c
    sent = sa.select(predictions.organisation).distinct().where(predictions.image_id == image_id)
    found = set(tx.connection.scalars(sent.where(predictions.consent != Consent.NONE)))
    image = tx.get(Image, image_id)
    return found | {""} if image is not None and image.provenance != "served" else found
