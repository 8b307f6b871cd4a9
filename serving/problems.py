"""Errors as RFC 9457 problem documents: status, code and one sentence.

In: an error of the tree in `records.errors`. Out: a `Problem`, or the response with it. Errors that the caller did
not cause reveal nothing: no traceback, no path, no value of a setting.
"""

import json
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from records.errors import AccessError, ImageError, RefusedError, UnavailableError, UnknownIdError, UserError
from records.types.base import LINE, Plain
from serving.schemas import Problem

MEDIA_TYPE = "application/problem+json"
OPEN_INFERENCE_PATH = "/v2"
TYPE_PREFIX = "urn:relook:problem:"

_SENTENCE = Plain(2000)
_ACCESS_STATUS: dict[str, int] = {"unauthenticated": 401, "forbidden": 403, "rate_limited": 429, "busy": 429}

_IMAGE_STATUS: dict[str, int] = {"not_an_image": 415, "unsupported_type": 415, "too_large": 413, "too_many_pixels": 413}


def problem(
    status: int, code: str, detail: str, *, request_id: str | None = None, errors: list[dict[str, Any]] | None = None
) -> Problem:
    """Return a problem document.

    Args:
        status: HTTP status, 400 to 599.
        code: stable identifier for programs.
        detail: one sentence for people.
        request_id: None until the response is made.
        errors: fields of a body that do not fit, each with `field` and `message`.
    Returns:
        The document.
    """
    title = HTTPStatus(status).phrase
    # Names of fields and paths come from the request, and JSON has no half of a surrogate pair.
    errors = None if errors is None else [{name: LINE.keep(str(value)) for name, value in e.items()} for e in errors]
    return Problem(
        type=TYPE_PREFIX + code,
        title=title,
        status=status,
        detail=_SENTENCE.keep(" ".join(detail.split())),
        code=code,
        request_id=request_id,
        errors=errors,
    )


def problem_of(error: BaseException) -> Problem:
    """Return the problem document of any error.

    Status 4xx for errors of the caller, 503 for a dependency that cannot be reached, else 500 without details.
    """
    match error:
        # Subclasses before their base: all but UnavailableError are UserErrors.
        case ImageError():
            return problem(_IMAGE_STATUS.get(error.code, 422), error.code, str(error))
        case AccessError():
            return problem(_ACCESS_STATUS[error.code], error.code, str(error))
        case UnknownIdError():
            return problem(404, "not_found", str(error))
        case RefusedError():
            return problem(409, "refused", str(error))
        case UserError():
            return problem(422, "invalid", str(error))
        # A fixed sentence: the error itself may name a host, a path or a URL with a password.
        case UnavailableError():
            return problem(
                503, "unavailable", "the service is not available now; try again soon (/readyz says what is missing)"
            )
        case _:
            return problem(500, "internal", "the service has an internal error, which is logged; try again later")


def problem_response(
    found: Problem, request_id: str | None, retry_after_s: int | None = None, *, path: str = ""
) -> Response:
    """Return the HTTP response of a problem, in the form that clients of its path expect.

    Args:
        found: the problem.
        request_id: None if the request has none.
        retry_after_s: becomes the header Retry-After.
        path: of the request; below /v2 errors have the form of the Open Inference Protocol.
    Returns:
        The response.
    """
    media_type, body = MEDIA_TYPE, found.model_copy(update={"request_id": request_id})
    content = body.model_dump_json(exclude_none=True)
    if speaks_open_inference(path):
        media_type, content = "application/json", json.dumps({"error": found.detail})
    headers = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else {}
    if found.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="relook"'
    return Response(content, status_code=found.status, headers=headers, media_type=media_type)


def speaks_open_inference(path: str) -> bool:
    """Return whether a path is one of the Open Inference Protocol."""
    return path == OPEN_INFERENCE_PATH or path.startswith(OPEN_INFERENCE_PATH + "/")
