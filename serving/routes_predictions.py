"""Routes of answers: ask for one, read one, list them, explain one, object to one."""

import io
import logging
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from records.errors import DataError, PictureError, RelookError
from records.types import Decision, Prediction, ReviewItem
from serving.answers import answer_body, explanation_body, flag_body, read_answer, read_page
from serving.guard import problem_response
from serving.messages import HeatMap, Method, PredictionRequest
from serving.outbox import write_flag
from serving.problems import problem
from serving.schemas import (
    Context,
    Explanation,
    FlagAnswer,
    FlagRequest,
    IdempotencyKey,
    PredictionAnswer,
    PredictionId,
    PredictionPage,
)
from serving.service import Service

logger = logging.getLogger(__name__)

CALLER = "local"
"""Who calls, as long as there are no keys."""

RAW_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "description": "The picture as raw body, or a form with `image` and optionally `context` (JSON).",
    "content": {
        **dict.fromkeys(RAW_TYPES[:3], _BINARY),
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {
                    "image": {"type": "string", "format": "binary"},
                    "context": {"type": "string", "description": "JSON, see Context"},
                },
            },
            "encoding": {"context": {"contentType": "application/json"}},
        },
    },
}


def predictions_router(service: Service) -> APIRouter:
    """Make the routes under /v1/predictions.

    Args:
        service: that answers.
    Returns:
        The router.
    """
    router = APIRouter(prefix="/v1/predictions", tags=["predictions"])
    _add_predict(router, service)
    _add_reading(router, service)
    _add_explanation(router, service)
    _add_flags(router, service)
    return router


def _add_predict(router: APIRouter, service: Service) -> None:
    under_way = 0

    @router.post("", response_model=PredictionAnswer, openapi_extra={"requestBody": _REQUEST_BODY})
    async def predict(
        request: Request,
        explain: Annotated[Method | None, Query(description="add the map of the most likely class")] = None,
        idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
    ) -> Any:
        """Answer about one picture: probabilities, a decision with its reasons, and who looks at it next."""
        nonlocal under_way
        if under_way >= service.settings.max_in_flight:
            busy = problem(429, "busy", "more pictures are under way than this service takes at once; try again soon")
            return problem_response(busy, request.state.request_id, service.settings.retry_after_s)
        under_way += 1
        try:
            picture, context = await _picture_and_context(request)
            answered = await service.predict(
                PredictionRequest(
                    picture=picture,
                    request_id=request.state.request_id,
                    context=context,
                    caller=CALLER,
                    idempotency_key=idempotency_key,
                    explain=explain is not None,
                )
            )
            heat_map = answered.heat_map
            if explain is not None and heat_map is None and answered.prediction.label is not None:
                # A repeated request: the answer is the stored one, its map is computed again.
                heat_map = await service.explain(answered.prediction, explain, None)
        finally:
            under_way -= 1
        return answer_body(answered.prediction, answered.review, heat_map, service.store.taxonomy)


def _add_reading(router: APIRouter, service: Service) -> None:
    @router.get("", response_model=PredictionPage)
    def list_predictions(
        decision: Annotated[Decision | None, Query(description="only these")] = None,
        after: Annotated[PredictionId | None, Query(description="`next` of the page before")] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> PredictionPage:
        """List answers, newest first."""
        return read_page(service.store, decision, after, limit)

    @router.get("/{prediction_id}", response_model=PredictionAnswer)
    def read_prediction(prediction_id: PredictionId) -> PredictionAnswer:
        """Read an answer again, with where its review stands now."""
        prediction, review = read_answer(service.store, prediction_id)
        return answer_body(prediction, review, None, service.store.taxonomy)


def _add_explanation(router: APIRouter, service: Service) -> None:
    responses: dict[int | str, dict[str, Any]] = {
        200: {"content": {"image/png": _BINARY, "application/octet-stream": _BINARY}}
    }

    @router.get("/{prediction_id}/explanation", response_model=Explanation, responses=responses)
    async def explain(
        prediction_id: PredictionId,
        method: Annotated[Method, Query(description="how the map is computed")] = "gradcam",
        target: Annotated[str | None, Query(description="class code; default: the answer's label")] = None,
        form: Annotated[Literal["json", "png", "npy"], Query(alias="format")] = "json",
    ) -> Any:
        """Show where the model that gave this answer looked, computed by that model from the stored picture."""
        prediction, _ = await run_in_threadpool(read_answer, service.store, prediction_id)
        heat_map = await service.explain(prediction, method, target)
        if form == "png":
            return Response(heat_map.png, media_type="image/png")
        if form == "npy":
            return Response(_npy(heat_map), media_type="application/octet-stream")
        return explanation_body(heat_map)


def _add_flags(router: APIRouter, service: Service) -> None:
    @router.post("/{prediction_id}/flags", response_model=FlagAnswer)
    async def flag(prediction_id: PredictionId, body: FlagRequest) -> FlagAnswer:
        """Object to an answer, so that an expert looks at it."""
        prediction, review = await run_in_threadpool(read_answer, service.store, prediction_id)
        overlay = await _overlay_for_experts(service, prediction, review)
        written, item = await run_in_threadpool(write_flag, service.store, prediction, body, CALLER, overlay)
        return flag_body(written, item, prediction.consent)


async def _overlay_for_experts(service: Service, prediction: Prediction, review: ReviewItem | None) -> str | None:
    """Return the blob of a heat map for the question that a flag raises; None if there is no map or one already."""
    if review is not None and review.overlay_blob is not None:
        return review.overlay_blob
    try:
        heat_map = await service.explain(prediction, "gradcam", None)
        return await run_in_threadpool(service.store.blobs.put, heat_map.png)
    except RelookError as error:
        # An objection must not be lost for want of its picture.
        logger.warning("no heat map for the flag on %s: %s", prediction.id, error)
        return None


async def _picture_and_context(request: Request) -> tuple[bytes, Context]:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type in RAW_TYPES:
        return await request.body(), Context()
    if media_type != "multipart/form-data":
        raise PictureError(
            f"content type {media_type or 'none'!r} is not taken; send image/jpeg, image/png, image/webp, "
            "or multipart/form-data with `image`",
            "unsupported_type",
        )
    async with request.form(max_files=2, max_fields=2, max_part_size=service_limit(request)) as form:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise DataError("the form has no file `image`; add the picture under that name")
        return await image.read(), await _context(form)


def service_limit(request: Request) -> int:
    """Return the largest part of a form: what is allowed for the whole request, bytes."""
    limit: int = request.app.state.max_body_bytes
    return limit


async def _context(form: FormData) -> Context:
    part = form.get("context")
    if part is None:
        return Context()
    text = await part.read() if isinstance(part, UploadFile) else part
    try:
        return Context.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(name) for name in first["loc"]) or "context"
        raise DataError(f"context: {field}: {first['msg']}") from error


def _npy(heat_map: HeatMap) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, heat_map.values, allow_pickle=False)
    return buffer.getvalue()
