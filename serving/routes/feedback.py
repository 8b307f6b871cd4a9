"""Routes of feedback on predictions: flags, outcomes, and the events that follow from them."""

import logging
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.concurrency import run_in_threadpool

from records.errors import RelookError
from records.types import Consent, Prediction, ReviewItem, Scope
from serving.access.keys import Caller
from serving.events import read_events
from serving.messages import HeatMap
from serving.outbox import has_map, write_flag, write_outcome
from serving.responses import find_prediction, flag_body
from serving.routes.admission import Admission
from serving.routes.authenticator import Authenticator
from serving.schemas import (
    EventPage,
    FlagRequest,
    FlagResponse,
    OutcomeRequest,
    OutcomeResponse,
    PredictionId,
)
from serving.service import Service

logger = logging.getLogger(__name__)


def feedback_router(service: Service, authenticator: Authenticator, admission: Admission) -> APIRouter:
    """Return the router of flags, outcomes and events."""
    router = APIRouter(tags=["feedback"])

    @router.post("/v1/predictions/{prediction_id}/flags", response_model=FlagResponse)
    async def flag(
        prediction_id: PredictionId,
        body: FlagRequest,
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.FLAG))],
    ) -> FlagResponse:
        """Flag a prediction for review by an annotator."""
        prediction, review = await run_in_threadpool(find_prediction, service.store, prediction_id, caller)
        # Before the write transaction, which must be short: an explanation takes up to seconds.
        heat_map = await _map_for_annotators(admission, caller, prediction, review)
        written, item = await run_in_threadpool(write_flag, service.store, prediction, body, caller.id, heat_map)
        admission.metrics.flagged.labels(reason=body.reason.value).inc()
        return flag_body(written, item, prediction.consent)

    @router.post("/v1/predictions/{prediction_id}/outcomes", response_model=OutcomeResponse)
    def outcome(
        prediction_id: PredictionId,
        body: OutcomeRequest,
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.FLAG))],
    ) -> OutcomeResponse:
        """Report the diagnosis, for example of a biopsy; it outranks every annotation."""
        prediction, _ = find_prediction(service.store, prediction_id, caller)
        return write_outcome(service.store, prediction, body, caller.id)

    @router.get("/v1/events", response_model=EventPage)
    def events(
        caller: Annotated[Caller, Depends(authenticator.requires(None))],
        after: Annotated[PredictionId | None, Query(description="`next` of the page before")] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        prediction_id: Annotated[
            list[PredictionId] | None, Query(max_length=200, description="only events of these predictions")
        ] = None,
    ) -> EventPage:
        """List events of the caller's predictions: confirmed or amended by an annotator, overdue, recalled."""
        return read_events(service.store, caller, after, limit, prediction_id)

    return router


async def _map_for_annotators(
    admission: Admission, caller: Caller, prediction: Prediction, review: ReviewItem | None
) -> HeatMap | None:
    """Return the heat map for the review item of a flag; None if there is none or the item has one."""
    if prediction.consent is Consent.NONE or (review is not None and has_map(review)):
        return None
    service = admission.service
    try:
        # Through the same limits as any other map, or flags would be a way around them.
        return await admission.explain(caller, "gradcam", lambda: service.explain(prediction, "gradcam", None))
    except RelookError as error:
        # The flag matters more than its heat map, so it is written without one.
        logger.warning("no heat map for the flag on %s: %s", prediction.id, error)
        return None
