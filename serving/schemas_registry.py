"""What travels over HTTP about models, rounds and callers: what was measured, and who may do what.

As in `serving.schemas`, a field may be added and none changes its meaning.
"""

from typing import Any

from pydantic import AwareDatetime, Field, FiniteFloat

from records.types import Scope
from serving.schemas import Body, ClassInfo, ModelInfo, Probability


class ScoreBand(Body):
    """How often answers of about the same score were right, one image per lesion."""

    low: Probability
    high: Probability
    lesions: int = Field(ge=1)
    right: int = Field(ge=0)
    right_ci: tuple[Probability, Probability] = Field(description="exact 95 % interval of the share that was right")


class ModelDetails(ModelInfo):
    """A registered model, and what was measured of it."""

    status_text: str
    classes: list[ClassInfo]
    scores: list[ScoreBand] = Field(
        description="on the calibration split, by rising score; empty for models made before it was kept"
    )
    promise: Probability = Field(description="coverage that the prediction sets promise per class")
    pooled_classes: list[str] = Field(description="classes of few calibration lesions: promised together, not each")
    refer: dict[str, Probability] = Field(description="class code, or `malignant`: the score that goes to an annotator")
    metrics: dict[str, Any] = Field(description="on the splits that fitting may read")
    faithfulness: dict[str, Any] | None = Field(description="how far its Grad-CAM maps can be believed")
    has_report: bool = Field(description="whether a report was written beside it")


class RoundInfo(Body):
    """A round, and what its model was worth on the test split, by which nothing is decided."""

    number: int = Field(ge=1)
    started_at: AwareDatetime
    finished_at: AwareDatetime | None
    verdict: str | None = Field(description="promote, refuse or undecided; empty while it runs")
    why: str | None
    model_id: str | None
    dataset_id: str | None
    images: int | None = Field(description="images of its dataset")
    labels_from_annotators: int | None = Field(description="training labels that annotators gave")
    lesions: int | None = Field(description="that were tested on")
    balanced_accuracy: FiniteFloat | None
    balanced_accuracy_ci: tuple[FiniteFloat, FiniteFloat] | None
    key_class: dict[str, Any] | None = Field(description="sensitivity and specificity at the refer threshold")


class RoundList(Body):
    """All rounds, oldest first."""

    items: list[RoundInfo]


class CallerInfo(Body):
    """Who asks, and what they may do."""

    id: str = Field(description="id of the key, or `local` without one")
    organisation: str
    scopes: list[Scope]
    sandbox: bool = Field(description="true if nothing that is sent is stored, asked about or learned from")
