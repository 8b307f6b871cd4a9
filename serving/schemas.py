"""What travels over HTTP, typed once for the server and its client.

Field names and shapes are the API's contract: a field may be added, none changes its meaning.
"""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from records.types import (
    Confirmation,
    Consent,
    Decision,
    FlagReason,
    ModelStatus,
    ReasonCode,
    ReviewState,
    RolloutStage,
)

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PredictionId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="id of a prediction, 32 hex characters")]
IdempotencyKey = Annotated[
    str, Field(min_length=1, max_length=200, description="repeating a request with its key gives the same answer")
]


def _no_bare_number(value: Any) -> Any:
    """Refuse what would else count as seconds since 1970: a slip of the caller must not become a date."""
    if isinstance(value, (int, float)) or (isinstance(value, str) and value.strip().lstrip("+-").isnumeric()):
        raise ValueError("a number is no moment; send text such as 2026-03-01T12:00:00Z")
    return value


def _no_word(value: Any) -> Any:
    """Refuse "10" and true where a number is meant; 10.0 is 10 in JSON."""
    if isinstance(value, (bool, str)):
        raise ValueError("Input should be a valid integer")
    return value


Whole = Annotated[int, BeforeValidator(_no_word)]
"""A whole number, written as a number."""

Moment = Annotated[AwareDatetime, BeforeValidator(_no_bare_number)]
"""A date and time with its zone, in the words of RFC 3339."""


class Body(BaseModel):
    """Base of all bodies: closed, and free of NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Problem(Body):
    """An RFC 9457 problem document."""

    type: str = Field(description="URN that names the kind of problem")
    title: str
    status: int = Field(ge=400, le=599)
    detail: str = Field(description="one sentence: what was wrong and what would be right")
    code: str = Field(description="the last part of `type`, for programs")
    request_id: str | None = None
    errors: list[dict[str, Any]] | None = Field(default=None, description="of a body that does not fit: field, message")


class Context(Body):
    """What the caller knows about an image."""

    lesion_id: str | None = Field(default=None, max_length=200)
    patient_id: str | None = Field(default=None, max_length=200, description="only a salted hash of it is stored")
    age: float | None = Field(default=None, ge=0, le=130, strict=True, description="years")
    sex: str | None = Field(default=None, max_length=50)
    localization: str | None = Field(default=None, max_length=200, description="body site")
    device: str | None = Field(default=None, max_length=200)
    site: str | None = Field(default=None, max_length=200, description="institution")
    acquired_at: Moment | None = None
    consent: Consent | None = Field(default=None, description="what may be done with the image beyond answering")


class ModelRef(Body):
    """Which model answered."""

    id: str
    status: str = Field(description="champion, provisional or candidate, at that moment")


class Reason(Body):
    """One reason why an annotator should look."""

    code: ReasonCode
    text: str


class ReviewStatus(Body):
    """Where the question to the annotators is on its way."""

    state: ReviewState
    due: AwareDatetime | None = None


class Explanation(Body):
    """Where the model looked for one class."""

    method: str
    exact: bool = Field(description="true if it was computed in closed form, without differentiating")
    layer: str | None = Field(description="the layer whose map it is; empty if it is of the pixels")
    target: str = Field(description="class code that the map is about")
    versus: str | None = Field(default=None, description="class code that `target` is held against")
    steps: int | None = Field(default=None, description="points that were integrated over, or samples drawn")
    completeness_error: FiniteFloat | None = Field(
        default=None, description="how far the map's sum is from the change of the logit, as a share of that change"
    )
    faithfulness: dict[str, Any] | None = Field(
        default=None, description="how far this model's Grad-CAM maps can be believed, measured when it was made"
    )
    shape: list[int] = Field(min_length=2, max_length=2, description="rows and columns of `values`")
    values: list[list[FiniteFloat]] = Field(description="raw map over the centre square of the image, not rescaled")
    png_base64: str = Field(description="the map drawn over the image, PNG")


class PredictionResponse(Body):
    """An answer."""

    id: PredictionId
    request_id: str
    created_at: AwareDatetime
    image_id: str
    model: ModelRef
    label: str | None = Field(description="class code; empty for retake and non-finite")
    confidence: Probability | None
    probabilities: dict[str, Probability] | None = Field(description="calibrated, in class order")
    prediction_set: list[str]
    decision: Decision
    reasons: list[Reason]
    review: ReviewStatus | None
    explanation: Explanation | None


class PredictionPage(Body):
    """Some answers, newest first."""

    items: list[PredictionResponse]
    next: str | None = Field(description="pass it as `after` to read on; empty at the end")


class FlagRequest(Body):
    """An objection to an answer."""

    reason: FlagReason
    suggested_label: str | None = Field(default=None, description="class code")
    comment: str | None = Field(default=None, max_length=2000)


class FlagResponse(Body):
    """What became of an objection."""

    id: str
    prediction_id: PredictionId
    review: ReviewStatus
    text: str = Field(description="what happens next, one sentence")


class BatchItem(Body):
    """What became of one image of a batch: an answer or a problem."""

    answer: PredictionResponse | None
    problem: Problem | None


class LesionSummary(Body):
    """Several images of one lesion together: the most cautious of their decisions."""

    lesion_id: str
    decision: Decision
    prediction_ids: list[PredictionId]


class BatchResponse(Body):
    """What became of a batch, in the order of its images."""

    items: list[BatchItem]
    lesions: list[LesionSummary] = Field(description="of images whose context names a lesion")


class OutcomeRequest(Body):
    """What turned out to be true."""

    diagnosis: str = Field(description="class code")
    confirmation: Literal[
        Confirmation.HISTOPATHOLOGY, Confirmation.CONFOCAL, Confirmation.FOLLOW_UP, Confirmation.CONSENSUS,
        Confirmation.SINGLE_READER,
    ] = Field(description="how it was established")  # fmt: skip
    observed_at: Moment


class OutcomeResponse(Body):
    """An outcome that is stored."""

    id: str
    prediction_id: PredictionId
    agrees: bool | None = Field(description="whether the model's label was the same; empty if it gave none")
    text: str = Field(description="what it is used for, one sentence")


class Event(Body):
    """Something that happened to one's own answer."""

    id: str
    created_at: AwareDatetime
    kind: Literal["amended", "confirmed", "undecided", "overdue", "recalled"]
    prediction_id: PredictionId
    details: dict[str, Any]


class EventPage(Body):
    """Some events, oldest first."""

    items: list[Event]
    next: str | None = Field(description="pass it as `after` next time; it does not change while nothing happens")


class ErasureResponse(Body):
    """What was removed."""

    image_id: str
    blobs: int
    withdrawn: int = Field(description="open questions to annotators that were taken back")
    left_in_place: bool = Field(description="true if the file itself belongs to somebody else and was left")


class RolloutRequest(Body):
    """How far a candidate should come."""

    model: str = Field(min_length=1, max_length=200, description="id, prefix of 8 or more, or `candidate`")
    percent: Whole = Field(default=0, ge=0, le=100, description="share of lesions; 0 mirrors, 100 promotes")
    reason: str | None = Field(default=None, max_length=500, description="needed if the gate has not passed it")


class HarmSeen(Body):
    """A kind of harm, how often it was looked for and seen."""

    name: str
    looked: int
    seen: int
    tolerated: float = Field(description="rate that does not end the rollout")
    evidence: FiniteFloat = Field(description="log e-value; the rollout ends at `limit`")
    limit: FiniteFloat


class RolloutInfo(Body):
    """A candidate beside the model that answers."""

    id: str
    created_at: AwareDatetime
    champion_id: str
    candidate_id: str
    stage: RolloutStage
    percent: int
    harms: list[HarmSeen]
    ended_at: AwareDatetime | None
    why: str | None


class ClassInfo(Body):
    """A class that the model tells apart."""

    code: str
    name: str
    malignant: bool


class ModelInfo(Body):
    """A registered model."""

    id: str
    status: ModelStatus
    architecture: str
    dataset_id: str
    round: int | None
    created_at: AwareDatetime
    status_changed_at: AwareDatetime


class ServedModelInfo(Body):
    """The model that answers now."""

    id: str
    status: str
    status_text: str
    architecture: str
    dataset_id: str
    precision: str
    side_px: int
    classes: list[ClassInfo]
    loaded_at: AwareDatetime
    golden_difference: FiniteFloat = Field(description="largest difference to its golden logits when it was loaded")
    metrics: dict[str, Any]


class ModelList(Body):
    """All registered models, newest first."""

    items: list[ModelInfo]


class Health(Body):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(Body):
    """Whether predictions can be made now."""

    ready: bool
    model: ModelRef | None
    detail: str
