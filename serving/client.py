"""A typed HTTP client of the service, for the page, the demo, tests and other programs.

    with Client("http://127.0.0.1:8000") as client:
        prediction = client.predict(Path("lesion.jpg").read_bytes(), explain="gradcam")

In and out: bytes and bodies of `serving.schemas`, or an error of the tree in `records.errors`. A request without a
response is sent again only if that changes nothing more: GET, DELETE of what it names, POST with an Idempotency-Key,
flags and outcomes (an equal one is stored once). Any other one is reported, since it may have been processed. Threads
may share a client.
"""

import json
import ssl
import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from records.errors import (
    AccessError,
    DataError,
    ImageError,
    RefusedError,
    RelookError,
    UnavailableError,
    UnknownIdError,
)
from records.images import is_dicom, sniff
from records.types import Consent
from serving.label_value import LabelValueInfo
from serving.schemas import (
    BatchResponse,
    CallerInfo,
    Context,
    ErasureResponse,
    EventPage,
    Explanation,
    FlagRequest,
    FlagResponse,
    ImageConsent,
    ModelDetails,
    ModelInfo,
    ModelList,
    NearestCases,
    OutcomeRequest,
    OutcomeResponse,
    PredictionPage,
    PredictionResponse,
    Problem,
    Readiness,
    RolloutInfo,
    RolloutRequest,
    RoundList,
    ServedModelInfo,
    UndoRequest,
)

B = TypeVar("B", bound=BaseModel)

_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
"""Errors of a request of which no byte was sent."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


class Client:
    """A connection to one service.

    Args:
        base_url: such as `http://127.0.0.1:8000`.
        api_key: sent as bearer token if given.
        timeout_s: of one attempt, seconds.
        retry_s: time during which a request is repeated while the service is unreachable or busy, seconds.
        transport: an httpx transport, to call an app without a network.
        verify: what certificates are checked by; True is the public certificate authorities.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        retry_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._retry_s = retry_s
        self._timeout_s = timeout_s
        # trust_env off: a proxy that the environment sets for the internet must not see the images.
        self._http = httpx.Client(
            base_url=base_url, headers=headers, timeout=timeout_s, transport=transport, verify=verify, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(
        self,
        image: bytes,
        *,
        explain: Literal["gradcam"] | None = None,
        context: Context | None = None,
        idempotency_key: str | None = None,
    ) -> PredictionResponse:
        """Predict one image.

        Args:
            image: a JPEG, PNG or WebP file.
            explain: add the heat map of the label.
            context: metadata and consent of the image.
            idempotency_key: a repeated call with the same key gets the same prediction; default: a new key.
        Returns:
            The prediction.
        Raises:
            ImageError: the service cannot use the image.
            DataError: the context is invalid.
            UnavailableError: the service could not be reached, or stayed busy.
        """
        # Set before the first attempt: all repetitions of this call must carry the same key.
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        parameters = {"explain": explain} if explain else {}
        if context is None:
            headers["Content-Type"] = _media_type(image)
            sent: dict[str, Any] = {"content": image}
        else:
            body = context.model_dump_json(exclude_none=True)
            sent = {
                "files": {"image": ("image", image, _media_type(image)), "context": (None, body, "application/json")}
            }
        response = self._send("POST", "/v1/predictions", headers=headers, params=parameters, **sent)
        return _parsed(PredictionResponse, response)

    def prediction(self, prediction_id: str, *, wait_s: float = 0.0) -> PredictionResponse:
        """Return a stored prediction; UnknownIdError if there is none.

        With `wait_s` (up to 60) the service responds only once annotators have looked at it, or that time is over.
        """
        parameters = {"wait": wait_s} if wait_s else {}
        timeout_s = max(wait_s + self._timeout_s, self._timeout_s)
        path = f"/v1/predictions/{prediction_id}"
        return _parsed(PredictionResponse, self._send("GET", path, params=parameters, timeout=timeout_s))

    def predictions(self, *, decision: str | None = None, after: str | None = None, limit: int = 50) -> PredictionPage:
        """Return a page of predictions, newest first; `after` is `next` of the page before."""
        wanted = {"decision": decision, "after": after, "limit": limit}
        parameters = {name: value for name, value in wanted.items() if value is not None}
        return _parsed(PredictionPage, self._send("GET", "/v1/predictions", params=parameters))

    def predict_many(
        self, images: Sequence[bytes], *, contexts: Sequence[Context] | None = None, idempotency_key: str | None = None
    ) -> BatchResponse:
        """Predict several images; an unusable image does not stop the others.

        Args:
            images: JPEG, PNG or WebP files.
            contexts: one per image, or None.
            idempotency_key: a repeated call with the same key gets the same predictions; default: a new key.
        Returns:
            A prediction or a problem per image.
        Raises:
            DataError: too many images, or invalid contexts.
            UnavailableError: the service could not be reached, or stayed busy.
        """
        files: list[tuple[str, tuple[Any, ...]]] = [("image", ("image", p, _media_type(p))) for p in images]
        if contexts is not None:
            body = json.dumps([c.model_dump(mode="json", exclude_none=True) for c in contexts])
            files.append(("context", (None, body, "application/json")))
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return _parsed(BatchResponse, self._send("POST", "/v1/predictions/batch", headers=headers, files=files))

    def explanation(
        self, prediction_id: str, *, method: str = "gradcam", target: str | None = None, versus: str | None = None
    ) -> Explanation:
        """Return a heat map of a stored prediction.

        Args:
            prediction_id: 32 hex characters.
            method: name of the method.
            target: class code; default: the predicted label.
            versus: class code that the target is compared with.
        Returns:
            The raw map and its overlay.
        Raises:
            UnknownIdError: there is no such prediction.
            RefusedError: its image was not stored.
        """
        return _parsed(Explanation, self._explain(prediction_id, method, target, "json", versus))

    def nearest(self, prediction_id: str, *, limit: int = 3) -> NearestCases:
        """Return the confirmed cases that are most like the image of a stored prediction.

        Args:
            prediction_id: 32 hex characters.
            limit: number of cases, at most.
        Returns:
            The cases, the nearest first; there may be none.
        Raises:
            UnknownIdError: there is no such prediction.
            RefusedError: its image was not stored.
        """
        path = f"/v1/predictions/{prediction_id}/nearest"
        return _parsed(NearestCases, self._send("GET", path, params={"limit": limit}))

    def print_view(self, prediction_id: str) -> str:
        """Return the HTML of a stored prediction as a page to print; UnknownIdError if there is no such prediction."""
        return self._send("GET", f"/v1/predictions/{prediction_id}/print").text

    def explanation_png(self, prediction_id: str, *, method: str = "gradcam", target: str | None = None) -> bytes:
        """Return the overlay as PNG bytes; see `explanation`."""
        return self._explain(prediction_id, method, target, "png").content

    def explain_image(
        self, image: bytes, *, method: str = "gradcam", target: str | None = None, versus: str | None = None
    ) -> Explanation:
        """Return a heat map of an image that is not stored; see `explanation`."""
        wanted = {"method": method, "target": target, "versus": versus}
        parameters = {name: value for name, value in wanted.items() if value is not None}
        headers = {"Content-Type": _media_type(image)}
        sent = {"params": parameters, "content": image, "headers": headers}
        return _parsed(Explanation, self._send("POST", "/v1/explanations", acts_once=True, **sent))

    def outcome(self, prediction_id: str, request: OutcomeRequest) -> OutcomeResponse:
        """Report a diagnosis; an equal report is stored once.

        Args:
            prediction_id: of a stored prediction.
            request: diagnosis and how it was confirmed.
        Returns:
            The stored outcome.
        Raises:
            UnknownIdError: there is no such prediction.
            RefusedError: its image was not stored.
            DataError: the diagnosis is not a class.
        """
        body = request.model_dump(mode="json")
        path = f"/v1/predictions/{prediction_id}/outcomes"
        return _parsed(OutcomeResponse, self._send("POST", path, acts_once=True, json=body))

    def events(
        self, *, after: str | None = None, limit: int = 50, prediction_ids: Sequence[str] | None = None
    ) -> EventPage:
        """Return events of all predictions or of these, oldest first; pass `next` as `after`."""
        parameters: dict[str, Any] = {"limit": limit} | ({"after": after} if after else {})
        if prediction_ids is not None:
            parameters["prediction_id"] = list(prediction_ids)
        return _parsed(EventPage, self._send("GET", "/v1/events", params=parameters))

    def erase(self, image_id: str) -> ErasureResponse:
        """Erase an image (scope admin); UnknownIdError if there is none."""
        return _parsed(ErasureResponse, self._send("DELETE", f"/v1/images/{image_id}"))

    def take_back_consent(self, image_id: str, consent: Consent) -> ImageConsent:
        """Lower the consent of an image that this organisation sent; `none` erases it.

        UnknownIdError if there is none or others sent it, too; RefusedError if its consent is lower.
        """
        body = {"consent": consent}
        return _parsed(ImageConsent, self._send("PATCH", f"/v1/images/{image_id}", json=body))

    def flag(self, prediction_id: str, request: FlagRequest) -> FlagResponse:
        """Flag a prediction for review; an equal flag is stored once.

        Args:
            prediction_id: of a stored prediction.
            request: reason, suggested label and comment.
        Returns:
            The stored flag and the state of its review item.
        Raises:
            UnknownIdError: there is no such prediction.
            RefusedError: no annotator may see the image.
            DataError: the suggested label is not a class.
        """
        body = request.model_dump(mode="json")
        path = f"/v1/predictions/{prediction_id}/flags"
        return _parsed(FlagResponse, self._send("POST", path, acts_once=True, json=body))

    def model(self) -> ServedModelInfo:
        """Return the model that serves now."""
        return _parsed(ServedModelInfo, self._send("GET", "/v1/model"))

    def rollout(self) -> RolloutInfo:
        """Return the current rollout; UnknownIdError if there is none."""
        return _parsed(RolloutInfo, self._send("GET", "/v1/rollout"))

    def roll_out(self, request: RolloutRequest) -> RolloutInfo:
        """Start a rollout, or change or promote the one that the request names (scope admin).

        Args:
            request: candidate, traffic share, and the rollout unless one is to start.
        Returns:
            The rollout.
        Raises:
            AccessError: the key lacks the scope.
            RefusedError: the named rollout has ended or is of another model; none is named and one is in progress; or
                the gate has not passed this candidate.
            UnknownIdError: there is no such model or rollout.
        """
        return _parsed(RolloutInfo, self._send("POST", "/v1/rollout", json=request.model_dump(mode="json")))

    def roll_back(self, rollout_id: str, reason: str) -> RolloutInfo:
        """Roll a rollout back (scope admin); RefusedError if it was promoted."""
        parameters = {"rollout": rollout_id, "reason": reason}
        return _parsed(RolloutInfo, self._send("DELETE", "/v1/rollout", params=parameters))

    def undo_promotion(self, model_id: str, request: UndoRequest) -> ModelInfo:
        """Take the serving model away and let the one that it replaced serve again (scope admin).

        Returns the model that serves again; RefusedError unless `model_id` serves and replaced `request.back_to`.
        """
        path = f"/v1/models/{model_id}/undo-promotion"
        return _parsed(ModelInfo, self._send("POST", path, json=request.model_dump(mode="json")))

    def models(self) -> ModelList:
        """Return all registered models, newest first."""
        return _parsed(ModelList, self._send("GET", "/v1/models"))

    def model_details(self, model_id: str) -> ModelDetails:
        """Return the measured figures of a model; UnknownIdError if there is none."""
        return _parsed(ModelDetails, self._send("GET", f"/v1/models/{model_id}"))

    def report(self, model_id: str) -> str:
        """Return the HTML report of a model; UnknownIdError if there is none."""
        return self._send("GET", f"/v1/models/{model_id}/report").text

    def rounds(self) -> RoundList:
        """Return all rounds, oldest first."""
        return _parsed(RoundList, self._send("GET", "/v1/rounds"))

    def label_value(self) -> LabelValueInfo:
        """Return what the labels bought, as it was measured last; UnknownIdError if it never was."""
        return _parsed(LabelValueInfo, self._send("GET", "/v1/labels/value"))

    def caller(self) -> CallerInfo:
        """Return the caller that the key identifies; AccessError if the key is not valid."""
        return _parsed(CallerInfo, self._send("GET", "/v1/caller"))

    def ready(self) -> Readiness:
        """Return whether predictions can be made now; one attempt without repetition."""
        try:
            # Not by `_send`: 503 is the expected response while a service starts, and must not be repeated.
            response = self._http.get("/readyz")
        except httpx.TransportError as error:
            return Readiness(ready=False, model=None, detail=f"no service responds at {self._http.base_url}: {error}")
        return _parsed(Readiness, response)

    def _explain(
        self, prediction_id: str, method: str, target: str | None, form: str, versus: str | None = None
    ) -> httpx.Response:
        wanted = {"method": method, "format": form, "target": target, "versus": versus}
        parameters = {name: value for name, value in wanted.items() if value is not None}
        return self._send("GET", f"/v1/predictions/{prediction_id}/explanation", params=parameters)

    def _send(self, verb: str, path: str, *, acts_once: bool = False, **sent: Any) -> httpx.Response:
        """Send a request; `acts_once` says of a POST without a key that repeating it changes nothing."""
        # DELETE names what ends, and it ends once: a second one changes nothing.
        is_idempotent = acts_once or verb in ("GET", "DELETE") or "Idempotency-Key" in sent.get("headers", {})
        deadline = time.monotonic() + self._retry_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                response = self._http.request(verb, path, **sent)
            except httpx.TransportError as error:
                reached = not isinstance(error, _NOT_SENT)
                if reached and not is_idempotent:
                    raise UnavailableError(
                        f"{verb} {path} got no response ({error or type(error).__name__}) and may have been processed; "
                        "look before sending it again"
                    ) from error
                if time.monotonic() + pause_s > deadline:
                    raise UnavailableError(
                        f"the service at {self._http.base_url} does not respond ({error or type(error).__name__}); "
                        "start it with `relook serve`"
                    ) from error
            else:
                if response.is_success:
                    return response
                # Any other error would be the same the next time. 429 is sent before a request is processed, 503
                # perhaps after it.
                again = response.status_code == 429 or (response.status_code == 503 and is_idempotent)
                if not again or time.monotonic() + pause_s > deadline:
                    raise _error_of(response)
                pause_s = max(pause_s, _retry_after_s(response))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _media_type(image: bytes) -> str:
    if is_dicom(image):
        return "application/dicom"
    try:
        return f"image/{sniff(image)}"
    except ImageError:
        # Sent anyway: the service reports what is wrong with the image.
        return "application/octet-stream"


def _retry_after_s(response: httpx.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_PAUSE_S) if asked.isdigit() else 0.0


def _parsed(body: type[B], response: httpx.Response) -> B:
    try:
        return body.model_validate_json(response.content)
    except ValidationError as error:
        raise RelookError(
            f"{response.request.url.path} did not return a {body.__name__}; is this a service of the same version?"
        ) from error


def _error_of(response: httpx.Response) -> RelookError:
    try:
        found = Problem.model_validate(json.loads(response.content))
    except (ValueError, ValidationError):
        return RelookError(f"{response.request.url.path} returned {response.status_code} without a problem document")
    match found.status:
        case 401 | 403:
            return AccessError(found.detail, found.code)
        case 404:
            return UnknownIdError(found.detail)
        case 409:
            return RefusedError(found.detail)
        case 413 | 415:
            return ImageError(found.detail, found.code)
        case 422 if found.code in ("empty", "damaged", "too_costly"):
            return ImageError(found.detail, found.code)
        case 429 | 503:
            return UnavailableError(found.detail)
        case status if status < 500:
            return DataError(found.detail)
        case _:
            return RelookError(found.detail)
