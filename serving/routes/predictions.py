"""Routes of answers: ask for one or for many, read one, list them."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response

from records.errors import RelookError
from records.types import Consent, Decision, Scope
from serving.access.keys import Caller
from serving.batches import batch_body
from serving.guard import problem_response
from serving.messages import PredictionRequest, StoredPrediction
from serving.metrics import Metrics
from serving.problems import problem
from serving.responses import find_prediction, prediction_body, read_page
from serving.routes.bodies import image_body, many_images, one_image
from serving.routes.door import Door
from serving.schemas import (
    BatchResponse,
    Context,
    IdempotencyKey,
    PredictionId,
    PredictionPage,
    PredictionResponse,
)
from serving.service import Service


def predictions_router(service: Service, door: Door, metrics: Metrics) -> APIRouter:
    """Make the routes under /v1/predictions that ask and read.

    Args:
        service: that answers.
        door: that knows callers.
        metrics: that count.
    Returns:
        The router.
    """
    router = APIRouter(prefix="/v1/predictions", tags=["predictions"])
    asking = _Asking(service, metrics)
    _add_predict(router, asking, door)
    _add_batch(router, asking, door)
    _add_reading(router, service, door)
    return router


class _Asking:
    """Admits requests and asks the service; one event loop."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service = service
        self.metrics = metrics
        self._under_way = 0

    def admit(self, request: Request, num_images: int) -> Response | None:
        """Make room for images, or return the refusal; whoever was admitted calls `leave`."""
        settings = self.service.settings
        if self._under_way + num_images > settings.max_in_flight:
            busy = problem(429, "busy", "more images are under way than this service takes at once; try again soon")
            return problem_response(busy, request.state.request_id, settings.retry_after_s)
        self._under_way += num_images
        self.metrics.under_way.set(self._under_way)
        return None

    def leave(self, num_images: int) -> None:
        """Give the room back."""
        self._under_way -= num_images
        self.metrics.under_way.set(self._under_way)

    async def ask(
        self, image: bytes, context: Context, caller: Caller, request_id: str, key: str | None, explain: bool
    ) -> StoredPrediction:
        """Ask for one answer, with its map if that is wanted."""
        answered = await self.service.predict(
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
        self.metrics.answered(answered.prediction)
        if explain and answered.heat_map is None and answered.prediction.label is not None:
            # A repeated request: the answer is the stored one, its map is computed again.
            heat_map = await self.service.explain(answered.prediction, "gradcam", None)
            return StoredPrediction(answered.prediction, answered.review, heat_map)
        return answered


def _with_consent(context: Context, caller: Caller) -> Context:
    """Return the context with the consent that counts: none from a sandbox, else what was said, else the key's."""
    if caller.sandbox:
        return context.model_copy(update={"consent": Consent.NONE})
    if context.consent is None and caller.default_consent is not None:
        return context.model_copy(update={"consent": caller.default_consent})
    return context


def _add_predict(router: APIRouter, asking: _Asking, door: Door) -> None:
    @router.post("", response_model=PredictionResponse, openapi_extra=image_body())
    async def predict(
        request: Request,
        caller: Annotated[Caller, Depends(door.requires(Scope.PREDICT))],
        explain: Annotated[Literal["gradcam"] | None, Query(description="add the map of the most likely class")] = None,
        idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
    ) -> Any:
        """Answer about one image: calibrated probabilities, a decision with its reasons, and who looks at it next."""
        refused = asking.admit(request, 1)
        if refused is not None:
            return refused
        try:
            image, context = await one_image(request)
            answered = await asking.ask(
                image, context, caller, request.state.request_id, idempotency_key, explain is not None
            )
        finally:
            asking.leave(1)
        return prediction_body(answered.prediction, answered.review, answered.heat_map, asking.service.store.taxonomy)


def _add_batch(router: APIRouter, asking: _Asking, door: Door) -> None:
    most = asking.service.settings.max_batch_images

    @router.post("/batch", response_model=BatchResponse, openapi_extra=image_body(many=True))
    async def predict_many(
        request: Request,
        caller: Annotated[Caller, Depends(door.requires(Scope.PREDICT))],
        idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
    ) -> Any:
        """Answer about several images, also of one lesion; one that cannot be used does not stop the others."""
        refused = asking.admit(request, 1)
        if refused is not None:
            return refused
        admitted = 1
        try:
            images = await many_images(request, most)
            refused = asking.admit(request, len(images) - 1)
            if refused is not None:
                return refused
            admitted = len(images)
            found = await asyncio.gather(
                *(
                    asking.ask(
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
            asking.leave(admitted)
        for outcome in found:
            if isinstance(outcome, BaseException) and not isinstance(outcome, RelookError):
                raise outcome
        contexts = [context for _, context in images]
        return batch_body(found, contexts, asking.service.store.taxonomy)

    @router.get("/batch", include_in_schema=False)
    def no_batch_is_read() -> None:
        # Else the next route would take the word for an id.
        raise HTTPException(405)


def _add_reading(router: APIRouter, service: Service, door: Door) -> None:
    @router.get("", response_model=PredictionPage)
    def list_predictions(
        caller: Annotated[Caller, Depends(door.requires(None))],
        decision: Annotated[Decision | None, Query(description="only these")] = None,
        after: Annotated[PredictionId | None, Query(description="`next` of the page before")] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> PredictionPage:
        """List answers, newest first."""
        return read_page(service.store, caller, decision, after, limit)

    @router.get("/{prediction_id}", response_model=PredictionResponse)
    def read_prediction(
        prediction_id: PredictionId, caller: Annotated[Caller, Depends(door.requires(None))]
    ) -> PredictionResponse:
        """Read an answer again, with where its review stands now."""
        prediction, review = find_prediction(service.store, prediction_id, caller)
        return prediction_body(prediction, review, None, service.store.taxonomy)
