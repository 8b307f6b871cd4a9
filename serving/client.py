"""A typed client of the service, used by the page, the demo and the tests, and by anybody's program.

    with Client("http://127.0.0.1:8000") as client:
        answer = client.predict(Path("lesion.jpg").read_bytes(), explain="gradcam")

In: bytes and bodies of `serving.schemas`. Out: bodies of `serving.schemas`, or an error of the tree in
`records.errors`. A request that got no answer is sent again with the same Idempotency-Key, so nothing is
predicted or flagged twice. One client may be shared by threads.
"""

import json
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
from records.images import sniff
from serving.schemas import (
    BatchResponse,
    CallerInfo,
    Context,
    ErasureResponse,
    EventPage,
    Explanation,
    FlagRequest,
    FlagResponse,
    ModelDetails,
    ModelList,
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
)

B = TypeVar("B", bound=BaseModel)

_BUSY = (429, 503)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


class Client:
    """A connection to one service.

    Args:
        base_url: such as `http://127.0.0.1:8000`.
        api_key: sent as bearer token if given.
        timeout_s: of one request.
        retry_s: how long a request is tried again while the service cannot be reached or is busy.
        transport: of httpx, to reach an app without a network.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        retry_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._retry_s = retry_s
        # trust_env off: a proxy set for the internet must not see images on their way to this machine.
        self._http = httpx.Client(
            base_url=base_url, headers=headers, timeout=timeout_s, transport=transport, trust_env=False
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
        """Ask for an answer about one image.

        Args:
            image: a JPEG, PNG or WebP file.
            explain: add the map of the most likely class.
            context: what is known about the image.
            idempotency_key: repeating a call with its key gives the same answer; default: a fresh key.
        Returns:
            The answer.
        Raises:
            ImageError: the service cannot use the image.
            DataError: the context does not fit.
            UnavailableError: the service could not be reached, or stayed busy.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        parameters = {"explain": explain} if explain else {}
        if context is None:
            headers["Content-Type"] = _media_type(image)
            sent: dict[str, Any] = {"content": image}
        else:
            body = context.model_dump_json(exclude_none=True)
            sent = {
                "files": {
                    "image": ("image", image, _media_type(image)),
                    "context": (None, body, "application/json"),
                }
            }
        response = self._send("POST", "/v1/predictions", headers=headers, params=parameters, **sent)
        return _parsed(PredictionResponse, response)

    def prediction(self, prediction_id: str) -> PredictionResponse:
        """Return a stored answer; UnknownIdError if there is none."""
        return _parsed(PredictionResponse, self._send("GET", f"/v1/predictions/{prediction_id}"))

    def predictions(self, *, decision: str | None = None, after: str | None = None, limit: int = 50) -> PredictionPage:
        """List answers, newest first.

        Args:
            decision: only these.
            after: `next` of the page before.
            limit: at most so many.
        Returns:
            One page.
        """
        wanted = {"decision": decision, "after": after, "limit": limit}
        parameters = {name: value for name, value in wanted.items() if value is not None}
        return _parsed(PredictionPage, self._send("GET", "/v1/predictions", params=parameters))

    def predict_many(
        self,
        images: Sequence[bytes],
        *,
        contexts: Sequence[Context] | None = None,
        idempotency_key: str | None = None,
    ) -> BatchResponse:
        """Ask for answers about several images; one that cannot be used does not stop the others.

        Args:
            images: JPEG, PNG or WebP files.
            contexts: one per image, or None.
            idempotency_key: repeating a call with its key gives the same answers; default: a fresh key.
        Returns:
            An answer or a problem per image.
        Raises:
            DataError: too many images, or contexts that do not fit.
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
        """Return where the model looked.

        Args:
            prediction_id: of a stored answer.
            method: how it is computed.
            target: class code; default: the answer's label.
            versus: class code that the target is held against.
        Returns:
            The map, raw and drawn over the image.
        Raises:
            UnknownIdError: there is no such answer.
            RefusedError: its image was not stored.
        """
        return _parsed(Explanation, self._explain(prediction_id, method, target, "json", versus))

    def explanation_png(self, prediction_id: str, *, method: str = "gradcam", target: str | None = None) -> bytes:
        """Return the map drawn over the image, as PNG bytes; see `explanation`."""
        return self._explain(prediction_id, method, target, "png").content

    def explain_image(
        self, image: bytes, *, method: str = "gradcam", target: str | None = None, versus: str | None = None
    ) -> Explanation:
        """Return where the model would look in an image that is not stored; see `explanation`."""
        wanted = {"method": method, "target": target, "versus": versus}
        parameters = {name: value for name, value in wanted.items() if value is not None}
        headers = {"Content-Type": _media_type(image)}
        return _parsed(
            Explanation, self._send("POST", "/v1/explanations", params=parameters, content=image, headers=headers)
        )

    def outcome(self, prediction_id: str, request: OutcomeRequest) -> OutcomeResponse:
        """Say what turned out to be true.

        Args:
            prediction_id: of a stored answer.
            request: the outcome; sending an equal one again changes nothing.
        Returns:
            What it is used for.
        Raises:
            UnknownIdError: there is no such answer.
            RefusedError: its image was not stored.
            DataError: the diagnosis is not a class.
        """
        body = request.model_dump(mode="json")
        return _parsed(OutcomeResponse, self._send("POST", f"/v1/predictions/{prediction_id}/outcomes", json=body))

    def events(
        self, *, after: str | None = None, limit: int = 50, prediction_ids: Sequence[str] | None = None
    ) -> EventPage:
        """Return what happened to one's own answers (or to these), oldest first; pass `next` on as `after`."""
        parameters: dict[str, Any] = {"limit": limit} | ({"after": after} if after else {})
        if prediction_ids is not None:
            parameters["prediction_id"] = list(prediction_ids)
        return _parsed(EventPage, self._send("GET", "/v1/events", params=parameters))

    def erase(self, image_id: str) -> ErasureResponse:
        """Erase an image (scope admin); UnknownIdError if there is none."""
        return _parsed(ErasureResponse, self._send("DELETE", f"/v1/images/{image_id}"))

    def flag(self, prediction_id: str, request: FlagRequest) -> FlagResponse:
        """Object to an answer.

        Args:
            prediction_id: of a stored answer.
            request: the objection; sending an equal one again changes nothing.
        Returns:
            What became of it.
        Raises:
            UnknownIdError: there is no such answer.
            RefusedError: the image may not be shown to an annotator.
            DataError: the suggested label is not a class.
        """
        body = request.model_dump(mode="json")
        return _parsed(FlagResponse, self._send("POST", f"/v1/predictions/{prediction_id}/flags", json=body))

    def model(self) -> ServedModelInfo:
        """Return the model that answers now."""
        return _parsed(ServedModelInfo, self._send("GET", "/v1/model"))

    def rollout(self) -> RolloutInfo:
        """Return the rollout that is under way; UnknownIdError if there is none."""
        return _parsed(RolloutInfo, self._send("GET", "/v1/rollout"))

    def roll_out(self, request: RolloutRequest) -> RolloutInfo:
        """Begin, widen or finish a rollout (scope admin).

        Args:
            request: candidate and share.
        Returns:
            How far it is.
        Raises:
            AccessError: the key lacks the scope.
            RefusedError: another candidate is under way, or the gate has not passed this one.
            UnknownIdError: there is no such model.
        """
        return _parsed(RolloutInfo, self._send("POST", "/v1/rollout", json=request.model_dump(mode="json")))

    def roll_back(self, reason: str) -> RolloutInfo:
        """Take the candidate back, or undo the last promotion (scope admin)."""
        return _parsed(RolloutInfo, self._send("DELETE", "/v1/rollout", params={"reason": reason}))

    def models(self) -> ModelList:
        """Return all registered models, newest first."""
        return _parsed(ModelList, self._send("GET", "/v1/models"))

    def model_details(self, model_id: str) -> ModelDetails:
        """Return what was measured of a model; UnknownIdError if there is none."""
        return _parsed(ModelDetails, self._send("GET", f"/v1/models/{model_id}"))

    def report(self, model_id: str) -> str:
        """Return the report beside a model, HTML; UnknownIdError if there is none."""
        return self._send("GET", f"/v1/models/{model_id}/report").text

    def rounds(self) -> RoundList:
        """Return all rounds, oldest first."""
        return _parsed(RoundList, self._send("GET", "/v1/rounds"))

    def caller(self) -> CallerInfo:
        """Return who this client is to the service; AccessError if its key opens nothing."""
        return _parsed(CallerInfo, self._send("GET", "/v1/caller"))

    def ready(self) -> Readiness:
        """Return whether predictions can be made now; it asks once and does not wait."""
        try:
            response = self._http.get("/readyz")
        except httpx.TransportError as error:
            return Readiness(ready=False, model=None, detail=f"no service answers at {self._http.base_url}: {error}")
        return _parsed(Readiness, response)

    def _explain(
        self, prediction_id: str, method: str, target: str | None, form: str, versus: str | None = None
    ) -> httpx.Response:
        wanted = {"method": method, "format": form, "target": target, "versus": versus}
        parameters = {name: value for name, value in wanted.items() if value is not None}
        return self._send("GET", f"/v1/predictions/{prediction_id}/explanation", params=parameters)

    def _send(self, verb: str, path: str, **sent: Any) -> httpx.Response:
        deadline = time.monotonic() + self._retry_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                response = self._http.request(verb, path, **sent)
            except httpx.TransportError as error:
                if time.monotonic() + pause_s > deadline:
                    raise UnavailableError(
                        f"the service at {self._http.base_url} does not answer ({error or type(error).__name__}); "
                        "start it with `relook serve`"
                    ) from error
            else:
                if response.is_success:
                    return response
                if response.status_code not in _BUSY or time.monotonic() + pause_s > deadline:
                    raise _error_of(response)
                pause_s = max(pause_s, _asked_pause_s(response))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _media_type(image: bytes) -> str:
    try:
        return f"image/{sniff(image)}"
    except ImageError:
        # The service says what is wrong with it, as it would to any other program.
        return "application/octet-stream"


def _asked_pause_s(response: httpx.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_PAUSE_S) if asked.isdigit() else 0.0


def _parsed(body: type[B], response: httpx.Response) -> B:
    try:
        return body.model_validate_json(response.content)
    except ValidationError as error:
        raise RelookError(
            f"{response.request.url.path} did not answer with a {body.__name__}; is this a service of the same version?"
        ) from error


def _error_of(response: httpx.Response) -> RelookError:
    try:
        found = Problem.model_validate(json.loads(response.content))
    except (ValueError, ValidationError):
        return RelookError(f"{response.request.url.path} answered {response.status_code} without saying why")
    match found.status:
        case 401 | 403:
            return AccessError(found.detail, found.code)
        case 404:
            return UnknownIdError(found.detail)
        case 409:
            return RefusedError(found.detail)
        case 413 | 415:
            return ImageError(found.detail, found.code)
        case 422 if found.code in ("empty", "damaged"):
            return ImageError(found.detail, found.code)
        case 429 | 503:
            return UnavailableError(found.detail)
        case status if status < 500:
            return DataError(found.detail)
        case _:
            return RelookError(found.detail)
