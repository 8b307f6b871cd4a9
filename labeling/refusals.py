"""Responses of Label Studio that are not a success, as errors of one sentence."""

from typing import Any

from records.errors import LabelStudioError, LabelStudioRefusedError, RefusedError, RelookError, UnknownIdError
from records.types.base import LINE


def refusal(url: str, action: str, status: int, body: Any) -> RelookError:
    """Return the error for a response that is not a success, as one sentence that names the next step.

    Args:
        url: base URL of the Label Studio.
        action: what was tried, as in `import 100 tasks`.
        status: HTTP status.
        body: of the response, JSON or text.
    Returns:
        UnknownIdError for 404, RefusedError for 409 (it exists already), LabelStudioRefusedError if another request may
        fare better, else LabelStudioError.
    """
    said = LINE.keep(" ".join(_reason(body).split()))
    where = f"Label Studio at {url}"
    if status in (401, 403):
        return LabelStudioError(
            f"{where} refused the token to {action} ({status}: {said}); for the local one it is kept in "
            "RELOOK_HOME/keys/label-studio.json, for another it comes from RELOOK_LABELING__TOKEN"
        )
    if status == 404:
        return UnknownIdError(f"{where} has nothing to {action}: {said}")
    if status == 409:
        return RefusedError(f"{where} has it already ({action}): {said}")
    if status == 429:
        return LabelStudioError(f"{where} asks for fewer requests ({action}); try again in a minute")
    if status == 413:
        return LabelStudioRefusedError(
            f"{where}, or a proxy before it, finds the request to {action} too large; raise its limit "
            "(nginx: client_max_body_size), or lower labeling.image_side_px"
        )
    if status >= 500:
        # 500 may be about one task of those in the request; 502 to 504 say that nothing responds.
        kind = LabelStudioRefusedError if status == 500 else LabelStudioError
        return kind(f"{where} failed to {action} ({status}: {said}); its log says why")
    return LabelStudioRefusedError(f"{where} refused to {action} ({status}: {said})")


def _reason(body: Any) -> str:
    if not isinstance(body, dict):
        return str(body or "no reason given")
    detail, faults = body.get("detail") or body, body.get("validation_errors")
    return f"{detail}: {faults}" if faults else str(detail)
