"""The service on Ray Serve: HTTP ingress, predictor, explainer and page, each its own deployment.

    ingress (FastAPI) -> predictor (forward, triage, commit)
                      -> explainer (heat maps of stored predictions)
                      -> page (Gradio, which is a client of the ingress)

The ingress listens on the service's port itself (see `http_server`). Errors of the tree in `records.errors` travel
between replicas as `Failure` values, because Ray wraps exceptions and loses their type and arguments.
"""

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from records.errors import ImageError, RelookError, UnavailableError, error_class
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Prediction
from serving.grouping import CallGrouping
from serving.messages import HeatMap, Method, PredictionRequest, ServingState, StoredPrediction
from serving.page_proxy import PageAddress, PageProxy, RequireToken
from serving.settings import ServingSettings, compute_threads

T = TypeVar("T")

APPLICATION = "relook"
EXPLAINER_NICENESS = 10
MAX_CALLS = 4
"""Concurrent calls to the predictor; requests that arrive meanwhile share the next call. With four, one batch computes
and one commits while two more are collected."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a value, to be sent from one replica to another."""

    kind: str
    message: str
    code: str | None = None

    def error(self) -> RelookError:
        """Return the error that this value was made of."""
        if self.code is not None:
            return ImageError(self.message, self.code)
        return error_class(self.kind)(self.message)


class PredictorReplica:
    """Runs a `Predictor` in a replica."""

    def __init__(self, settings: ServingSettings, records: RecordsSettings) -> None:
        # Imported in its replica only: ingress and page load this module, too, and do without torch.
        from serving.predictor import Predictor

        _set_threads(settings.predictor_cpus)
        self._predictor = Predictor(open_store(records), settings)
        self._started = False

    async def check_health(self) -> None:
        """Start at the first call, which Serve makes before any request; later raise if a loop has ended."""
        # Not in `__init__`, which cannot await. Serve routes requests only after the first successful check, so a
        # replica gets none before its model is loaded.
        if not self._started:
            await self._predictor.start()
            self._started = True
        self._predictor.check()

    async def predict(self, requests: list[PredictionRequest]) -> list[StoredPrediction | Failure]:
        """Predict the images of one call; see `Predictor.predict`."""
        # All at once: the predictor forms its own batches of them and of the requests of other calls.
        return list(await asyncio.gather(*map(self._predict, requests)))

    async def _predict(self, request: PredictionRequest) -> StoredPrediction | Failure:
        try:
            return await self._predictor.predict(request)
        except RelookError as error:
            return _failure(error)
        except Exception as error:
            # One failed request must not fail the others of the call, whose predictions are committed.
            logger.exception("request %s failed", request.request_id)
            return _failure(RelookError(f"a request failed: {type(error).__name__}"))

    async def state(self) -> ServingState:
        """Return which model serves, or why none does."""
        return self._predictor.state()

    async def __del__(self) -> None:
        await self._predictor.stop()


class ExplainerReplica:
    """Runs an `Explainer` in its own replica, so that explaining does not slow predictions down."""

    def __init__(self, settings: ServingSettings, records: RecordsSettings) -> None:
        from serving.explainer import Explainer

        _set_threads(settings.explainer_cpus)
        # Where both share cores, the kernel prefers the predictor.
        # Explanations can wait, predictions cannot.
        os.nice(EXPLAINER_NICENESS)
        self._explainer = Explainer(open_store(records), settings)

    async def explain(
        self, prediction: Prediction, method: Method, target: str | None, versus: str | None
    ) -> HeatMap | Failure:
        """Explain a stored prediction; see `Explainer.explain`."""
        return await self._in_thread(self._explainer.explain, prediction, method, target, versus)

    async def explain_image(
        self, image: bytes, method: Method, target: str | None, versus: str | None
    ) -> HeatMap | Failure:
        """Explain an image that is not stored; see `Explainer.explain_image`."""
        return await self._in_thread(self._explainer.explain_image, image, method, target, versus)

    async def _in_thread(self, function: Callable[..., HeatMap], *arguments: Any) -> HeatMap | Failure:
        try:
            return await asyncio.to_thread(function, *arguments)
        except RelookError as error:
            return _failure(error)


class RemoteService:
    """The `Service` of the ingress: ledger and blobs here, computation by handles of the other replicas."""

    def __init__(
        self,
        store: Store,
        settings: ServingSettings,
        predictor: DeploymentHandle[Any],
        explainer: DeploymentHandle[Any],
    ) -> None:
        self.store = store
        self.settings = settings
        self._predictor = predictor
        self._explainer = explainer
        self._calls = CallGrouping(self._predict, MAX_CALLS, settings.max_batch_size)

    async def predict(self, request: PredictionRequest) -> StoredPrediction:
        """Predict one image; see `Predictor.predict`."""
        result = await self._calls.submit(request)
        if isinstance(result, Failure):
            raise result.error()
        return result

    async def _predict(self, requests: list[PredictionRequest]) -> list[StoredPrediction | Failure]:
        results: list[StoredPrediction | Failure] = await _called(self._predictor.predict.remote(requests))
        return results

    async def explain(
        self, prediction: Prediction, method: Method, target: str | None, versus: str | None = None
    ) -> HeatMap:
        """Explain a stored prediction; see `Explainer.explain`."""
        heat_map: HeatMap = await _called(self._explainer.explain.remote(prediction, method, target, versus))
        return heat_map

    async def explain_image(self, image: bytes, method: Method, target: str | None, versus: str | None) -> HeatMap:
        """Explain an image that is not stored; see `Explainer.explain_image`."""
        heat_map: HeatMap = await _called(self._explainer.explain_image.remote(image, method, target, versus))
        return heat_map

    async def state(self) -> ServingState:
        """Return which model serves, or why none does."""
        state: ServingState = await _called(self._predictor.state.remote())
        return state


class PageReplica:
    """Serves the page to the ingress of its node; see `PageProxy`."""

    def __init__(self, settings: ServingSettings, records: RecordsSettings) -> None:
        from serving.http_server import HttpServer
        from serving.routes.page import page_app

        self._token = secrets.token_urlsafe(32)
        app = RequireToken(page_app(settings, open_store(records)), self._token)
        self._server = HttpServer(app, "127.0.0.1", 0)

    async def check_health(self) -> None:
        """Start to listen at the first call; later raise if the listener has ended."""
        await self._server.check()

    async def address(self) -> PageAddress:
        """Return where the page listens."""
        return PageAddress(self._server.port, self._token)

    async def __del__(self) -> None:
        await self._server.stop()


class IngressReplica:
    """Listens for HTTP: serves the API and forwards requests for the page."""

    def __init__(
        self,
        settings: ServingSettings,
        records: RecordsSettings,
        predictor: DeploymentHandle[Any],
        explainer: DeploymentHandle[Any],
        page: DeploymentHandle[Any] | None,
    ) -> None:
        from serving.app import create_app
        from serving.http_server import HttpServer, limits_of

        async def find_page() -> PageAddress:
            assert page is not None
            found: PageAddress = await _called(page.address.remote())
            return found

        service = RemoteService(open_store(records), settings, predictor, explainer)
        app = create_app(service, None if page is None else PageProxy(find_page))
        self._server = HttpServer(app, settings.host, settings.port, limits_of(settings, app.on_response))

    async def check_health(self) -> None:
        """Start to listen at the first call; later raise if the listener has ended."""
        await self._server.check()

    async def __del__(self) -> None:
        await self._server.stop()


def build_application(settings: ServingSettings, records: RecordsSettings, node: str) -> serve.Application:
    """Return the Ray Serve application; nothing is started.

    Args:
        settings: of the service.
        records: `home` must be absolute, since replicas run in other folders.
        node: IP address of the Ray node that listens for HTTP; the other replicas run wherever there is room.
    Returns:
        The application.
    """
    predictor = _deployment(PredictorReplica, "predictor", settings, settings.predictor_cpus).bind(settings, records)
    explainer = _deployment(ExplainerReplica, "explainer", settings, settings.explainer_cpus).bind(settings, records)
    # Ray gives every node a resource of this name. It pins the ingress to the node of the command: `settings.host`,
    # loopback above all, means that machine.
    here = {f"node:{node}": 0.001}
    ingress = _deployment(IngressReplica, "ingress", settings, settings.ingress_cpus, here)
    page = _deployment(PageReplica, "page", settings, 0, here).bind(settings, records) if settings.page else None
    return ingress.bind(settings, records, predictor, explainer, page)


def serve_environment() -> dict[str, str]:
    """Return the environment variables that Ray Serve reads in a replica; `build_application` sets them.

    With them, handles and replicas share one event loop and communicate by gRPC: a hop takes 3.4 ms instead of 6.4.
    """
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # The ingress listens itself, so no replica may open an HTTP port through Serve.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }


def _deployment(
    replica: type, name: str, settings: ServingSettings, cpus: float, resources: Mapping[str, float] | None = None
) -> serve.Deployment:
    # Without OMP_NUM_THREADS, Ray gives a replica one OpenMP thread, whatever CPUs it reserves.
    environment = {**serve_environment(), "OMP_NUM_THREADS": str(compute_threads(cpus))}
    make: Any = serve.deployment
    deployment: serve.Deployment = make(
        replica,
        name=name,
        num_replicas=1,
        ray_actor_options={
            "num_cpus": cpus,
            "resources": dict(resources or {}),
            "runtime_env": {"env_vars": environment},
        },
        # The ingress limits requests in flight; with this margin Serve never queues what the ingress admitted.
        max_ongoing_requests=2 * settings.max_in_flight + 16,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=8,
        max_constructor_retry_count=2,
    )
    return deployment


def _set_threads(cpus: float) -> None:
    import torch

    torch.set_num_threads(compute_threads(cpus))


def _failure(error: RelookError) -> Failure:
    code = error.code if isinstance(error, ImageError) else None
    return Failure(type(error).__name__, str(error), code)


async def _called(response: Any) -> Any:
    try:
        result = await response
    # A replica that died or is being replaced; callers get 503 and may repeat the request.
    except (RayError, RayServeException) as error:
        raise UnavailableError(f"a replica does not respond: {type(error).__name__}") from error
    if isinstance(result, Failure):
        raise result.error()
    return result
