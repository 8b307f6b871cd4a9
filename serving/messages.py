"""What travels between the HTTP replica and the replicas that compute.

Plain frozen values: a request to predict, what came of it, a map, and which model answers. No HTTP
and no Ray here, so the same values serve an app that runs in one process.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from records.arrays import Float32Array
from records.types import Prediction, ReviewItem
from serving.schemas import Context, ServedModelInfo
from vision.explanations.methods import METHODS

if TYPE_CHECKING:
    Method = str
else:
    # Pydantic builds validation and the OpenAPI enum from the registry; type checkers accept no computed Literal.
    Method = Literal[METHODS.names]


@dataclass(frozen=True, slots=True)
class PredictionRequest:
    """One image to answer about."""

    image: bytes
    request_id: str
    context: Context
    caller: str = "local"
    organisation: str = "local"
    idempotency_key: str | None = None
    explain: bool = False


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Where a model looked for one class."""

    method: str
    exact: bool
    layer: str | None
    target: str
    values: Float32Array
    """[h, w] over the centre square of the image"""
    png: bytes
    versus: str | None = None
    steps: int | None = None
    completeness_error: float | None = None
    faithfulness: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class StoredPrediction:
    """A prediction that is in the ledger. The map is there only if it was computed with the answer."""

    prediction: Prediction
    review: ReviewItem | None
    heat_map: HeatMap | None = None


@dataclass(frozen=True, slots=True)
class ServingState:
    """Which model answers now, or why none does."""

    model: ServedModelInfo | None
    detail: str
