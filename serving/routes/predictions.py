"""Routes of predictions: predict one image or a batch, read one prediction, list them."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response

from records.errors import RelookError
from records.types import Consent, Decision, Scope
from serving.access.keys import Caller
from serving.messages import PredictionRequest, StoredPrediction
from serving.metrics import Metrics
from serving.problems import problem, problem_response
from serving.responses import batch_body, find_prediction, prediction_body, read_page
from serving.routes.authenticator import Authenticator
from serving.routes.bodies import image_body, many_images, one_image
from serving.schemas import (
    BatchResponse,
    Context,
    IdempotencyKey,
    PredictionId,
    PredictionPage,
    PredictionResponse,
)
from serving.service import Service


def predictions_router(service: Service, authenticator: Authenticator, metrics: Metrics) -> APIRouter:
    """Return the router of /v1/predictions."""
    router = APIRouter(prefix="/v1/predictions", tags=["predictions"])
    admission = _Admission(service, metrics)
    _add_predict(router, admission, authenticator)
    _add_batch(router, admission, authenticator)
    _add_reading(router, service, authenticator)
    return router


class _Admission:
    """Limits the images in flight and calls the service. It belongs to one event loop, so counting needs no lock."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service = service
        self.metrics = metrics
        self._in_flight = 0

    def admit(self, request: Request, num_images: int) -> Response | None:
        """Count images as in flight, or return a 429 response; call `release` for what was admitted."""
        settings = self.service.settings
        if self._in_flight + num_images > settings.max_in_flight:
            busy = problem(429, "busy", "the service has as many images in flight as it accepts; try again soon")
            return problem_response(busy, request.state.request_id, settings.retry_after_s)
        self._in_flight += num_images
        self.metrics.in_flight.set(self._in_flight)
        return None

    def release(self, num_images: int) -> None:
        """Count images as finished."""
        self._in_flight -= num_images
        self.metrics.in_flight.set(self._in_flight)

    async def predict(
        self, image: bytes, context: Context, caller: Caller, request_id: str, key: str | None, explain: bool
    ) -> StoredPrediction:
        """Return one prediction, with its heat map if `explain` is set."""
        stored = await self.service.predict(
            PredictionRequest(
                image=image,
                request_id=request_id,
                context=_with_consent(context, caller),
                caller=caller.id,
                organisation=caller.organisation,
                idempotency_key=key,
                explain=explain,
            )
        )
        self.metrics.predicted(stored.prediction)
        if explain and stored.heat_map is None and stored.prediction.label is not None:
            # A repeated request gets the stored prediction; heat maps are not stored, so it is computed again.
            heat_map = await self.service.explain(stored.prediction, "gradcam", None)
            return StoredPrediction(stored.prediction, stored.review, heat_map)
        return stored


def _with_consent(context: Context, caller: Caller) -> Context:
    """Return the context with the effective consent: none for a sandbox key, else the request's, else the key's."""
    if caller.sandbox:
        return context.model_copy(update={"consent": Consent.NONE})
    if context.consent is None and caller.default_consent is not None:
        return context.model_copy(update={"consent": caller.default_consent})
    return context


def _add_predict(router: APIRouter, admission: _Admission, authenticator: Authenticator) -> None:
    @router.post("", response_model=PredictionResponse, openapi_extra=image_body())
    async def predict(
        request: Request,
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.PREDICT))],
        explain: Annotated[
            Literal["gradcam"] | None, Query(description="add the heat map of the most likely class")
        ] = None,
        idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
    ) -> Any:
        """Predict one image: calibrated probabilities, a decision with its reasons, and the state of its review."""
        refused = admission.admit(request, 1)
        if refused is not None:
            return refused
        try:
            image, context = await one_image(request)
            stored = await admission.predict(
                image, context, caller, request.state.request_id, idempotency_key, explain is not None
            )
        finally:
            admission.release(1)
        return prediction_body(stored.prediction, stored.review, stored.heat_map, admission.service.store.taxonomy)


def _add_batch(router: APIRouter, admission: _Admission, authenticator: Authenticator) -> None:
    most = admission.service.settings.max_batch_images

    @router.post("/batch", response_model=BatchResponse, openapi_extra=image_body(many=True))
    async def predict_many(
        request: Request,
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.PREDICT))],
        idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
    ) -> Any:
        """Predict several images, also of one lesion; an unusable image does not stop the others."""
        # One image is admitted before the body is read, which bounds uploads, and the others once they are counted.
        refused = admission.admit(request, 1)
        if refused is not None:
            return refused
        admitted = 1
        try:
            images = await many_images(request, most)
            refused = admission.admit(request, len(images) - 1)
            if refused is not None:
                return refused
            admitted = len(images)
            results = await asyncio.gather(
                *(
                    admission.predict(
                        image,
                        context,
                        caller,
                        request.state.request_id,
                        f"{idempotency_key}#{index}" if idempotency_key else None,
                        explain=False,
                    )
                    for index, (image, context) in enumerate(images)
                ),
                return_exceptions=True,
            )
        finally:
            admission.release(admitted)
        for result in results:
            # Only known errors become the problem of one image; a bug fails the whole request, visibly.
            if isinstance(result, BaseException) and not isinstance(result, RelookError):
                raise result
        contexts = [context for _, context in images]
        return batch_body(results, contexts, admission.service.store.taxonomy)

    @router.get("/batch", include_in_schema=False)
    def refuse_get() -> None:
        # Without it the route of one prediction would take "batch" for an id.
        raise HTTPException(405)


def _add_reading(router: APIRouter, service: Service, authenticator: Authenticator) -> None:
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
    def read_prediction(
        prediction_id: PredictionId, caller: Annotated[Caller, Depends(authenticator.requires(None))]
    ) -> PredictionResponse:
        """Return a stored prediction with the current state of its review."""
        prediction, review = find_prediction(service.store, prediction_id, caller)
        return prediction_body(prediction, review, None, service.store.taxonomy)
