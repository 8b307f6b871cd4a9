"""Routes of heat maps: for a stored prediction, and for an image that is not stored."""

import io
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from records.types import Scope
from serving.access.keys import Caller
from serving.messages import HeatMap, Method
from serving.metrics import Metrics
from serving.problems import problem, problem_response
from serving.responses import explanation_body, find_prediction
from serving.routes.authenticator import Authenticator
from serving.routes.bodies import BINARY, image_body, one_image
from serving.schemas import Explanation, PredictionId
from serving.service import Service

_FORMS: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": BINARY, "application/octet-stream": BINARY}}}

MethodQuery = Annotated[Method, Query(description="name of the method")]
TargetQuery = Annotated[str | None, Query(description="class code; default: the predicted label")]
VersusQuery = Annotated[str | None, Query(description="class code that the target is compared with")]
FormQuery = Annotated[Literal["json", "png", "npy"], Query(alias="format", description="npy: the raw values")]


def explanations_router(service: Service, authenticator: Authenticator, metrics: Metrics) -> APIRouter:
    """Return the router of explanations."""
    router = APIRouter(tags=["explanations"])
    # Changed only on the event loop and never across an `await`, so it needs no lock.
    in_flight = 0

    async def limited(request: Request, explanation: Any, form: str, method: str) -> Any:
        nonlocal in_flight
        if in_flight >= service.settings.max_explaining:
            # A coroutine that is never awaited must be closed, else Python warns about it.
            explanation.close()
            busy = problem(429, "busy", "the service computes as many heat maps as it accepts; try again soon")
            return problem_response(busy, request.state.request_id, service.settings.retry_after_s)
        in_flight += 1
        try:
            heat_map: HeatMap = await explanation
        finally:
            in_flight -= 1
        metrics.explained.labels(method=method).inc()
        return _response(heat_map, form)

    @router.get("/v1/predictions/{prediction_id}/explanation", response_model=Explanation, responses=_FORMS)
    async def explain(
        request: Request,
        prediction_id: PredictionId,
        caller: Annotated[Caller, Depends(authenticator.requires(None))],
        method: MethodQuery = "gradcam",
        target: TargetQuery = None,
        versus: VersusQuery = None,
        form: FormQuery = "json",
    ) -> Any:
        """Return a heat map of a stored prediction, computed by the model that made it."""
        prediction, _ = await run_in_threadpool(find_prediction, service.store, prediction_id, caller)
        return await limited(request, service.explain(prediction, method, target, versus), form, method)

    @router.post("/v1/explanations", response_model=Explanation, responses=_FORMS, openapi_extra=image_body())
    async def explain_image(
        request: Request,
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.PREDICT))],
        method: MethodQuery = "gradcam",
        target: Annotated[str | None, Query(description="class code; default: the most likely class")] = None,
        versus: VersusQuery = None,
        form: FormQuery = "json",
    ) -> Any:
        """Return a heat map of an image by the model that serves now. Nothing is stored."""
        image, _ = await one_image(request)
        return await limited(request, service.explain_image(image, method, target, versus), form, method)

    return router


def _response(heat_map: HeatMap, form: str) -> Any:
    if form == "png":
        return Response(heat_map.png, media_type="image/png")
    if form == "npy":
        buffer = io.BytesIO()
        np.save(buffer, heat_map.values, allow_pickle=False)
        return Response(buffer.getvalue(), media_type="application/octet-stream")
    return explanation_body(heat_map)
