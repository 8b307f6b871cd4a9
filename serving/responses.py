"""Response bodies from stored records, and the reading of stored predictions.

In: records of the ledger and heat maps. Out: bodies of `serving.schemas`. The body of a prediction is the same in the
response to the request that made it and whenever it is read again.
"""

import base64
from collections.abc import Sequence

import sqlalchemy as sa

from records.errors import UnknownIdError
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import Consent, Decision, Flag, ModelRecord, Prediction, ReviewItem, ReviewState, Rollout
from serving.access.keys import Caller
from serving.messages import FoundCase, HeatMap, StoredPrediction
from serving.outbox import review_of, reviews_of
from serving.problems import problem_of
from serving.rollout.guardrails import GUARDRAILS, log_evidence, threshold
from serving.schemas import (
    BatchItem,
    BatchResponse,
    ConfirmedCase,
    Context,
    ContextEffect,
    Explanation,
    FlagResponse,
    GuardrailStatus,
    LesionSummary,
    ModelInfo,
    ModelRef,
    NearestCases,
    PredictionPage,
    PredictionResponse,
    Reason,
    ReviewStatus,
    RolloutInfo,
)
from serving.triage import CAUTION
from serving.words import CONFIRMED_BY, reason_text

EVERY_ORGANISATION = ""
"""No organisation has this name, so only a caller who may see all organisations may see it."""


def prediction_body(
    prediction: Prediction, review: ReviewItem | None, heat_map: HeatMap | None, taxonomy: Taxonomy
) -> PredictionResponse:
    """Return the body of a prediction, with its review item and heat map if there are any."""
    return PredictionResponse(
        id=prediction.id,
        request_id=prediction.request_id,
        created_at=prediction.created_at,
        image_id=prediction.image_id,
        model=ModelRef(id=prediction.model_id, status=prediction.model_status),
        engine=prediction.engine,
        label=prediction.label,
        confidence=prediction.confidence,
        probabilities=prediction.probabilities,
        prediction_set=prediction.prediction_set,
        label_in_set=None if prediction.label is None else prediction.label in prediction.prediction_set,
        decision=prediction.decision,
        reasons=[Reason(code=code, text=reason_text(code, prediction, taxonomy)) for code in prediction.reasons],
        review=ReviewStatus(state=review.state, due=review.due) if review else None,
        explanation=explanation_body(heat_map) if heat_map else None,
        context_effect=(
            ContextEffect.model_validate(prediction.context_effect) if prediction.context_effect is not None else None
        ),
    )


def batch_body(
    results: Sequence[StoredPrediction | BaseException], contexts: Sequence[Context], taxonomy: Taxonomy
) -> BatchResponse:
    """Return the body of a batch: a prediction or a problem per image, and a summary per lesion.

    Args:
        results: a prediction or an error per image.
        contexts: of the images, in the same order.
        taxonomy: of the predictions.
    Returns:
        The body; the decision for a lesion is the most cautious one of its images.
    """
    items = []
    lesions: dict[str, list[Prediction]] = {}
    for result, context in zip(results, contexts, strict=True):
        if isinstance(result, BaseException):
            items.append(BatchItem(prediction=None, problem=problem_of(result)))
            continue
        body = prediction_body(result.prediction, result.review, None, taxonomy)
        items.append(BatchItem(prediction=body, problem=None))
        if context.lesion_id is not None:
            lesions.setdefault(context.lesion_id, []).append(result.prediction)
    summaries = [
        LesionSummary(
            lesion_id=lesion_id,
            decision=max((p.decision for p in predictions), key=CAUTION.__getitem__),
            prediction_ids=[p.id for p in predictions],
        )
        for lesion_id, predictions in lesions.items()
    ]
    return BatchResponse(items=items, lesions=summaries)


def explanation_body(heat_map: HeatMap) -> Explanation:
    """Return the body of a heat map: raw values, overlay, and measured faithfulness if there is any."""
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
        crop=heat_map.crop,
        png_base64=base64.b64encode(heat_map.png).decode(),
    )


def nearest_body(prediction: Prediction, found: Sequence[FoundCase]) -> NearestCases:
    """Return the body of the confirmed cases that are like a prediction's image."""
    cases = [
        ConfirmedCase(
            image_id=case.image_id,
            label=case.label,
            confirmed_by=CONFIRMED_BY[case.label_rank],
            distance=case.distance,
            png_base64=base64.b64encode(case.png).decode(),
        )
        for case in found
    ]
    return NearestCases(prediction_id=prediction.id, model_id=prediction.model_id, cases=cases)


def flag_body(flag: Flag, item: ReviewItem, consent: Consent) -> FlagResponse:
    """Return the body of a flag; `consent` of the image decides whether a model may learn from the annotation."""
    if item.state is ReviewState.PUSHED:
        next_step = "The annotators already have this image; your flag moved it up in their queue."
    else:
        next_step = "Your flag is stored and the image goes to an annotator."
    learns = " The next model can learn from the annotation." if consent.allows_training else ""
    return FlagResponse(
        id=flag.id,
        prediction_id=flag.prediction_id,
        review=ReviewStatus(state=item.state, due=item.due),
        text=next_step + learns,
    )


def model_body(record: ModelRecord) -> ModelInfo:
    """Return the body of a registered model."""
    return ModelInfo(
        id=record.id,
        status=record.status,
        architecture=record.architecture,
        dataset_id=record.dataset_id,
        round=record.round,
        replaced_id=record.replaced_id,
        created_at=record.created_at,
        status_changed_at=record.status_changed_at,
    )


def rollout_body(rollout: Rollout) -> RolloutInfo:
    """Return the body of a rollout, with all guardrails and their counts so far."""
    guardrails = []
    # All guardrails, also those without counts yet, so that a caller always sees the same list.
    for name, guardrail in GUARDRAILS.items():
        observations, events = rollout.evidence.get(name, (0, 0))
        guardrails.append(
            GuardrailStatus(
                name=name,
                observations=observations,
                events=events,
                limit=guardrail.limit,
                evidence=log_evidence(observations, events, guardrail.limit),
                threshold=threshold(),
            )
        )
    return RolloutInfo(guardrails=guardrails, **rollout.model_dump(exclude={"actor", "evidence"}))


def find_prediction(store: Store, prediction_id: str, caller: Caller) -> tuple[Prediction, ReviewItem | None]:
    """Return a served prediction with its review item, if there is one.

    Raises UnknownIdError if there is none, and equally if it belongs to another organisation: the response must not
    tell whether such an id exists.
    """
    with store.ledger.read() as tx:
        prediction = tx.get(Prediction, prediction_id)
        if prediction is None or not prediction.served or not caller.may_see(prediction.organisation):
            raise UnknownIdError(f"no Prediction has the id {prediction_id!r}")
        return prediction, review_of(tx, prediction)


def read_page(store: Store, caller: Caller, decision: Decision | None, after: str | None, limit: int) -> PredictionPage:
    """Return a page of predictions of the caller's organisation, newest first.

    Args:
        store: with the ledger.
        caller: one who may see all organisations gets predictions of all.
        decision: only predictions with this decision; None for all.
        after: id of the last prediction of the page before; None for the first page.
        limit: predictions of the page, at least 1.
    Returns:
        The page.
    """
    with store.ledger.read() as tx:
        # One row more than asked for tells whether there is a next page, without a second query.
        rows = _newest(tx, caller, decision, after, limit + 1)
        reviews = reviews_of(tx, rows[:limit])
        items = [prediction_body(row, reviews.get(row.id), None, store.taxonomy) for row in rows[:limit]]
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
        # Ids sort by creation time, so an id is a page boundary that later inserts do not move.
        query = query.where(table.c.id < after)
    return [Prediction.model_validate(dict(row)) for row in tx.connection.execute(query).mappings()]
