"""Routes of the Open Inference Protocol, version 2, for clients of Triton, KServe and others.

They call what `POST /v1/predictions` calls: the same keys, limits, ledger and ids. See `serving.open_inference` for
the bodies.
"""

from importlib import metadata
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Request, Response

from records.errors import UnavailableError, UnknownIdError
from records.types import Scope
from serving.access.keys import Caller
from serving.health import HealthProbe
from serving.messages import StoredPrediction
from serving.open_inference import (
    HEADER_LENGTH,
    MODEL_NAME,
    InferenceError,
    InferenceLive,
    InferenceModel,
    InferenceReady,
    InferenceRequest,
    InferenceResponse,
    InferenceServer,
    model_info,
    parsed,
    response_body,
    split_body,
)
from serving.problems import OPEN_INFERENCE_PATH, problem_of, problem_response
from serving.routes.admission import Admission
from serving.routes.authenticator import Authenticator
from serving.routes.bodies import BINARY
from serving.schemas import IdempotencyKey
from serving.service import Service

Name = Annotated[str, Path(max_length=200, description=f"name of the model: {MODEL_NAME}")]
Version = Annotated[str, Path(max_length=64, description="id of the model that serves, or a prefix of 8 or more")]
_MODEL = f"{OPEN_INFERENCE_PATH}/models/{{name}}"
_VERSION = f"{_MODEL}/versions/{{version}}"
_LEAST_PREFIX = 8
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": f"#/components/schemas/{InferenceRequest.__name__}"}},
            "application/octet-stream": BINARY,
        },
    }
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": InferenceError} for status in (400, 401, 403, 404, 409, 413, 415, 422, 429, 503)
}
_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": InferenceReady}}


def open_inference_router(authenticator: Authenticator, admission: Admission, probe: HealthProbe) -> APIRouter:
    """Return the router of the Open Inference Protocol."""
    router = APIRouter(tags=["open inference"], responses=_ERRORS)
    _add_server(router, probe)
    _add_model(router, admission.service, authenticator)
    _add_infer(router, admission, authenticator)
    return router


def _add_server(router: APIRouter, probe: HealthProbe) -> None:
    @router.get(OPEN_INFERENCE_PATH, response_model=InferenceServer)
    async def read_server() -> InferenceServer:
        """Return name and version of the server, and the extensions of the protocol that it has."""
        return InferenceServer(name="relook", version=metadata.version("relook"), extensions=["binary_tensor_data"])

    @router.get(f"{OPEN_INFERENCE_PATH}/health/live", response_model=InferenceLive)
    async def live() -> InferenceLive:
        """Return 200 while this process responds, as /healthz does."""
        return InferenceLive(live=True)

    async def is_ready(response: Response) -> bool:
        missing = bool((await probe.check()).missing)
        if missing:
            response.status_code = 503
        return not missing

    @router.get(
        f"{OPEN_INFERENCE_PATH}/health/ready", response_model=InferenceReady, responses=_NOT_READY,
        response_model_exclude_none=True,
    )  # fmt: skip
    async def ready(response: Response) -> InferenceReady:
        """Return 200 while predictions can be made, else 503; /readyz says what is missing."""
        return InferenceReady(ready=await is_ready(response))

    @router.get(f"{_MODEL}/ready", response_model=InferenceReady, responses=_NOT_READY)
    async def model_ready(name: Name, response: Response) -> InferenceReady:
        """Return 200 while the model can predict, else 503."""
        _require_name(name)
        return InferenceReady(name=name, ready=await is_ready(response))

    @router.get(f"{_VERSION}/ready", response_model=InferenceReady, responses=_NOT_READY)
    async def version_ready(name: Name, version: Version, response: Response) -> InferenceReady:
        """Return 200 while this version of the model can predict, else 503."""
        _require_name(name)
        model = (await probe.check()).model
        if model is not None:
            _require_version(model.id, version)
        return InferenceReady(name=name, ready=await is_ready(response))


def _add_model(router: APIRouter, service: Service, authenticator: Authenticator) -> None:
    @router.get(_MODEL, response_model=InferenceModel)
    async def read_inference_model(
        name: Name, caller: Annotated[Caller, Depends(authenticator.requires(None))]
    ) -> InferenceModel:
        """Return inputs and outputs of the model, and as its version the id of the model that serves now."""
        return model_info(await _serving_version(service, name, None))

    @router.get(_VERSION, response_model=InferenceModel)
    async def read_inference_version(
        name: Name, version: Version, caller: Annotated[Caller, Depends(authenticator.requires(None))]
    ) -> InferenceModel:
        """Return the same for the version that serves; any other one is not found."""
        return model_info(await _serving_version(service, name, version))


def _add_infer(router: APIRouter, admission: Admission, authenticator: Authenticator) -> None:
    service = admission.service

    async def respond(request: Request, caller: Caller, key: str | None) -> Response:
        document, binary = split_body(await request.body(), request.headers.get(HEADER_LENGTH))
        asked = parsed(document, binary, service.settings.max_batch_images)
        # The key of one image is that of POST /v1/predictions, those of several are that of a batch.
        single = len(asked.images) == 1
        keys = [key if key is None or single else f"{key}#{index}" for index in range(len(asked.images))]
        results = await admission.predict_each(
            asked.images, caller, request.state.request_id, keys, "heat_map" in asked.outputs
        )
        # A tensor has no place for the problem of one row, and a row without values is easily taken for a prediction.
        stored: list[StoredPrediction] = []
        for number, result in enumerate(results, 1):
            if isinstance(result, StoredPrediction):
                stored.append(result)
            elif single:
                raise result
            else:
                return _one_failed(request, result, f"image {number} of {len(results)}", service)
        body, head = response_body(stored, asked, service.store.taxonomy.codes)
        if head is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={HEADER_LENGTH: str(head)})

    @router.post(f"{_MODEL}/infer", response_model=InferenceResponse, openapi_extra=_BODY)
    async def infer(
        name: Name,
        request: Request,
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.PREDICT))],
        idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
    ) -> Any:
        """Predict images: input `image` of BYTES, in JSON as base64 or binary behind it; stored as any prediction."""
        _require_name(name)
        return await respond(request, caller, idempotency_key)

    @router.post(f"{_VERSION}/infer", response_model=InferenceResponse, openapi_extra=_BODY)
    async def infer_version(
        name: Name,
        version: Version,
        request: Request,
        caller: Annotated[Caller, Depends(authenticator.requires(Scope.PREDICT))],
        idempotency_key: Annotated[IdempotencyKey | None, Header()] = None,
    ) -> Any:
        """Predict images if this version of the model serves now."""
        await _serving_version(service, name, version)
        return await respond(request, caller, idempotency_key)


def _one_failed(request: Request, error: BaseException, which: str, service: Service) -> Response:
    found = problem_of(error)
    found = found.model_copy(update={"detail": f"{which}: {found.detail}"})
    wait_s = service.settings.retry_after_s if found.status in (429, 503) else None
    return problem_response(found, request.state.request_id, wait_s, path=request.scope["path"])


async def _serving_version(service: Service, name: str, version: str | None) -> str:
    _require_name(name)
    state = await service.state()
    if state.model is None:
        raise UnavailableError(state.detail)
    if version is not None:
        _require_version(state.model.id, version)
    return state.model.id


def _require_name(name: str) -> None:
    if name != MODEL_NAME:
        raise UnknownIdError(f"no model is called {name[:40]!r}; the model is called {MODEL_NAME!r}")


def _require_version(serving: str, version: str) -> None:
    if len(version) < _LEAST_PREFIX or not serving.startswith(version):
        raise UnknownIdError(f"version {version[:64]!r} does not serve; the one that serves is {serving!r}")
