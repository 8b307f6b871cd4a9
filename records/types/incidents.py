"""Incidents: predictions that turned out to be wrong in a way that matters, and what was found out about them.

`Evidence` and its parts are what an incident's row holds as JSON; the page and the command show it from there.
"""

from enum import StrEnum
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from records.frames import Crop
from records.types.base import Record, Timestamp


class IncidentState(StrEnum):
    """The state of an incident."""

    OPEN = "open"
    CLOSED = "closed"
    WITHDRAWN = "withdrawn"


class ModelAction(StrEnum):
    """What was done to the model of an incident when it was opened."""

    NONE = "none"
    BLOCKED = "blocked"
    ROLLED_BACK = "rolled_back"


class Criterion(StrEnum):
    """What another prediction has in common with that of an incident."""

    IMAGE = "image"
    SCORE = "score"
    NEIGHBOURHOOD = "neighbourhood"
    PLACE = "place"
    LABEL = "label"


class Incident(Record):
    """A prediction that missed the true class, from its report to the proof that it cannot happen again."""

    table: ClassVar[str] = "incidents"
    mutable: ClassVar[frozenset[str]] = frozenset({"state", "closed_at", "closed_by", "proof", "why"})
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("state",), ("prediction_id",), ("image_id",))

    id: str
    created_at: Timestamp
    actor: str = Field(description="who opened it, as in the audit")
    prediction_id: str
    image_id: str
    model_id: str = Field(description="the model that made the prediction")
    truth: str = Field(description="class code; empty once the image is erased")
    note: str | None = None
    action: ModelAction = Field(default=ModelAction.NONE, description="what was done to the model")
    evidence: dict[str, Any] = Field(default_factory=dict, description="see Evidence; empty once the image is erased")
    state: IncidentState = IncidentState.OPEN
    closed_at: Timestamp | None = None
    closed_by: str | None = None
    proof: dict[str, Any] = Field(
        default_factory=dict, description="the champion that handles every case, and what it decided about each"
    )
    why: str | None = Field(default=None, description="why it was closed without proof")


class IncidentPrediction(Record):
    """A prediction that an incident concerns: that of the incident itself, or one that resembles it."""

    table: ClassVar[str] = "incident_predictions"
    mutable: ClassVar[frozenset[str]] = frozenset({"truth"})
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("prediction_id",), ("image_id",))
    unique: ClassVar[tuple[tuple[str, ...], ...]] = (("incident_id", "prediction_id"),)

    id: str
    created_at: Timestamp
    incident_id: str
    prediction_id: str
    image_id: str
    criteria: list[Criterion] = Field(description="what it has in common; empty for the incident's own prediction")
    truth: str | None = Field(
        default=None, description="class that the model missed, once it is known: a case of the regression set"
    )


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ReplayedPrediction(_Part):
    """A prediction that was computed again from its row."""

    is_same: bool = Field(description="every probability has the same bits as the stored one")
    largest_difference: float | None = Field(description="of a probability; empty without stored ones")
    engine: str
    precision: str
    num_threads: int
    batch_size: int | None = Field(description="images of the batch that gives the stored bits; empty if none does")


class TriageLimit(_Part):
    """A limit that triage compared with, and how far the prediction stayed from being referred by it."""

    name: str
    value: float
    limit: float
    short_by: float = Field(description="what was missing for a referral; 0 or less: this limit referred it")


class TrainingNeighbour(_Part):
    """A training image close to that of the incident, as the model describes images."""

    image_id: str
    label: str
    distance: float = Field(ge=0)


class Evidence(_Part):
    """What the model saw, and what was looked at to find predictions like this one."""

    replay: ReplayedPrediction
    label: str | None
    probabilities: dict[str, float] = Field(description="as replayed; empty if they are not finite")
    decision: str
    reasons: list[str]
    limits: list[TriageLimit]
    out_of_distribution_score: float | None
    quality_score: float | None
    quality_reason: str | None
    maps: dict[str, list[list[int]]] = Field(
        description="Grad-CAM of the predicted and of the true class, as 0 to 255 of the maximum"
    )
    crop: Crop = Field(default=Crop.CENTER, description="what the model saw of the image, and the maps cover")
    neighbours: list[TrainingNeighbour] = Field(description="nearest training images, nearest first")
    neighbours_of: int = Field(description="training images that were compared; 0: they are not here")
    looked_at: int = Field(description="served predictions of the model that were compared, the newest")
    looked_at_of: int = Field(description="all its served predictions")
