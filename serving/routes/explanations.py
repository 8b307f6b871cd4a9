"""Routes of heat maps, for a stored prediction and for an image that is not stored, of cases like it, and of prints."""

import io
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse

from records.errors import RefusedError, UnknownIdError
from records.ids import utc_now
from records.types import Prediction, Scope
from records.types.base import Text
from serving.access.keys import Caller
from serving.messages import HeatMap, Method
from serving.page.print_view import print_html
from serving.responses import explanation_body, find_prediction, nearest_body
from serving.routes.admission import Admission
from serving.routes.authenticator import Authenticator
from serving.routes.bodies import BINARY, image_body, one_image
from serving.routes.models import HTML_PAGE, SANDBOX
from serving.schemas import Explanation, NearestCases, PredictionId
from serving.service import Service

MOST_CASES = 10

_FORMS: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": BINARY, "application/octet-stream": BINARY}}}

MethodQuery = Annotated[Method, Query(description="name of the method")]
TargetQuery = Annotated[Text | None, Query(description="class code; default: the predicted label")]
VersusQuery = Annotated[Text | None, Query(description="class code that the target is compared with")]
FormQuery = Annotated[Literal["json", "png", "npy"], Query(alias="format", description="npy: the raw values")]


def explanations_router(service: Service, authenticator: Authenticator, admission: Admission) -> APIRouter:
    """Return the router of explanations."""
    router = APIRouter(tags=["explanations"])

    @router.get("/v1/predictions/{prediction_id}/explanation", response_model=Explanation, responses=_FORMS)
    async def explain(
        prediction_id: PredictionId,
        caller: Annotated[Caller, Depends(authenticator.requires(None))],
        method: MethodQuery = "gradcam",
        target: TargetQuery = None,
        versus: VersusQuery = None,
        form: FormQuery = "json",
    ) -> Any:
        """Return a heat map of a stored prediction, computed by the model that made it."""
        prediction, _ = await run_in_threadpool(find_prediction, service.store, prediction_id, caller)
        found = await admission.explain(caller, method, lambda: service.explain(prediction, method, target, versus))
        return _response(found, form)

    @router.get("/v1/predictions/{prediction_id}/nearest", response_model=NearestCases)
    async def nearest(
        prediction_id: PredictionId,
        caller: Annotated[Caller, Depends(authenticator.requires(None))],
        limit: Annotated[int, Query(ge=1, le=MOST_CASES, description="number of cases, at most")] = 3,
    ) -> NearestCases:
        """Return the confirmed cases that are most like the image of a stored prediction, to the model that made it."""
        prediction, _ = await run_in_threadpool(find_prediction, service.store, prediction_id, caller)
        found = await admission.explained(caller, 1, lambda: service.nearest(prediction, limit))
        return nearest_body(prediction, found)

    @router.get("/v1/predictions/{prediction_id}/print", response_class=Response, responses=HTML_PAGE)
    async def print_prediction(
        prediction_id: PredictionId, caller: Annotated[Caller, Depends(authenticator.requires(None))]
    ) -> Response:
        """Return a stored prediction as a page to print: image, heat map, probabilities, context and model."""
        prediction, review = await run_in_threadpool(find_prediction, service.store, prediction_id, caller)
        heat_map = await _map_to_print(service, admission, prediction, caller)
        html = await run_in_threadpool(print_html, service.store, prediction, review, heat_map, utc_now())
        return HTMLResponse(html, headers={"Content-Security-Policy": SANDBOX})

    @router.post("/v1/explanations", response_model=Explanation, responses=_FORMS, openapi_extra=image_body())
    async def explain_image(
        request: Request,
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.PREDICT))],
        method: MethodQuery = "gradcam",
        target: Annotated[Text | None, Query(description="class code; default: the label")] = None,
        versus: VersusQuery = None,
        form: FormQuery = "json",
    ) -> Any:
        """Return a heat map of an image by the model that serves now. Nothing is stored."""
        image, _ = await one_image(request)
        found = await admission.explain(caller, method, lambda: service.explain_image(image, method, target, versus))
        return _response(found, form)

    return router


async def _map_to_print(
    service: Service, admission: Admission, prediction: Prediction, caller: Caller
) -> HeatMap | None:
    if prediction.label is None:
        return None
    try:
        return await admission.explain(caller, "gradcam", lambda: service.explain(prediction, "gradcam", None))
    except (RefusedError, UnknownIdError):
        return None  # the image was not stored or is erased, or the model is gone; the rest can be printed


def _response(heat_map: HeatMap, form: str) -> Any:
    if form == "png":
        return Response(heat_map.png, media_type="image/png")
    if form == "npy":
        buffer = io.BytesIO()
        np.save(buffer, heat_map.values, allow_pickle=False)
        return Response(buffer.getvalue(), media_type="application/octet-stream")
    return explanation_body(heat_map)
