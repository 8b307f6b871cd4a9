"""Messages between the HTTP ingress and the replicas that compute.

Plain frozen values: a prediction request, a stored prediction, a heat map, and the state of the model. No HTTP and no
Ray here, so an app in one process uses the same values.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from records.arrays import Float32Array
from records.frames import Crop
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
    """One image to predict."""

    image: bytes
    request_id: str
    context: Context
    caller: str = "local"
    organisation: str = "local"
    idempotency_key: str | None = None
    explain: bool = False
    repeated: bool = False
    """whether a replica that was lost may have stored its prediction already"""


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A heat map for one class, with its overlay."""

    method: str
    exact: bool
    layer: str | None
    target: str
    values: Float32Array
    """[h, w] over the part of the image that `crop` names"""
    png: bytes
    crop: Crop
    versus: str | None = None
    steps: int | None = None
    completeness_error: float | None = None
    faithfulness: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class FoundCase:
    """An image with a confirmed diagnosis."""

    image_id: str
    label: str
    label_rank: int
    distance: float
    """over the largest distance that is accepted as like the training images"""
    png: bytes


@dataclass(frozen=True, slots=True)
class StoredPrediction:
    """A committed prediction with its review item; the heat map only if it was computed with the prediction."""

    prediction: Prediction
    review: ReviewItem | None
    heat_map: HeatMap | None = None


@dataclass(frozen=True, slots=True)
class ServingState:
    """The model that serves now, or the reason why none does."""

    model: ServedModelInfo | None
    detail: str
    troubles: tuple[str, ...] = ()
    """what keeps single replicas from serving, while others do"""
