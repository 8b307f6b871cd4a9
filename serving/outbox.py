"""What is written down: answers, questions to the annotators, and flags, each in one transaction.

In: verdicts and requests. Out: rows of the ledger. A question is written in the transaction that causes
it, so neither exists without the other; labeling drains the questions later. An image whose consent is
`none` is neither stored nor asked about.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from records.erasure import make_way
from records.errors import RefusedError
from records.ids import new_id, utc_now
from records.ledger import Transaction
from records.patients import patient_hash
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import (
    Consent,
    Decision,
    Flag,
    Image,
    Prediction,
    ReasonCode,
    ReviewItem,
    ReviewState,
)
from serving.schemas import Context, FlagRequest
from serving.triage import Verdict, priority_of

OPEN_STATES = (ReviewState.NEW, ReviewState.PUSHED)


@dataclass(frozen=True)
class StoredImage:
    """The bytes as they are stored, and what their header says."""

    id: str
    data: bytes
    format: str
    width_px: int
    height_px: int


@dataclass(frozen=True)
class PredictionRows:
    """All rows of one answer, and the image of its image row."""

    prediction: Prediction
    image: Image | None
    review: ReviewItem | None
    stored: StoredImage | None = None


def image_row(store: Store, image: StoredImage, context: Context, consent: Consent, now: datetime) -> Image:
    """Make the row of an image that came in over HTTP.

    Args:
        store: whose blob store keeps the bytes.
        image: as stored.
        context: what the caller said of it.
        consent: that it came with.
        now: the time of the answer.
    Returns:
        The row; the patient's id enters only as a salted hash.
    """
    return Image(
        id=image.id,
        uri=store.blobs.uri(image.id),
        format=image.format,
        width_px=image.width_px,
        height_px=image.height_px,
        lesion_id=context.lesion_id,
        patient_hash=patient_hash(store.home, context.patient_id) if context.patient_id else None,
        age_years=context.age,
        sex=context.sex,
        localization=context.localization,
        device=context.device,
        site=context.site,
        acquired_at=context.acquired_at,
        provenance="served",
        consent=consent,
        created_at=now,
    )


def review_row(prediction: Prediction, verdict: Verdict, overlay_blob: str | None, urgent_due_h: float) -> ReviewItem:
    """Make the question that an answer raises.

    Args:
        prediction: the answer.
        verdict: with at least one reason.
        overlay_blob: blob of the heat map over the image.
        urgent_due_h: how soon an urgent one should be seen, hours.
    Returns:
        The row.
    """
    is_urgent = ReasonCode.URGENT in verdict.reasons
    return ReviewItem(
        id=new_id(),
        created_at=prediction.created_at,
        prediction_id=prediction.id,
        image_id=prediction.image_id,
        reasons=list(verdict.reasons),
        priority=verdict.priority,
        due=prediction.created_at + timedelta(hours=urgent_due_h) if is_urgent else None,
        selection_probability=verdict.selection_probability,
        overlay_blob=overlay_blob,
    )


def write_predictions(store: Store, answers: Sequence[PredictionRows]) -> list[ReviewItem | None]:
    """Write answers with their images and questions, in one transaction.

    An image that already waits for an annotator is not asked about twice: the waiting question takes
    the new reasons.

    Args:
        store: with the ledger.
        answers: of one micro-batch.
    Returns:
        For each answer the question that it led to, if any.
    Raises:
        RefusedError: an idempotency key was used before; nothing of the batch is written then.
        UnavailableError: the ledger does not answer.
    """
    images = {answer.image.id: answer.image for answer in answers if answer.image is not None}
    # What is asked of the database first is whether it knows these images and keys, and what waits for the images.
    keys = {answer.prediction.idempotency_key for answer in answers}
    with store.ledger.begin(touches={*images, *(key for key in keys if key is not None)}) as tx:
        known = {image.id: image for image in tx.find(Image, where={"id": list(images)})} if images else {}
        expired = {image_id for image_id, image in known.items() if image.expired_at is not None}
        if expired:
            make_way(tx, expired)
            _store_again(store, [a.stored for a in answers if a.stored is not None and a.stored.id in expired])
        new_images = [image for image_id, image in images.items() if image_id not in known or image_id in expired]
        asked, new_questions = _ask(tx, [answer.review for answer in answers])
        tx.add(*new_images, *(answer.prediction for answer in answers), *new_questions)
    return asked


def _store_again(store: Store, images: Sequence[StoredImage]) -> None:
    """Put images back that may have gone since they were stored on arrival; nothing is deleted meanwhile."""
    for image in images:
        store.blobs.put(image.data)


def _ask(tx: Transaction, questions: Sequence[ReviewItem | None]) -> tuple[list[ReviewItem | None], list[ReviewItem]]:
    """Return the question that each one led to, and those of them that are to be added; the others are updated."""
    image_ids = sorted({question.image_id for question in questions if question is not None})
    waiting = _waiting(tx, image_ids) if image_ids else {}
    stored = dict(waiting)
    for question in questions:
        if question is None:
            continue
        before = waiting.get(question.image_id)
        waiting[question.image_id] = question if before is None else _merged(before, question)
    fresh = [item for image_id, item in waiting.items() if image_id not in stored or item.id != stored[image_id].id]
    for image_id, item in waiting.items():
        if image_id in stored and item.id == stored[image_id].id and item != stored[image_id]:
            tx.update(ReviewItem, item.id, reasons=list(item.reasons), priority=item.priority)
    return [None if question is None else waiting[question.image_id] for question in questions], fresh


def _waiting(tx: Transaction, image_ids: Sequence[str]) -> dict[str, ReviewItem]:
    items = tx.find(ReviewItem, where={"image_id": list(image_ids), "state": list(OPEN_STATES)}, order_by=("id",))
    # What a blind reader is asked says nothing of reasons or comments, so it takes them in only where it is alone.
    return {item.image_id: item for item in sorted(items, key=lambda item: not item.blind)}


def _merged(waiting: ReviewItem, question: ReviewItem) -> ReviewItem:
    if (question.due and not waiting.due) or (question.selection_probability and not waiting.selection_probability):
        # A deadline and a drawn sample are facts of one question and never change in it.
        return question
    reasons = [*waiting.reasons, *(reason for reason in question.reasons if reason not in waiting.reasons)]
    return waiting.model_copy(update={"reasons": reasons, "priority": max(waiting.priority, question.priority)})


def find_repeated(store: Store, caller: str, idempotency_key: str) -> Prediction | None:
    """Return the answer that was given to this key before, if any."""
    where = {"caller": caller, "idempotency_key": idempotency_key, "served": True}
    with store.ledger.read() as tx:
        found = tx.find(Prediction, where=where, limit=1)
    return found[0] if found else None


def review_of(tx: Transaction, prediction: Prediction) -> ReviewItem | None:
    """Return the newest question that an answer led to, its own or the one that its image waits with."""
    items = tx.find(ReviewItem, where={"prediction_id": prediction.id}, order_by=("-id",))
    if not items and prediction.decision in (Decision.REVIEW, Decision.URGENT):
        items = tx.find(ReviewItem, where={"image_id": prediction.image_id}, order_by=("-id",))
    return next((item for item in items if item.state is not ReviewState.WITHDRAWN), None)


def write_flag(
    store: Store, prediction: Prediction, request: FlagRequest, caller: str, overlay_blob: str | None
) -> tuple[Flag, ReviewItem]:
    """Write an objection and its question to the annotators, in one transaction.

    A question that already waits takes the objection in and moves up. An equal objection of the same
    caller is not written twice.

    Args:
        store: with the ledger and the taxonomy.
        prediction: that is objected to.
        request: the objection.
        caller: who objects.
        overlay_blob: blob of the heat map, for a question that has none yet.
    Returns:
        The objection and the question it led to.
    Raises:
        RefusedError: the image's consent does not allow that an annotator sees it, or it is no longer kept.
        TaxonomyError: the suggested label is not a class.
    """
    if request.suggested_label is not None:
        store.taxonomy.index_of(request.suggested_label)
    if prediction.consent is Consent.NONE:
        raise RefusedError(
            "this image came without consent to review, so no annotator may see it; send it again with consent `review`"
        )
    with store.ledger.begin() as tx:
        same = {"prediction_id": prediction.id, "caller": caller, **request.model_dump()}
        repeated = tx.find(Flag, where=same, limit=1)
        if repeated:
            return repeated[0], tx.require(ReviewItem, repeated[0].review_item_id)
        image = tx.get(Image, prediction.image_id)
        if image is not None and image.erased_at is not None:
            raise RefusedError(
                "the image of this answer is no longer kept, so no annotator can see it; send it again, then flag it"
            )
        item = _flagged_item(tx, prediction, request, overlay_blob, store.taxonomy)
        flag = Flag(
            id=new_id(),
            created_at=utc_now(),
            prediction_id=prediction.id,
            caller=caller,
            organisation=prediction.organisation,
            review_item_id=item.id,
            **request.model_dump(),
        )
        tx.add(flag)
    return flag, item


def _flagged_item(
    tx: Transaction, prediction: Prediction, request: FlagRequest, overlay_blob: str | None, taxonomy: Taxonomy
) -> ReviewItem:
    waiting = _waiting(tx, [prediction.image_id]).get(prediction.image_id)
    before = tuple(waiting.reasons) if waiting else ()
    reasons = (*before, *(() if ReasonCode.FLAGGED in before else (ReasonCode.FLAGGED,)))
    priority = priority_of(reasons, probabilities_of(prediction, taxonomy), taxonomy)
    changes: dict[str, Any] = {
        "reasons": list(reasons),
        "priority": max(priority, waiting.priority) if waiting else priority,
        "comment": _joined(waiting.comment if waiting else None, request.comment),
        "suggested_label": request.suggested_label or (waiting.suggested_label if waiting else None),
        "overlay_blob": (waiting.overlay_blob if waiting else None) or overlay_blob,
    }
    if waiting is not None:
        tx.update(ReviewItem, waiting.id, **changes)
        return waiting.model_copy(update=changes)
    item = ReviewItem(
        id=new_id(), created_at=utc_now(), prediction_id=prediction.id, image_id=prediction.image_id, **changes
    )
    tx.add(item)
    return item


def _joined(before: str | None, now: str | None) -> str | None:
    return "\n".join(text for text in (before, now) if text) or None


def probabilities_of(prediction: Prediction, taxonomy: Taxonomy) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Return the stored probabilities in class order, [C], or None if there are none."""
    if prediction.probabilities is None:
        return None
    return np.array([prediction.probabilities[code] for code in taxonomy.codes])
