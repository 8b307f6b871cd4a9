"""What turned out to be true later: stored, and a label of its rank for the next dataset version.

In: a stored answer and a diagnosis. Out: rows of the ledger in one transaction. By `LABEL_RANK` a biopsy
outranks every click; images without consent to training keep their outcome, and no model learns from it.
"""

from typing import Any

from records.errors import DataError, RefusedError
from records.ids import new_id, utc_now
from records.store import Store
from records.types import Confirmation, Consent, Outcome, Prediction, SourceLabel
from serving.schemas import OutcomeRequest, OutcomeResponse


def write_outcome(store: Store, prediction: Prediction, request: OutcomeRequest, caller: str) -> OutcomeResponse:
    """Write an outcome; an equal one of the same caller is not written twice.

    Args:
        store: with ledger and taxonomy.
        prediction: the answer that it is about.
        request: the outcome.
        caller: who says so.
    Returns:
        What it is used for.
    Raises:
        TaxonomyError: the diagnosis is not a class.
        DataError: it was observed in the future.
        RefusedError: the image was not stored.
    """
    store.taxonomy.index_of(request.diagnosis)
    now = utc_now()
    if request.observed_at > now:
        raise DataError(f"observed_at: {request.observed_at.isoformat()} has not come yet; give the past moment")
    if prediction.consent is Consent.NONE:
        raise RefusedError("this image came without consent, so nothing may be kept about it")
    confirmation = Confirmation(request.confirmation)
    said: dict[str, Any] = {
        "prediction_id": prediction.id, "caller": caller, "diagnosis": request.diagnosis, "confirmation": confirmation,
        "observed_at": request.observed_at,
    }  # fmt: skip
    with store.ledger.begin() as tx:
        repeated = tx.find(Outcome, where=said, limit=1)
        outcome = (
            repeated[0] if repeated else Outcome(id=new_id(), created_at=now, image_id=prediction.image_id, **said)
        )
        if not repeated:
            tx.add(outcome)
            if prediction.consent is Consent.TRAINING:
                tx.add(_label(outcome))
    learns = prediction.consent is Consent.TRAINING
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
