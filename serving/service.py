"""What the HTTP app needs from behind it, whether that is in this process or in other replicas."""

from typing import Protocol

from records.store import Store
from records.types import Prediction
from serving.messages import HeatMap, Method, PredictionRequest, ServingState, StoredPrediction
from serving.settings import ServingSettings


class Service(Protocol):
    """Predicts and explains. Errors come out as errors of the tree in `records.errors`."""

    @property
    def store(self) -> Store:
        """Ledger and blobs that the app reads, and writes flags to."""
        ...

    @property
    def settings(self) -> ServingSettings:
        """Limits, and how overlays are drawn."""
        ...

    async def predict(self, request: PredictionRequest) -> StoredPrediction:
        """Answer; see `Predictor.predict`."""
        ...

    async def explain(
        self, prediction: Prediction, method: Method, target: str | None, versus: str | None = None
    ) -> HeatMap:
        """Explain a stored answer; see `Explainer.explain`."""
        ...

    async def explain_image(self, image: bytes, method: Method, target: str | None, versus: str | None) -> HeatMap:
        """Explain an image that is not stored; see `Explainer.explain_image`."""
        ...

    async def state(self) -> ServingState:
        """Return which model answers, or why none does."""
        ...
