"""From stored records to the bodies that callers get, and the list of answers."""

import base64

import sqlalchemy as sa

from records.errors import UnknownIdError
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import Consent, Decision, Flag, ModelRecord, Prediction, ReviewItem, ReviewState, Rollout
from serving.access.keys import Caller
from serving.messages import HeatMap
from serving.outbox import review_of
from serving.rollout.harms import HARMS, log_evidence, threshold
from serving.schemas import (
    Explanation,
    FlagResponse,
    HarmSeen,
    ModelInfo,
    ModelRef,
    PredictionPage,
    PredictionResponse,
    Reason,
    ReviewStatus,
    RolloutInfo,
)
from serving.words import reason_text

EVERY_ORGANISATION = ""
"""No organisation has this name, so only who sees all sees it."""


def prediction_body(
    prediction: Prediction, review: ReviewItem | None, heat_map: HeatMap | None, taxonomy: Taxonomy
) -> PredictionResponse:
    """Turn a stored answer into what its caller gets.

    Args:
        prediction: the answer.
        review: its question to the annotators, if there is one.
        heat_map: if it was asked for.
        taxonomy: of the model that answered.
    Returns:
        The body; the same for the first reading and every later one.
    """
    return PredictionResponse(
        id=prediction.id,
        request_id=prediction.request_id,
        created_at=prediction.created_at,
        image_id=prediction.image_id,
        model=ModelRef(id=prediction.model_id, status=prediction.model_status),
        label=prediction.label,
        confidence=prediction.confidence,
        probabilities=prediction.probabilities,
        prediction_set=prediction.prediction_set,
        decision=prediction.decision,
        reasons=[Reason(code=code, text=reason_text(code, prediction, taxonomy)) for code in prediction.reasons],
        review=ReviewStatus(state=review.state, due=review.due) if review else None,
        explanation=explanation_body(heat_map) if heat_map else None,
    )


def explanation_body(heat_map: HeatMap) -> Explanation:
    """Turn a map into its body: raw values, the drawing, and how far such maps can be believed if that is known."""
    height, width = heat_map.values.shape
    return Explanation(
        method=heat_map.method,
        exact=heat_map.exact,
        layer=heat_map.layer,
        target=heat_map.target,
        versus=heat_map.versus,
        steps=heat_map.steps,
        completeness_error=heat_map.completeness_error,
        faithfulness=heat_map.faithfulness,
        shape=[height, width],
        values=heat_map.values.tolist(),
        png_base64=base64.b64encode(heat_map.png).decode(),
    )


def flag_body(flag: Flag, item: ReviewItem, consent: Consent) -> FlagResponse:
    """Say what became of an objection.

    Args:
        flag: the objection.
        item: the question it led to.
        consent: of the image.
    Returns:
        The body.
    """
    if item.state is ReviewState.PUSHED:
        next_step = "The annotators already have this image; your objection moved it up in their queue."
    else:
        next_step = "Your objection is stored and goes to an annotator."
    learns = " The next model can learn from the annotator's answer." if consent is Consent.TRAINING else ""
    return FlagResponse(
        id=flag.id,
        prediction_id=flag.prediction_id,
        review=ReviewStatus(state=item.state, due=item.due),
        text=next_step + learns,
    )


def model_body(record: ModelRecord) -> ModelInfo:
    """Turn a registered model into its body."""
    return ModelInfo(
        id=record.id,
        status=record.status,
        architecture=record.architecture,
        dataset_id=record.dataset_id,
        round=record.round,
        created_at=record.created_at,
        status_changed_at=record.status_changed_at,
    )


def rollout_body(rollout: Rollout) -> RolloutInfo:
    """Turn a rollout into its body, with the evidence of harm so far."""
    counts = {name: rollout.evidence.get(name, (0, 0)) for name in HARMS}
    harms = [
        HarmSeen(
            name=name,
            looked=looked,
            seen=seen,
            tolerated=HARMS[name].tolerated,
            evidence=log_evidence(looked, seen, HARMS[name].tolerated),
            limit=threshold(),
        )
        for name, (looked, seen) in counts.items()
    ]
    return RolloutInfo(harms=harms, **rollout.model_dump(exclude={"actor", "evidence"}))


def find_prediction(store: Store, prediction_id: str, caller: Caller) -> tuple[Prediction, ReviewItem | None]:
    """Read a stored answer with its question.

    Args:
        store: with the ledger.
        prediction_id: 32 hex characters.
        caller: who asks; what another organisation asked does not exist for them.
    Returns:
        The answer, and its question if there is one.
    Raises:
        UnknownIdError: there is no such answer.
    """
    with store.ledger.read() as tx:
        prediction = tx.get(Prediction, prediction_id)
        if prediction is None or not prediction.served or not caller.may_see(prediction.organisation):
            raise UnknownIdError(f"no Prediction has the id {prediction_id!r}")
        return prediction, review_of(tx, prediction)


def read_page(store: Store, caller: Caller, decision: Decision | None, after: str | None, limit: int) -> PredictionPage:
    """Read some answers, newest first.

    Args:
        store: with the ledger.
        caller: who asks; answers of other organisations are left out.
        decision: only these, or None.
        after: id of the last answer of the page before, or None.
        limit: at most so many, at least 1.
    Returns:
        The page.
    """
    with store.ledger.read() as tx:
        rows = _newest(tx, caller, decision, after, limit + 1)
        items = [prediction_body(row, review_of(tx, row), None, store.taxonomy) for row in rows[:limit]]
    return PredictionPage(items=items, next=items[-1].id if len(rows) > limit else None)


def _newest(
    tx: Transaction, caller: Caller, decision: Decision | None, after: str | None, limit: int
) -> list[Prediction]:
    table = TABLES[Prediction]
    query = sa.select(table).where(table.c.served.is_(True)).order_by(table.c.id.desc()).limit(limit)
    if not caller.may_see(EVERY_ORGANISATION):
        query = query.where(table.c.organisation == caller.organisation)
    if decision is not None:
        query = query.where(table.c.decision == decision)
    if after is not None:
        # Ids sort by creation time.
        query = query.where(table.c.id < after)
    return [Prediction.model_validate(dict(row)) for row in tx.connection.execute(query).mappings()]
