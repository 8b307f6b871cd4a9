"""Transactional outbox: predictions, flags and outcomes, each in one transaction with what follows from it.

In: verdicts and requests. Out: rows of the ledger. A review item is written in the transaction that causes it, so
neither exists without the other; the labeling room later pushes open items to Label Studio. An image whose consent
is `none` is neither stored nor reviewed.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import sqlalchemy as sa

from images.overlay import levels_of
from records.arrays import Float32Array
from records.consent import as_allowed
from records.erasure import remove_expired_tombstones
from records.errors import DataError, RefusedError
from records.frames import Crop
from records.ids import new_id, utc_now
from records.keys import patient_hash
from records.ledger import Transaction
from records.ledger.tables import TABLES, any_of
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import (
    Confirmation,
    Consent,
    Decision,
    Flag,
    Image,
    Outcome,
    Prediction,
    ReasonCode,
    ReviewItem,
    ReviewState,
    SourceLabel,
)
from serving.messages import HeatMap
from serving.schemas import Context, FlagRequest, OutcomeRequest, OutcomeResponse
from serving.triage import Verdict, priority_of

OPEN_STATES = (ReviewState.NEW, ReviewState.PUSHED)
CLOCK_DIFFERENCE = timedelta(minutes=5)
"""How far a caller's clock may be ahead of this machine's."""


MAX_FLAGS = 50
"""Flags of one open review item."""
MAX_COMMENT_BYTES = 20_000
"""Comments of one review item together, bytes."""


@dataclass(frozen=True)
class StoredImage:
    """An image in the form that is stored: no metadata except orientation and colour profile."""

    id: str
    data: bytes
    format: str
    width_px: int
    height_px: int


@dataclass(frozen=True)
class PredictionRows:
    """The rows of one prediction, and the bytes of its image row."""

    prediction: Prediction
    image: Image | None
    review: ReviewItem | None
    stored: StoredImage | None = None


def image_row(store: Store, image: StoredImage, context: Context, consent: Consent, now: datetime) -> Image:
    """Return the row of an image that was sent over HTTP; the patient's id enters only as a salted hash."""
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


def review_row(
    prediction: Prediction, verdict: Verdict, heat_map: Float32Array | None, crop: Crop, urgent_due_h: float
) -> ReviewItem:
    """Return the review item of a prediction.

    Args:
        prediction: with decision `review` or `urgent`.
        verdict: with at least one reason.
        heat_map: [h, w] of the label, or None.
        crop: the part of the image that it covers.
        urgent_due_h: time until an urgent item is due, hours.
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
        # The numbers alone: most items are never seen while their callers wait, so a push draws them.
        heat_map=None if heat_map is None else levels_of(heat_map),
        crop=crop,
    )


def write_predictions(store: Store, batch: Sequence[PredictionRows]) -> list[ReviewItem | None]:
    """Write predictions with their images and review items, in one transaction.

    An image with an open review item gets no second one: the open item takes the new reasons.

    Args:
        store: with the ledger.
        batch: rows of one micro-batch.
    Returns:
        Per prediction the review item that it led to, or None.
    Raises:
        RefusedError: an idempotency key was used before; nothing of the batch is written then.
        UnavailableError: the ledger cannot be reached.
    """
    kept = {rows.prediction.image_id for rows in batch if rows.prediction.consent is not Consent.NONE}
    keys = {rows.prediction.idempotency_key for rows in batch}
    # Named in advance, so that batches with disjoint images and keys commit concurrently on PostgreSQL, while two
    # requests with one key, or two review items of one image, wait for each other.
    with store.ledger.begin(touches={*kept, *(key for key in keys if key is not None)}) as tx:
        known = {image.id: image for image in tx.find(Image, where={"id": list(kept)})} if kept else {}
        batch = [_as_allowed(store, rows, known.get(rows.prediction.image_id)) for rows in batch]
        images = {rows.image.id: rows.image for rows in batch if rows.image is not None}
        # The retention period of such an image ended and its bytes were deleted; it was sent again and is stored anew.
        expired = {image_id for image_id, image in known.items() if image.expired_at is not None}
        if expired:
            remove_expired_tombstones(tx, expired)
            _store_again(
                store, [rows.stored for rows in batch if rows.stored is not None and rows.stored.id in expired]
            )
        new_images = [image for image_id, image in images.items() if image_id not in known or image_id in expired]
        items, new_items = merge_items(tx, [rows.review for rows in batch])
        tx.add(*new_images, *(rows.prediction for rows in batch), *new_items)
    return items


def _as_allowed(store: Store, rows: PredictionRows, image: Image | None) -> PredictionRows:
    """Return the rows that may be written: the image may have been erased since its request arrived.

    Its bytes were stored before this transaction. They are deleted in it, so that an erasure that ran in between has
    the last word: erasures wait for this transaction, and it sees those that came before.
    """
    before = rows.prediction.consent
    consent = as_allowed(image, before)
    if consent is before:
        # The caller gets what the context changed; without consent it is not kept, since it tells the context.
        if consent is not Consent.NONE or rows.prediction.context_effect is None:
            return rows
        return replace(rows, prediction=rows.prediction.model_copy(update={"context_effect": None}))
    blank: dict[str, Any] = {"context": {}, "context_effect": None} if consent is Consent.NONE else {}
    changes: dict[str, Any] = {"consent": consent, **blank}
    prediction = rows.prediction.model_copy(update=changes)
    if consent is not Consent.NONE:
        return replace(rows, prediction=prediction)
    store.blobs.delete(prediction.image_id)
    return PredictionRows(prediction, None, None)


def _store_again(store: Store, images: Sequence[StoredImage]) -> None:
    """Store bytes again that were deleted after their arrival.

    Inside the transaction: expiry of images waits for it, so the blobs cannot be deleted a second time.
    """
    for image in images:
        store.blobs.put(image.data)


def has_map(item: ReviewItem) -> bool:
    """Return whether a review item has a heat map to show."""
    return item.heat_map is not None or item.overlay_blob is not None


def merge_items(
    tx: Transaction, proposed: Sequence[ReviewItem | None]
) -> tuple[list[ReviewItem | None], list[ReviewItem]]:
    """Merge proposed review items with the open ones of their images, and update the open ones in the ledger.

    Args:
        tx: a write transaction.
        proposed: items, or None for a prediction that needs none.
    Returns:
        Per proposed item the one that it led to, and the items that are new and still to be added.
    """
    image_ids = sorted({item.image_id for item in proposed if item is not None})
    current = _open_items(tx, image_ids) if image_ids else {}
    stored = dict(current)
    for item in proposed:
        if item is not None:
            # One image may occur several times in a batch, so each item merges into what the ones before it left.
            before = current.get(item.image_id)
            current[item.image_id] = item if before is None else _merged(before, item)
    new = [item for image_id, item in current.items() if image_id not in stored or item.id != stored[image_id].id]
    for image_id, item in current.items():
        if image_id in stored and item.id == stored[image_id].id and item != stored[image_id]:
            tx.update(ReviewItem, item.id, reasons=list(item.reasons), priority=item.priority)
    return [None if item is None else current[item.image_id] for item in proposed], new


def _open_items(tx: Transaction, image_ids: Sequence[str]) -> dict[str, ReviewItem]:
    items = tx.find(ReviewItem, where={"image_id": list(image_ids), "state": list(OPEN_STATES)}, order_by=("id",))
    # Later entries win. The task of a blind read shows neither reasons nor comments, so a blind item is chosen only
    # where it is the only open one.
    return {item.image_id: item for item in sorted(items, key=lambda item: not item.blind)}


def _merged(before: ReviewItem, item: ReviewItem) -> ReviewItem:
    # A due date and a sampling probability belong to the item that they were computed for and are never added to an
    # older one; such an item becomes a second open item of its image.
    if (item.due and not before.due) or (item.selection_probability and not before.selection_probability):
        return item
    reasons = [*before.reasons, *(reason for reason in item.reasons if reason not in before.reasons)]
    return before.model_copy(update={"reasons": reasons, "priority": max(before.priority, item.priority)})


def find_repeated(store: Store, caller: str, idempotency_key: str) -> Prediction | None:
    """Return the served prediction with this idempotency key, or None."""
    # Both rows of a canary pair have the key; only the served one is what the caller got.
    where = {"caller": caller, "idempotency_key": idempotency_key, "served": True}
    with store.ledger.read() as tx:
        found = tx.find(Prediction, where=where, limit=1)
    return found[0] if found else None


def review_of(tx: Transaction, prediction: Prediction) -> ReviewItem | None:
    """Return the newest review item of a prediction: its own, or that of its image which took its reasons."""
    return reviews_of(tx, [prediction]).get(prediction.id)


def reviews_of(tx: Transaction, predictions: Sequence[Prediction]) -> dict[str, ReviewItem]:
    """Return the newest review item of each prediction that has one, as `review_of`, with one query."""
    # If the image had an open item already, the reasons of a prediction were merged into that one.
    may_be_merged = {p.id: p.image_id for p in predictions if p.decision in (Decision.REVIEW, Decision.URGENT)}
    table, among = TABLES[ReviewItem], partial(any_of, dialect=tx.connection.dialect)
    where = sa.or_(
        among(table.c.prediction_id, [p.id for p in predictions]), among(table.c.image_id, may_be_merged.values())
    )
    query = sa.select(table).where(where).order_by(table.c.id.desc())
    items = [ReviewItem.model_validate(dict(row)) for row in tx.connection.execute(query).mappings()]
    own, of_image = defaultdict[str | None, list[ReviewItem]](list), defaultdict[str, list[ReviewItem]](list)
    for item in items:
        own[item.prediction_id].append(item)
        of_image[item.image_id].append(item)
    found = {}
    for prediction in predictions:
        about = own[prediction.id] or (of_image[prediction.image_id] if prediction.id in may_be_merged else [])
        found[prediction.id] = next((item for item in about if item.state is not ReviewState.WITHDRAWN), None)
    return {prediction_id: item for prediction_id, item in found.items() if item is not None}


def write_flag(
    store: Store, prediction: Prediction, request: FlagRequest, caller: str, heat_map: HeatMap | None
) -> tuple[Flag, ReviewItem]:
    """Write a flag and its review item, in one transaction.

    An open review item takes the flag's comment and label and gets a higher priority. An equal flag of the same caller
    is written once.

    Args:
        store: with ledger and taxonomy.
        prediction: that is flagged.
        request: reason, suggested label and comment.
        caller: id of the key.
        heat_map: of the label, for an item that has none.
    Returns:
        The flag and its review item.
    Raises:
        RefusedError: the image's consent does not cover review, the image was erased, or it has too many flags.
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
                "the image of this prediction is no longer stored, so no annotator can see it; send it again"
            )
        item = _flagged_item(tx, prediction, request, heat_map, store.taxonomy)
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
    tx: Transaction, prediction: Prediction, request: FlagRequest, heat_map: HeatMap | None, taxonomy: Taxonomy
) -> ReviewItem:
    before = _open_items(tx, [prediction.image_id]).get(prediction.image_id)
    # All predictions of an image share its open item, so neither is a limit per prediction.
    if before is not None and tx.count(Flag, {"review_item_id": before.id}) >= MAX_FLAGS:
        raise RefusedError(f"this image has {MAX_FLAGS} flags already; an annotator will look at it")
    comment = _joined(before.comment if before else None, request.comment)
    if len((comment or "").encode()) > MAX_COMMENT_BYTES:
        raise RefusedError(
            f"the comments on this image have {MAX_COMMENT_BYTES / 1000:g} kB already; flag it without one"
        )
    reasons = tuple(before.reasons) if before else ()
    if ReasonCode.FLAGGED not in reasons:
        reasons = (*reasons, ReasonCode.FLAGGED)
    priority = priority_of(reasons, probabilities_of(prediction, taxonomy), taxonomy)
    changes: dict[str, Any] = {
        "reasons": list(reasons),
        "priority": max(priority, before.priority) if before else priority,
        "comment": comment,
        "suggested_label": request.suggested_label or (before.suggested_label if before else None),
    }
    if heat_map is not None and (before is None or not has_map(before)):
        changes |= {"heat_map": levels_of(heat_map.values), "crop": heat_map.crop}
    if before is not None:
        tx.update(ReviewItem, before.id, **changes)
        return before.model_copy(update=changes)
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


def write_outcome(store: Store, prediction: Prediction, request: OutcomeRequest, caller: str) -> OutcomeResponse:
    """Write an outcome; an equal one of the same caller is written once.

    With consent to training it also becomes a label. By `LABEL_RANK` a biopsy outranks every annotation.

    Args:
        store: with ledger and taxonomy.
        prediction: that the outcome is about.
        request: diagnosis and how it was confirmed.
        caller: id of the key.
    Returns:
        The response body.
    Raises:
        TaxonomyError: the diagnosis is not a class.
        DataError: `observed_at` is in the future.
        RefusedError: the image was not stored.
    """
    store.taxonomy.index_of(request.diagnosis)
    if request.observed_at > utc_now() + CLOCK_DIFFERENCE:
        raise DataError(
            f"observed_at: {request.observed_at.isoformat()} is in the future; give the time of the diagnosis"
        )
    if prediction.consent is Consent.NONE:
        raise RefusedError("this image came without consent, so nothing may be kept about it")
    confirmation = Confirmation(request.confirmation)
    values: dict[str, Any] = {
        "prediction_id": prediction.id, "caller": caller, "diagnosis": request.diagnosis, "confirmation": confirmation,
        "observed_at": request.observed_at,
    }  # fmt: skip
    with store.ledger.begin() as tx:
        consent = as_allowed(tx.get(Image, prediction.image_id), prediction.consent)
        if consent is Consent.NONE:
            raise RefusedError("the image of this prediction was erased, so nothing may be kept about it")
        learns = consent is Consent.TRAINING
        repeated = tx.find(Outcome, where=values, limit=1)
        if repeated:
            outcome = repeated[0]
        else:
            created_at = tx.now_after(Outcome)
            outcome = Outcome(id=new_id(), created_at=created_at, image_id=prediction.image_id, **values)
            tx.add(outcome, *([_label(outcome)] if learns else []))
    return OutcomeResponse(
        id=outcome.id,
        prediction_id=prediction.id,
        agrees=None if prediction.label is None else prediction.label == request.diagnosis,
        text=(
            "Stored. The next dataset version takes it as a label of this rank."
            if learns
            else "Stored. No model learns from it, since the image's consent does not cover training."
        ),
    )


def _label(outcome: Outcome) -> SourceLabel:
    return SourceLabel(
        id=new_id(),
        image_id=outcome.image_id,
        label=outcome.diagnosis,
        confirmation=outcome.confirmation,
        source=f"outcome:{outcome.id}",
        created_at=outcome.created_at,
    )
