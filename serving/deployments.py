"""The service on Ray Serve: HTTP ingress, predictor, explainer and page, each its own deployment.

    ingress (FastAPI) -> predictor (forward, triage, commit)
                      -> explainer (heat maps of stored predictions)
                      -> page (Gradio, which is a client of the ingress)
                      -> counts (limits and metrics of several ingress replicas)

The ingress listens on the service's port itself (see `http_server`), or behind Ray Serve's proxies, by
`serving.http`. Where one machine serves with one of each, the predictor runs in the ingress' process. What each part
holds, and where what several replicas share is, is in docs/decisions/037.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from records.errors import RelookError, UnavailableError
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Prediction
from serving.access.together import Ask, Held, Reports, SharedCounts, SharedLimits
from serving.collector import freeze_what_stays
from serving.explainer_threads import ExplainerThreads
from serving.hooks.delivery import Hooks
from serving.in_process import run_here
from serving.messages import FoundCase, HeatMap, Method, PredictionRequest, ServingState, StoredPrediction
from serving.metrics import Metrics, Samples
from serving.page_proxy import PageAddress, PageProxy, RequireToken
from serving.remote import APPLICATION, Failure, RemoteCounts, RemoteService, called, failure
from serving.replicas import Part
from serving.settings import ServingSettings, compute_threads

__all__ = ["APPLICATION", "build_application", "serve_environment"]

SHUTDOWN_S = 20.0
"""How long a replica that is removed may take to finish what it took, seconds."""

METRICS_S = 1.0
"""How often the load is reported to the autoscaler, seconds."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


class PredictorReplica:
    """Runs a `Predictor` in a replica."""

    def __init__(self, settings: ServingSettings, records: RecordsSettings) -> None:
        # Imported in its replica only: ingress and page load this module, too, and do without torch.
        from serving.predictor import Predictor

        _set_threads(settings.predictor_cpus)
        self._predictor = Predictor(open_store(records), settings)
        self._is_one_of_several = settings.predictor_max_replicas > 1
        self._started = False
        self._lags = False
        freeze_what_stays()

    async def check_health(self) -> None:
        """Start at the first call, which Serve makes before any request; later raise if a loop has ended."""
        # Not in `__init__`, which cannot await. Serve routes requests only after the first successful check, so a
        # replica gets none before its model is loaded.
        if not self._started:
            await self._predictor.start()
            state = self._predictor.state()
            if state.model is None and self._is_one_of_several:
                # It would fail its requests at once, look idle, and be sent more of them than the others.
                await self._predictor.stop()
                raise UnavailableError(f"this predictor cannot load the model: {state.detail}")
            self._started = True
        self._predictor.check()
        if self._lags:
            # Others serve a model that this one cannot load; another replica may be able to.
            raise UnavailableError(f"this predictor does not follow the others: {self._predictor.state().detail}")

    async def predict(
        self, requests: list[PredictionRequest], generation: int
    ) -> tuple[int, list[StoredPrediction | Failure]] | Failure:
        """Predict the images of one call; see `Predictor.predict`.

        Args:
            requests: images with their contexts.
            generation: of the ledger that a caller has seen a prediction of.
        Returns:
            The generation that was followed here, and a prediction or its error per request.
        """
        try:
            await self._follow(generation)
        except RelookError as error:
            return failure(error)
        # All at once: the predictor forms its own batches of them and of the requests of other calls.
        results = list(await asyncio.gather(*map(self._predict, requests)))
        return self._predictor.generation, results

    async def _predict(self, request: PredictionRequest) -> StoredPrediction | Failure:
        try:
            return await self._predictor.predict(request)
        except RelookError as error:
            return failure(error)
        except Exception as error:
            # One failed request must not fail the others of the call, whose predictions are committed.
            logger.exception("request %s failed", request.request_id)
            return failure(RelookError(f"a request failed: {type(error).__name__}"))

    async def _follow(self, generation: int) -> None:
        try:
            await self._predictor.follow(generation)
        except UnavailableError:
            self._lags = self._is_one_of_several and self._predictor.lags
            raise
        self._lags = False

    async def state(self, generation: int) -> tuple[int, ServingState] | Failure:
        """Return which model serves, or why none does, after following the ledger to a generation."""
        try:
            await self._follow(generation)
        except RelookError as error:
            return failure(error)
        return self._predictor.generation, self._predictor.state()

    async def trouble(self) -> str | None:
        """Return why this replica does not serve what the ledger names; None if it does."""
        if not self._predictor.lags:
            return None
        name = serve.get_replica_context().replica_id.unique_id
        return f"predictor {name}: {self._predictor.state().detail}"

    async def stop(self) -> None:
        """Finish what was begun."""
        await self._predictor.stop()

    async def __del__(self) -> None:
        await self.stop()


class ExplainerReplica:
    """Runs an `Explainer` in its own replica, so that explaining does not slow predictions down."""

    def __init__(self, settings: ServingSettings, records: RecordsSettings) -> None:
        from serving.explainer import Explainer

        _set_threads(settings.explainer_cpus)
        self._threads = ExplainerThreads(settings.max_explaining)
        self._explainer = Explainer(open_store(records), settings)
        freeze_what_stays()

    async def explain(
        self, prediction: Prediction, method: Method, target: str | None, versus: str | None
    ) -> HeatMap | Failure:
        """Explain a stored prediction; see `Explainer.explain`."""
        return await self._in_thread(method, self._explainer.explain, prediction, method, target, versus)

    async def explain_image(
        self, image: bytes, method: Method, target: str | None, versus: str | None
    ) -> HeatMap | Failure:
        """Explain an image that is not stored; see `Explainer.explain_image`."""
        return await self._in_thread(method, self._explainer.explain_image, image, method, target, versus)

    async def nearest(self, prediction: Prediction, limit: int) -> list[FoundCase] | Failure:
        """Find confirmed cases like a stored prediction's image; see `Explainer.nearest`."""
        return await self._in_thread("gradcam", self._explainer.nearest, prediction, limit)

    async def _in_thread(self, method: Method, function: Callable[..., T], *arguments: Any) -> T | Failure:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads.of(method), function, *arguments)
        except RelookError as error:
            return failure(error)


class CountsReplica:
    """Runs `SharedCounts` in a replica, where there are several ingress replicas."""

    def __init__(self, settings: ServingSettings) -> None:
        self._counts = SharedCounts(settings)

    async def ask(self, member: str, held: Held, asks: Sequence[Ask]) -> tuple[int, list[bool]]:
        """See `SharedCounts.ask`."""
        return await self._counts.ask(member, held, asks)

    async def saw(self, generation: int) -> None:
        """See `SharedCounts.saw`."""
        await self._counts.saw(generation)

    async def report(self, member: str, samples: Samples) -> None:
        """See `SharedCounts.report`."""
        await self._counts.report(member, samples)

    async def parts(self) -> list[Samples]:
        """See `SharedCounts.parts`."""
        return await self._counts.parts()


class PageReplica:
    """Serves the page to the ingress of its node; see `PageProxy`."""

    def __init__(self, settings: ServingSettings, records: RecordsSettings) -> None:
        from serving.http_server import HttpServer
        from serving.routes.page import page_app

        self._token = secrets.token_urlsafe(32)
        app = RequireToken(page_app(settings, open_store(records)), self._token)
        # Behind Ray Serve's proxies an ingress may run on any node, and reaches the page by the address of its node.
        self._host = _node_address() if settings.http == "serve" else "127.0.0.1"
        self._server = HttpServer(app, self._host, 0)
        freeze_what_stays()

    async def check_health(self) -> None:
        """Start to listen at the first call; later raise if the listener has ended."""
        await self._server.check()

    async def address(self) -> PageAddress:
        """Return where the page listens."""
        return PageAddress(self._server.port, self._token, self._host)

    async def __del__(self) -> None:
        await self._server.stop()


class _Ingress:
    """The whole HTTP app in a replica, whoever listens for it."""

    def __init__(
        self,
        settings: ServingSettings,
        records: RecordsSettings,
        predictor: DeploymentHandle[Any] | type[PredictorReplica],
        explainer: DeploymentHandle[Any],
        page: DeploymentHandle[Any] | None,
        counts: DeploymentHandle[Any] | None,
    ) -> None:
        from serving.app import create_app

        async def find_page() -> PageAddress:
            assert page is not None
            found: PageAddress = await called(page.address.remote())
            return found

        store = open_store(records)
        metrics, limits, self._reports = Metrics(store), None, None
        if counts is not None:
            member, shared = serve.get_replica_context().replica_id.unique_id, RemoteCounts(counts)
            limits, self._reports = SharedLimits(settings, shared, member), Reports(metrics, shared, member)
        # A class is run here, and called as a replica elsewhere is.
        self._here = run_here(predictor, settings, records) if isinstance(predictor, type) else None
        handle: Any = self._here or predictor
        service = RemoteService(store, settings, handle, explainer, limits)
        self._app = create_app(service, None if page is None else PageProxy(find_page), limits, metrics)
        self._reporting: asyncio.Task[None] | None = None
        self._hooks = Hooks(store, settings.hooks)
        freeze_what_stays()

    async def check_health(self) -> None:
        """Begin to predict and to report metrics at the first call, if that is done here; later raise if it ended."""
        if self._here is not None:
            await self._here.replica.check_health()
        self._hooks.check()
        if self._reports is None:
            return
        if self._reporting is None:
            self._reporting = asyncio.create_task(self._reports.run())
        elif self._reporting.done():
            raise UnavailableError("metrics are not reported any more")

    async def __del__(self) -> None:
        self._hooks.stop()
        if self._reporting is not None:
            self._reporting.cancel()
        if self._here is not None:
            await self._here.replica.stop()


class ListeningIngress(_Ingress):
    """The ingress that listens on the service's port itself."""

    def __init__(self, settings: ServingSettings, records: RecordsSettings, *handles: Any) -> None:
        from serving.http_server import HttpServer, limits_of
        from serving.tls import certificate_of

        super().__init__(settings, records, *handles)
        self._server = HttpServer(
            self._app,
            settings.host,
            settings.port,
            limits_of(settings, self._app.on_response),
            shares_port=settings.ingress_max_replicas > 1,
            certificate=certificate_of(settings),
        )

    async def check_health(self) -> None:
        """Start to listen at the first call; later raise if the listener has ended."""
        await super().check_health()
        await self._server.check()

    async def __del__(self) -> None:
        await self._server.stop()
        await super().__del__()


@serve.ingress()
class ProxiedIngress(_Ingress):
    """The ingress behind Ray Serve's proxies."""

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the app, which Ray Serve calls."""
        return self._app


def build_application(
    settings: ServingSettings,
    records: RecordsSettings,
    node: str | None,
    predictor_class: type[PredictorReplica] = PredictorReplica,
    one_machine: bool = False,
) -> serve.Application:
    """Return the Ray Serve application; nothing is started.

    Args:
        settings: of the service.
        records: `home` must be absolute, since replicas run in other folders.
        node: IP address of the Ray node that listens for HTTP, if the ingress does so itself; the other replicas run
            wherever there is room.
        predictor_class: runs in the replicas of the predictor; measurements give one with a slower network.
        one_machine: whether there is no other, so that ingress and predictor may share a process.
    Returns:
        The application.
    """
    wanted, front = settings.part("predictor"), settings.part("ingress")
    shared = one_machine and settings.fits_one_process
    if shared:
        predictor: Any = predictor_class
        front = replace(front, cpus=front.cpus + wanted.cpus, threads=compute_threads(wanted.cpus))
    else:
        predictor = _deployment(predictor_class, settings, wanted).bind(settings, records)
    explainer = _deployment(ExplainerReplica, settings, settings.part("explainer")).bind(settings, records)
    # Ray gives every node a resource of this name. It pins the ingress to the node of the command: `settings.host`,
    # loopback above all, means that machine.
    here = {f"node:{node}": 0.001} if settings.http == "own" else {}
    is_own = settings.http == "own"
    ingress = _deployment(ListeningIngress if is_own else ProxiedIngress, settings, front, here)
    page = counts = None
    if settings.page:
        page = _deployment(PageReplica, settings, Part("page", 1, 1, 1.0, 0.0), here).bind(settings, records)
    if settings.ingress_max_replicas > 1:
        counts = _deployment(CountsReplica, settings, Part("counts", 1, 1, 1.0, 0.0)).bind(settings)
    return ingress.bind(settings, records, predictor, explainer, page, counts)


def proxy_options(settings: ServingSettings) -> dict[str, Any]:
    """Return where Ray Serve's proxies listen, with `serving.http=serve`."""
    from serving.http_server import KEEP_ALIVE_S

    host = "127.0.0.1" if settings.host == "localhost" else settings.host
    return {"host": host, "port": settings.port, "keep_alive_timeout_s": KEEP_ALIVE_S}


def serve_environment() -> dict[str, str]:
    """Return the environment variables that Ray Serve reads in a replica; `build_application` sets them.

    With them, handles and replicas share one event loop and communicate by gRPC: a hop takes 3.4 ms instead of 6.4.
    """
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # The ingress or Serve's proxy listens, so no replica may open an HTTP port of its own through Serve.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(METRICS_S),
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(METRICS_S),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }


def _deployment(
    replica: type, settings: ServingSettings, part: Part, resources: Mapping[str, float] | None = None
) -> serve.Deployment:
    # Without OMP_NUM_THREADS, Ray gives a replica one OpenMP thread, whatever CPUs it reserves.
    environment = {**serve_environment(), "OMP_NUM_THREADS": str(part.threads or compute_threads(part.cpus))}
    number: dict[str, Any] = {"num_replicas": part.min_replicas}
    if part.max_replicas > part.min_replicas:
        number = {"autoscaling_config": _autoscaling(settings, part)}
    make: Any = serve.deployment
    deployment: serve.Deployment = make(
        replica,
        name=part.name,
        **number,
        ray_actor_options={
            "num_cpus": part.cpus,
            "num_gpus": part.gpus,
            "resources": dict(resources or {}),
            "runtime_env": {"env_vars": environment},
        },
        # The ingress limits requests in flight; with this margin Serve never queues what the ingress admitted.
        max_ongoing_requests=2 * settings.max_in_flight + 16,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=SHUTDOWN_S,
        max_constructor_retry_count=2,
    )
    return deployment


def _autoscaling(settings: ServingSettings, part: Part) -> dict[str, Any]:
    return {
        "min_replicas": part.min_replicas,
        "max_replicas": part.max_replicas,
        "target_ongoing_requests": part.target_ongoing,
        "upscale_delay_s": settings.scale_up_delay_s,
        "downscale_delay_s": settings.scale_down_delay_s,
        # Averaged over about as long as a decision takes; Serve accepts no less than its default interval of reports.
        "look_back_period_s": max(11.0, min(30.0, settings.scale_up_delay_s)),
    }


def _node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _set_threads(cpus: float) -> None:
    import torch

    torch.set_num_threads(compute_threads(cpus))
