"""What one caller may use of predictor and explainer: slots, turns and cost units.

In: whole bodies. Slots are taken only then, so a caller who sends slowly holds none. Out: predictions and heat maps, or
an AccessError with the code `busy` or `rate_limited`, which become 429.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from records.errors import AccessError, ImageError
from records.images import image_size
from records.types import Consent
from serving.access.keys import Caller
from serving.access.shares import Turns
from serving.messages import HeatMap, PredictionRequest, StoredPrediction
from serving.metrics import Metrics
from serving.problems import problem_of
from serving.routes.authenticator import Authenticator
from serving.schemas import Context
from serving.service import Service
from serving.settings import compute_threads
from vision.explanations.methods import METHODS

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HEAD_BYTES = 8192
_UNKNOWN_PIXELS = 12_000_000
"""Of an image whose size is not in its first bytes: that of a telephone, which puts a thumbnail before it."""
_PIXELS_PER_UNIT = 4_000_000


class Admission:
    """Limits the images and heat maps in flight, and calls the service. It belongs to one event loop."""

    def __init__(self, service: Service, authenticator: Authenticator, metrics: Metrics) -> None:
        settings = service.settings
        self.service = service
        self.metrics = metrics
        self._authenticator = authenticator
        self._limits = authenticator.limits
        running = settings.max_batch_size * settings.predictor_max_replicas
        self._turns = Turns(alone=settings.max_in_flight, together=min(running, settings.max_in_flight))
        # A heat map keeps a core busy for seconds and holds memory, so each caller gets no more of them than the
        # explainers have cores: the others of a greedy caller wait here, and nobody waits behind them.
        cores = compute_threads(settings.explainer_cpus) * settings.explainer_max_replicas
        self._map_turns = Turns(alone=cores, together=cores)

    @asynccontextmanager
    async def images(self, caller: Caller, images: Sequence[bytes]) -> AsyncIterator[None]:
        """Charge for images and count them as in flight during the block; AccessError if that is too much."""
        # The request itself was charged as one unit, which covers one small image.
        await self._authenticator.charge(caller, sum(map(image_cost, images)) - 1)
        if not await self._limits.take("images", caller.share, len(images)):
            raise AccessError("the service has as many images in flight as it accepts; try again soon", "busy")
        self.metrics.in_flight.set(self._limits.used("images"))
        try:
            yield
        finally:
            self._limits.give_back("images", caller.share, len(images))
            self.metrics.in_flight.set(self._limits.used("images"))

    async def predict(
        self, image: bytes, context: Context, caller: Caller, request_id: str, key: str | None, explain: bool
    ) -> StoredPrediction:
        """Return one prediction, with its heat map if `explain` is set."""
        async with self._turns.turn(caller.id, image_cost(image)):
            stored = await self.service.predict(
                PredictionRequest(
                    image=image,
                    request_id=request_id,
                    context=_with_consent(context, caller),
                    caller=caller.id,
                    organisation=caller.organisation,
                    idempotency_key=key,
                    explain=explain,
                )
            )
        self.metrics.predicted(stored.prediction)
        if explain and stored.heat_map is None and stored.prediction.label is not None:
            # A repeated request gets the stored prediction; heat maps are not stored, so it is computed again.
            prediction = stored.prediction
            heat_map = await self.explain(caller, "gradcam", lambda: self.service.explain(prediction, "gradcam", None))
            return StoredPrediction(stored.prediction, stored.review, heat_map)
        return stored

    async def predict_each(
        self,
        images: Sequence[tuple[bytes, Context]],
        caller: Caller,
        request_id: str,
        keys: Sequence[str | None],
        explain: bool = False,
    ) -> list[StoredPrediction | BaseException]:
        """Predict several images of one request; one that fails does not stop the others.

        Args:
            images: with their contexts.
            caller: who is charged.
            request_id: of the request.
            keys: idempotency key of each image, or None.
            explain: whether each prediction needs its heat map.
        Returns:
            Per image its prediction or its error, in their order.
        Raises:
            AccessError: they are more than the service or the key has room for.
        """
        async with self.images(caller, [image for image, _ in images]):
            calls = (
                self.predict(image, context, caller, request_id, key, explain)
                for (image, context), key in zip(images, keys, strict=True)
            )
            results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and problem_of(result).status == 500:
                # A bug is the problem of one image, too; the others have their predictions, which are stored.
                logger.error("an image of request %s failed", request_id, exc_info=result)
        return results

    async def explain(self, caller: Caller, method: str, compute: Callable[[], Awaitable[HeatMap]]) -> HeatMap:
        """Return a heat map; see `explained`."""
        heat_map = await self.explained(caller, METHODS[method].evaluations, compute)
        self.metrics.explained.labels(method=method).inc()
        return heat_map

    async def explained(self, caller: Caller, evaluations: int, compute: Callable[[], Awaitable[T]]) -> T:
        """Return what an explainer computes, within the limits of its caller and of all of them.

        Args:
            caller: who is charged.
            evaluations: how often the network is computed for it, which is what it costs.
            compute: begins the computation.
        Returns:
            The result.
        Raises:
            AccessError: too many are computed, or the key has used up its units.
        """
        await self._authenticator.charge(caller, evaluations - 1)
        if not await self._limits.take("maps", caller.share):
            raise AccessError("the service computes as many heat maps as it accepts; try again soon", "busy")
        try:
            async with self._map_turns.turn(caller.id, 1):
                return await compute()
        finally:
            self._limits.give_back("maps", caller.share)


def image_cost(image: bytes) -> int:
    """Return the cost units of predicting an image: one, and one more per 4 megapixels to decode."""
    try:
        # Of its first bytes only: this runs on the event loop, and a file can hold millions of segments.
        width_px, height_px = image_size(image[:_HEAD_BYTES])
        pixels = width_px * height_px
    except ImageError:
        pixels = _UNKNOWN_PIXELS if len(image) > _HEAD_BYTES else 0
    return 1 + pixels // _PIXELS_PER_UNIT


def _with_consent(context: Context, caller: Caller) -> Context:
    """Return the context with the effective consent: none for a sandbox key, else the request's, else the key's."""
    if caller.sandbox:
        return context.model_copy(update={"consent": Consent.NONE})
    if context.consent is None and caller.default_consent is not None:
        return context.model_copy(update={"consent": caller.default_consent})
    return context
