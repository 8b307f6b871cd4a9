"""What one caller may use of predictor and explainer: slots, turns and cost units.

In: whole bodies. Slots are taken only then, so a caller who sends slowly holds none. Out: predictions and heat maps, or
an AccessError with the code `busy` or `rate_limited`, which become 429.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from records.errors import AccessError, ImageError
from records.images import image_size
from records.types import Consent
from serving.access.keys import Caller
from serving.access.shares import Shares, Turns
from serving.messages import HeatMap, PredictionRequest, StoredPrediction
from serving.metrics import Metrics
from serving.routes.authenticator import Authenticator
from serving.schemas import Context
from serving.service import Service
from serving.settings import compute_threads
from vision.explanations.methods import METHODS

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
        self._images = Shares(settings.max_in_flight)
        self._maps = Shares(settings.max_explaining)
        self._turns = Turns(alone=settings.max_in_flight, together=settings.max_batch_size)
        # A heat map keeps a core busy for seconds and holds memory, so each caller gets no more of them than the
        # explainer has cores: the others of a greedy caller wait here, and nobody waits behind them.
        cores = compute_threads(settings.explainer_cpus)
        self._map_turns = Turns(alone=cores, together=cores)

    @contextmanager
    def images(self, caller: Caller, images: Sequence[bytes]) -> Iterator[None]:
        """Charge for images and count them as in flight during the block; AccessError if that is too much."""
        # The request itself was charged as one unit, which covers one small image.
        self._authenticator.charge(caller, sum(map(image_cost, images)) - 1)
        if not self._images.take(caller.share, len(images)):
            raise AccessError("the service has as many images in flight as it accepts; try again soon", "busy")
        self.metrics.in_flight.set(self._images.used)
        try:
            yield
        finally:
            self._images.give_back(caller.share, len(images))
            self.metrics.in_flight.set(self._images.used)

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

    async def explain(self, caller: Caller, method: str, compute: Callable[[], Awaitable[HeatMap]]) -> HeatMap:
        """Return a heat map, within the limits of its caller and of all of them.

        Args:
            caller: who is charged.
            method: name of the method, which decides what it costs.
            compute: begins the computation.
        Returns:
            The heat map.
        Raises:
            AccessError: too many are computed, or the key has used up its units.
        """
        self._authenticator.charge(caller, METHODS[method].evaluations - 1)
        if not self._maps.take(caller.share):
            raise AccessError("the service computes as many heat maps as it accepts; try again soon", "busy")
        try:
            async with self._map_turns.turn(caller.id, 1):
                heat_map = await compute()
        finally:
            self._maps.give_back(caller.share)
        self.metrics.explained.labels(method=method).inc()
        return heat_map


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
