"""The whole service in one process and event loop, without Ray: for tests, and for whoever embeds it."""

import asyncio
from dataclasses import dataclass

from records.store import Store
from records.types import Prediction
from serving.explainer import Explainer
from serving.messages import HeatMap, Method, PredictionRequest, ServingState, StoredPrediction
from serving.predictor import Predictor
from serving.settings import ServingSettings


@dataclass(frozen=True)
class LocalService:
    """The whole service in one process and event loop, without Ray."""

    store: Store
    settings: ServingSettings
    predictor: Predictor
    explainer: Explainer

    async def predict(self, request: PredictionRequest) -> StoredPrediction:
        """Answer; see `Predictor.predict`."""
        return await self.predictor.predict(request)

    async def explain(
        self, prediction: Prediction, method: Method, target: str | None, versus: str | None = None
    ) -> HeatMap:
        """Explain a stored answer; see `Explainer.explain`."""
        return await asyncio.to_thread(self.explainer.explain, prediction, method, target, versus)

    async def explain_image(self, image: bytes, method: Method, target: str | None, versus: str | None) -> HeatMap:
        """Explain an image that is not stored; see `Explainer.explain_image`."""
        return await asyncio.to_thread(self.explainer.explain_image, image, method, target, versus)

    async def state(self) -> ServingState:
        """Return which model answers, or why none does."""
        return self.predictor.state()
