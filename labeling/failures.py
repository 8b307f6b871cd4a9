"""What a failed call to Label Studio means, in one sentence that names the next step."""

from typing import Any

from records.errors import LabelStudioError, RefusedError, RelookError, UnknownIdError


def refusal(url: str, action: str, status: int, body: Any) -> RelookError:
    """Return the error for an answer that is not a success.

    Args:
        url: base URL of the Label Studio.
        action: what was asked, as in `import 100 tasks`.
        status: HTTP status.
        body: what it answered, JSON or text.
    Returns:
        UnknownIdError for 404, RefusedError for 409 (it exists already), else LabelStudioError.
    """
    said = " ".join(_reason(body).split())[:300]
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
    if status >= 500:
        return LabelStudioError(f"{where} failed to {action} ({status}: {said}); its log says why")
    return LabelStudioError(f"{where} refused to {action} ({status}: {said})")


def _reason(body: Any) -> str:
    if not isinstance(body, dict):
        return str(body or "no reason given")
    detail, faults = body.get("detail") or body, body.get("validation_errors")
    return f"{detail}: {faults}" if faults else str(detail)
