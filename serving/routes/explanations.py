"""Routes of explanations: of a stored answer, and of an image that is not stored."""

import io
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from records.types import Scope
from serving.access.keys import Caller
from serving.guard import problem_response
from serving.messages import HeatMap, Method
from serving.metrics import Metrics
from serving.problems import problem
from serving.responses import explanation_body, find_prediction
from serving.routes.bodies import BINARY, image_body, one_image
from serving.routes.door import Door
from serving.schemas import Explanation, PredictionId
from serving.service import Service

_FORMS: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": BINARY, "application/octet-stream": BINARY}}}

MethodQuery = Annotated[Method, Query(description="how the map is computed")]
TargetQuery = Annotated[str | None, Query(description="class code; default: the answer's label")]
VersusQuery = Annotated[str | None, Query(description="class code that the target is held against")]
FormQuery = Annotated[Literal["json", "png", "npy"], Query(alias="format", description="npy: the raw values")]


def explanations_router(service: Service, door: Door, metrics: Metrics) -> APIRouter:
    """Make the routes of explanations.

    Args:
        service: that explains.
        door: that knows callers.
        metrics: that count.
    Returns:
        The router.
    """
    router = APIRouter(tags=["explanations"])
    under_way = 0

    async def in_turn(request: Request, explanation: Any, form: str, method: str) -> Any:
        nonlocal under_way
        if under_way >= service.settings.max_explaining:
            explanation.close()
            busy = problem(429, "busy", "more maps are being computed than this service takes at once; try again soon")
            return problem_response(busy, request.state.request_id, service.settings.retry_after_s)
        under_way += 1
        try:
            heat_map: HeatMap = await explanation
        finally:
            under_way -= 1
        metrics.explained.labels(method=method).inc()
        return _response(heat_map, form)

    @router.get("/v1/predictions/{prediction_id}/explanation", response_model=Explanation, responses=_FORMS)
    async def explain(
        request: Request,
        prediction_id: PredictionId,
        caller: Annotated[Caller, Depends(door.requires(None))],
        method: MethodQuery = "gradcam",
        target: TargetQuery = None,
        versus: VersusQuery = None,
        form: FormQuery = "json",
    ) -> Any:
        """Show where the model that gave this answer looked, computed by that model from the stored image."""
        prediction, _ = await run_in_threadpool(find_prediction, service.store, prediction_id, caller)
        return await in_turn(request, service.explain(prediction, method, target, versus), form, method)

    @router.post("/v1/explanations", response_model=Explanation, responses=_FORMS, openapi_extra=image_body())
    async def explain_image(
        request: Request,
        caller: Annotated[Caller, Depends(door.requires(Scope.PREDICT))],
        method: MethodQuery = "gradcam",
        target: Annotated[str | None, Query(description="class code; default: the most likely class")] = None,
        versus: VersusQuery = None,
        form: FormQuery = "json",
    ) -> Any:
        """Show where the model that answers now would look in an image. Nothing is stored."""
        image, _ = await one_image(request)
        return await in_turn(request, service.explain_image(image, method, target, versus), form, method)

    return router


def _response(heat_map: HeatMap, form: str) -> Any:
    if form == "png":
        return Response(heat_map.png, media_type="image/png")
    if form == "npy":
        buffer = io.BytesIO()
        np.save(buffer, heat_map.values, allow_pickle=False)
        return Response(buffer.getvalue(), media_type="application/octet-stream")
    return explanation_body(heat_map)
