"""Routes of predictions: predict one image or a batch, read one prediction, list them."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool

from records.types import Decision, Scope
from serving.access.keys import Caller
from serving.outbox import OPEN_STATES
from serving.responses import batch_body, find_prediction, prediction_body, read_page
from serving.routes.admission import Admission
from serving.routes.authenticator import Authenticator
from serving.routes.bodies import image_body, many_images, one_image
from serving.schemas import (
    BatchResponse,
    IdempotencyKey,
    PredictionId,
    PredictionPage,
    PredictionResponse,
)
from serving.service import Service
from serving.waiting import ReviewWaits


def predictions_router(service: Service, authenticator: Authenticator, admission: Admission) -> APIRouter:
    """Return the router of /v1/predictions."""
    router = APIRouter(prefix="/v1/predictions", tags=["predictions"])
    _add_predict(router, admission, authenticator)
    _add_batch(router, admission, authenticator)
    _add_reading(router, service, authenticator)
    return router


def _add_predict(router: APIRouter, admission: Admission, authenticator: Authenticator) -> None:
    @router.post("", response_model=PredictionResponse, openapi_extra=image_body())
    async def predict(
        request: Request,
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.PREDICT))],
        explain: Annotated[Literal["gradcam"] | None, Query(description="add the heat map of the label")] = None,
        idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
    ) -> Any:
        """Predict one image: calibrated probabilities, a decision with its reasons, and the state of its review."""
        image, context = await one_image(request)
        async with admission.images(caller, [image]):
            stored = await admission.predict(
                image, context, caller, request.state.request_id, idempotency_key, explain is not None
            )
        return prediction_body(stored.prediction, stored.review, stored.heat_map, admission.service.store.taxonomy)


def _add_batch(router: APIRouter, admission: Admission, authenticator: Authenticator) -> None:
    most = admission.service.settings.max_batch_images

    @router.post("/batch", response_model=BatchResponse, openapi_extra=image_body(many=True))
    async def predict_many(
        request: Request,
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.PREDICT))],
        idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
    ) -> Any:
        """Predict several images, also of one lesion; an unusable image does not stop the others."""
        images = await many_images(request, most)
        keys = [f"{idempotency_key}#{index}" if idempotency_key else None for index in range(len(images))]
        results = await admission.predict_each(images, caller, request.state.request_id, keys)
        contexts = [context for _, context in images]
        return batch_body(results, contexts, admission.service.store.taxonomy)

    @router.get("/batch", include_in_schema=False)
    def refuse_get() -> None:
        # Without it the route of one prediction would take "batch" for an id.
        raise HTTPException(405)


def _add_reading(router: APIRouter, service: Service, authenticator: Authenticator) -> None:
    waits = ReviewWaits(service.store, service.settings.max_waiting)

    @router.get("", response_model=PredictionPage)
    def list_predictions(
        caller: Annotated[Caller, Depends(authenticator.requires(None))],
        decision: Annotated[Decision | None, Query(description="only predictions with this decision")] = None,
        after: Annotated[PredictionId | None, Query(description="`next` of the page before")] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> PredictionPage:
        """List predictions, newest first."""
        return read_page(service.store, caller, decision, after, limit)

    @router.get("/{prediction_id}", response_model=PredictionResponse)
    async def read_prediction(
        prediction_id: PredictionId,
        request: Request,
        caller: Annotated[Caller, Depends(authenticator.requires(None))],
        wait: Annotated[
            float, Query(ge=0, le=60, description="respond once annotators have looked at it, at most so long; seconds")
        ] = 0.0,
    ) -> PredictionResponse:
        """Return a stored prediction with the current state of its review."""
        prediction, review = await run_in_threadpool(find_prediction, service.store, prediction_id, caller)
        if wait and review is not None and review.state in OPEN_STATES:
            await waits.until_closed(review, caller.share, wait, request.scope["state"])
            prediction, review = await run_in_threadpool(find_prediction, service.store, prediction_id, caller)
        return prediction_body(prediction, review, None, service.store.taxonomy)
