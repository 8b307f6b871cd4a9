"""Every error as an RFC 9457 problem document: status, code and one sentence.

In: an error of the tree in `records.errors`. Out: a `Problem`. What is not the caller's fault says so
and gives nothing away: no traceback, no path, no value of a setting.
"""

from http import HTTPStatus
from typing import Any

from records.errors import (
    AccessError,
    ImageError,
    RefusedError,
    UnavailableError,
    UnknownIdError,
    UserError,
)
from serving.schemas import Problem

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:relook:problem:"

_ACCESS_STATUS: dict[str, int] = {"unauthenticated": 401, "forbidden": 403, "rate_limited": 429}

_IMAGE_STATUS: dict[str, int] = {
    "not_an_image": 415,
    "unsupported_type": 415,
    "too_large": 413,
    "too_many_pixels": 413,
}


def problem(
    status: int, code: str, detail: str, *, request_id: str | None = None, errors: list[dict[str, Any]] | None = None
) -> Problem:
    """Make a problem document.

    Args:
        status: HTTP status, 400 to 599.
        code: stable word for programs.
        detail: one sentence for people.
        request_id: of the request, if it has one.
        errors: fields that do not fit.
    Returns:
        The document.
    """
    title = HTTPStatus(status).phrase
    return Problem(
        type=TYPE_PREFIX + code,
        title=title,
        status=status,
        detail=detail,
        code=code,
        request_id=request_id,
        errors=errors,
    )


def problem_of(error: BaseException) -> Problem:
    """Turn an error into a problem document.

    Args:
        error: anything that was raised.
    Returns:
        4xx for the caller's errors, 503 for something outside that does not answer, else 500 without details.
    """
    match error:
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
        case UnavailableError():
            return problem(
                503, "unavailable", "the service cannot answer now; try again soon (/readyz says what is missing)"
            )
        case _:
            return problem(500, "internal", "the service met a fault of its own and logged it; try again later")
