"""Where readers disagree, somebody decides: an adjudication is one more question about the image."""

from labeling.consensus import contested
from records.ids import hash_of, utc_now
from records.store import Store
from records.types import Annotation, ReasonCode, ReviewItem

PRIORITY = 150.0
"""Between flags and referrals: two people have spent their time already."""


def ask_to_decide(store: Store, threshold: float) -> int:
    """Write a question about each image whose readers agree too little.

    Args:
        store: with the answers.
        threshold: setting `labeling.adjudicate_below`.
    Returns:
        How many were written. An image that has been asked about is not asked again, whatever came of it.
    """
    with store.ledger.begin() as tx:
        disputed = contested(tx.find(Annotation, order_by=("created_at", "id")), threshold)
        questions = [_question(tx.require(ReviewItem, rows[-1].review_item_id)) for rows in disputed.values()]
        known = {item.id for item in tx.find(ReviewItem, where={"id": [question.id for question in questions]})}
        fresh = [question for question in questions if question.id not in known]
        tx.add(*fresh)
    return len(fresh)


def _question(about: ReviewItem) -> ReviewItem:
    return ReviewItem(
        id=hash_of(["adjudication", about.image_id])[:32],
        created_at=utc_now(),
        prediction_id=about.prediction_id,
        image_id=about.image_id,
        reasons=[ReasonCode.ADJUDICATION],
        priority=PRIORITY,
        overlay_blob=about.overlay_blob,
    )
