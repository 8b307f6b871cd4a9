"""The protocol through which the HTTP app calls predictor and explainer, in this process or in other replicas."""

from typing import Protocol

from records.store import Store
from records.types import Prediction
from serving.messages import FoundCase, HeatMap, Method, PredictionRequest, ServingState, StoredPrediction
from serving.settings import ServingSettings


class Service(Protocol):
    """Predicts and explains. Every error is one of the tree in `records.errors`."""

    @property
    def store(self) -> Store:
        """Ledger and blobs; the app reads both and writes flags and outcomes."""
        ...

    @property
    def settings(self) -> ServingSettings:
        """Request limits and overlay settings."""
        ...

    async def predict(self, request: PredictionRequest) -> StoredPrediction:
        """Predict one image; see `Predictor.predict`."""
        ...

    async def explain(
        self, prediction: Prediction, method: Method, target: str | None, versus: str | None = None
    ) -> HeatMap:
        """Explain a stored prediction; see `Explainer.explain`."""
        ...

    async def explain_image(self, image: bytes, method: Method, target: str | None, versus: str | None) -> HeatMap:
        """Explain an image that is not stored; see `Explainer.explain_image`."""
        ...

    async def nearest(self, prediction: Prediction, limit: int) -> list[FoundCase]:
        """Find confirmed cases like a stored prediction's image; see `Explainer.nearest`."""
        ...

    async def state(self) -> ServingState:
        """Return which model serves, or why none does."""
        ...
