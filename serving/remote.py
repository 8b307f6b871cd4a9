"""The ingress' side of the other replicas: predictor, explainer and shared counts behind handles of Ray Serve.

Errors of the tree in `records.errors` travel between replicas as `Failure` values, because Ray wraps exceptions and
loses their type and arguments.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from records.errors import ImageError, RelookError, UnavailableError, error_class, quoted_error
from records.store import Store
from records.types import Prediction
from serving.access.together import Ask, Held, SharedLimits
from serving.grouping import CallGrouping
from serving.in_process import InProcessHandle
from serving.messages import FoundCase, HeatMap, Method, PredictionRequest, ServingState, StoredPrediction
from serving.metrics import Samples
from serving.settings import ServingSettings

APPLICATION = "relook"
CALLS_PER_REPLICA = 4
"""Concurrent calls to a predictor; requests that arrive meanwhile share the next call. With four, one batch computes
and one commits while two more are collected."""
ATTEMPTS = 6
"""How often a call is sent if a replica of several is lost or cannot follow the ledger."""
FIRST_WAIT_S = 0.05
"""Before the second attempt; each further one waits twice as long."""

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


def failure(error: RelookError) -> Failure:
    """Return an error as a value."""
    code = error.code if isinstance(error, ImageError) else None
    return Failure(type(error).__name__, str(error), code)


async def called(response: Any) -> Any:
    """Return the result of a call to another replica, or raise the error that it is."""
    try:
        result = await response
    # A replica that died or is being replaced; callers get 503 and may repeat the request.
    except (RayError, RayServeException) as error:
        raise UnavailableError(f"a replica does not respond: {type(error).__name__}") from error
    if isinstance(result, Failure):
        raise result.error()
    return result


class RemoteCounts:
    """`SharedCounts` in another replica.

    Args:
        handle: of its deployment.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def ask(self, member: str, held: Held, asks: Sequence[Ask]) -> tuple[int, list[bool]]:
        """See `SharedCounts.ask`."""
        found: tuple[int, list[bool]] = await called(self._handle.ask.remote(member, held, asks))
        return found

    async def saw(self, generation: int) -> None:
        """See `SharedCounts.saw`."""
        await called(self._handle.saw.remote(generation))

    async def report(self, member: str, samples: Samples) -> None:
        """See `SharedCounts.report`."""
        await called(self._handle.report.remote(member, samples))

    async def parts(self) -> list[Samples]:
        """See `SharedCounts.parts`."""
        found: list[Samples] = await called(self._handle.parts.remote())
        return found


class RemoteService:
    """The `Service` of the ingress: ledger and blobs here, computation by handles of the other replicas.

    A caller who saw a new model never gets the one before again: every call passes on the newest generation of the
    ledger that was returned here, or by another ingress, and a predictor that is behind follows the ledger first.
    """

    def __init__(
        self,
        store: Store,
        settings: ServingSettings,
        predictor: DeploymentHandle[Any],
        explainer: DeploymentHandle[Any],
        limits: SharedLimits | None = None,
    ) -> None:
        self.store = store
        self.settings = settings
        self._predictor = predictor
        self._explainer = explainer
        self._limits = limits
        self._generation = 0
        self._attempts = ATTEMPTS if settings.predictor_max_replicas > 1 else 1
        calls = CALLS_PER_REPLICA * settings.predictor_max_replicas // settings.ingress_max_replicas
        # Calls within this process cost nothing, so each request is one, and the predictor alone forms the batches.
        is_here = isinstance(predictor, InProcessHandle)
        most, size = (settings.max_in_flight, 1) if is_here else (calls, settings.max_batch_size)
        self._calls = CallGrouping(self._predict, max(CALLS_PER_REPLICA, most), size)

    async def predict(self, request: PredictionRequest) -> StoredPrediction:
        """Predict one image; see `Predictor.predict`."""
        result = await self._calls.submit(request)
        if isinstance(result, Failure):
            raise result.error()
        return result

    async def _predict(self, requests: list[PredictionRequest]) -> list[StoredPrediction | Failure]:
        for attempt in range(self._attempts):
            try:
                return await self._predict_once(requests)
            except UnavailableError:
                if attempt == self._attempts - 1:
                    raise
                # What the lost replica has written already is found instead of predicted again.
                requests = [replace(request, repeated=True) for request in requests]
                await asyncio.sleep(FIRST_WAIT_S * 2**attempt)
        raise AssertionError

    async def _predict_once(self, requests: list[PredictionRequest]) -> list[StoredPrediction | Failure]:
        known = max(self._generation, 0 if self._limits is None else self._limits.generation)
        results: list[StoredPrediction | Failure]
        generation, results = await called(self._predictor.predict.remote(requests, known))
        await self._saw(known, generation)
        return results

    async def _saw(self, known: int, generation: int) -> None:
        # A replica that was told of a generation has read the ledger: an older one means that a backup was restored.
        self._generation = generation if generation < known else max(self._generation, generation)
        if self._limits is not None:
            await self._limits.saw(generation)

    async def explain(
        self, prediction: Prediction, method: Method, target: str | None, versus: str | None = None
    ) -> HeatMap:
        """Explain a stored prediction; see `Explainer.explain`."""
        heat_map: HeatMap = await called(self._explainer.explain.remote(prediction, method, target, versus))
        return heat_map

    async def explain_image(self, image: bytes, method: Method, target: str | None, versus: str | None) -> HeatMap:
        """Explain an image that is not stored; see `Explainer.explain_image`."""
        heat_map: HeatMap = await called(self._explainer.explain_image.remote(image, method, target, versus))
        return heat_map

    async def nearest(self, prediction: Prediction, limit: int) -> list[FoundCase]:
        """Find confirmed cases like a stored prediction's image; see `Explainer.nearest`."""
        cases: list[FoundCase] = await called(self._explainer.nearest.remote(prediction, limit))
        return cases

    async def state(self) -> ServingState:
        """Return which model serves, or why none does, and which replicas do not."""
        state = await self._state()
        if self.settings.predictor_max_replicas == 1:
            return state
        return replace(state, troubles=(*await self._troubles(), *await asyncio.to_thread(starting_troubles)))

    async def _state(self) -> ServingState:
        known = self._generation
        if self._limits is not None:
            known = max(known, await self._limits.newest_generation())
        state: ServingState
        generation, state = await called(self._predictor.state.remote(known))
        await self._saw(known, generation)
        return state

    async def _troubles(self) -> list[str]:
        """Return what keeps running predictors from serving what the ledger names."""
        try:
            response = self._predictor.broadcast("trouble")
            found = await response.results_async(timeout_s=1.0, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            return [f"not every predictor responds ({type(error).__name__})"]
        return [str(each) for each in found if each is not None]


def starting_troubles() -> list[str]:
    """Return why predictors did not start, as Ray Serve knows it; empty if all of them run."""
    try:
        deployment = serve.status().applications[APPLICATION].deployments["predictor"]
    except (KeyError, RayError, RayServeException):
        return []
    numbers = {str(state): number for state, number in deployment.replica_states.items()}
    running = numbers.pop("RUNNING", 0)
    error = quoted_error(deployment.message) if any(numbers.values()) else None
    return [] if error is None else [f"{running} predictors run and {sum(numbers.values())} do not: {error}"]
