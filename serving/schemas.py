"""Request and response bodies of the HTTP API, typed once for the server and its client.

FastAPI derives the OpenAPI document from these pydantic models. Field names and shapes are the API's contract:
a field may be added, none changes its meaning.
"""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from records.bundles import PointName, Rule
from records.frames import Crop
from records.types import (
    Confirmation,
    Consent,
    Decision,
    FlagReason,
    ModelStatus,
    ReasonCode,
    ReviewState,
    RolloutStage,
    Scope,
)
from records.types.base import LongText, Moment, Plain, Text

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PredictionId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="id of a prediction, 32 hex characters")]
ModelName = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
RolloutId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
IdempotencyKey = Annotated[
    str,
    Plain(200, least=1),
    Field(description="a repeated request with the same key gets the stored prediction"),
]
Why = Annotated[str, Plain(500, least=1)]
"""A reason that a person gives for the audit."""


def _no_text(value: Any) -> Any:
    """Refuse "10" and true for a number, as JSON Schema does; 10.0 is accepted, since it equals 10 in JSON."""
    if isinstance(value, (bool, str)):
        raise ValueError("Input should be a valid integer")
    return value


Whole = Annotated[int, BeforeValidator(_no_text)]
"""An integer that JSON has as a number, not as text."""


class Body(BaseModel):
    """Base of all bodies: immutable, unknown fields refused."""

    # A misspelt field, such as `consent`, is refused instead of ignored.
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

    lesion_id: Text | None = None
    patient_id: Text | None = Field(default=None, description="only a salted hash of it is stored")
    age: float | None = Field(default=None, ge=0, le=130, strict=True, allow_inf_nan=False, description="years")
    sex: Annotated[str, Plain(50)] | None = None
    localization: Text | None = Field(default=None, description="body site")
    device: Text | None = None
    site: Text | None = Field(default=None, description="institution")
    acquired_at: Moment | None = None
    consent: Consent | None = Field(default=None, description="use of the image beyond the prediction itself")


class EncodedImage(Body):
    """An image as text, for programs that send JSON only."""

    image_base64: str = Field(description="bytes of the file, base64")
    context: Context | None = None


class ModelRef(Body):
    """The model that made a prediction."""

    id: str
    status: str = Field(description="champion, provisional or candidate, at that moment")


class Reason(Body):
    """One reason for review."""

    code: ReasonCode
    text: str


class ReviewStatus(Body):
    """State of the review item."""

    state: ReviewState
    due: AwareDatetime | None = None


class Explanation(Body):
    """A heat map for one class."""

    method: str
    exact: bool = Field(description="true if computed in closed form, without automatic differentiation")
    layer: str | None = Field(description="layer whose activations are mapped; null for a map of the pixels")
    target: str = Field(description="class code that the map is about")
    versus: str | None = Field(default=None, description="class code that `target` is compared with")
    steps: int | None = Field(default=None, description="integration points or samples")
    completeness_error: FiniteFloat | None = Field(
        default=None, description="|sum of the map - change of the logit| / |change of the logit|"
    )
    faithfulness: dict[str, Any] | None = Field(
        default=None, description="measured faithfulness of this model's Grad-CAM maps"
    )
    shape: list[int] = Field(min_length=2, max_length=2, description="rows and columns of `values`")
    values: list[list[FiniteFloat]] = Field(description="raw map over the part of the image that `crop` names")
    crop: Crop = Field(
        default=Crop.CENTER, description="what the map covers, which is what the model sees: the centre square, or all"
    )
    png_base64: str = Field(description="the map drawn over this part of the image, PNG")


class ConfirmedCase(Body):
    """An image of the train split with a confirmed diagnosis."""

    image_id: str
    label: str = Field(description="class code of the confirmed diagnosis")
    confirmed_by: str = Field(description="how the diagnosis was confirmed")
    distance: FiniteFloat = Field(
        ge=0, description="of the model's features; 1 is the largest that is accepted as like the training images"
    )
    png_base64: str = Field(description="what the model sees of it, PNG")


class NearestCases(Body):
    """Confirmed cases that are like an image to the model; not its diagnosis."""

    prediction_id: PredictionId
    model_id: str
    cases: list[ConfirmedCase] = Field(description="nearest first, one of each group; empty if none may be shown")


class ContextEffect(Body):
    """What the context of an image changed: the prediction of the image alone."""

    used: list[str] = Field(description="columns of the context that counted")
    unknown: list[str] = Field(
        description="columns that were given, with a value that the model has not seen; they changed nothing"
    )
    label_without: str = Field(description="class code that the image alone would get")
    confidence_without: Probability
    probabilities_without: dict[str, Probability] = Field(description="calibrated, of the image alone")


class PredictionResponse(Body):
    """A stored prediction."""

    id: PredictionId
    request_id: str
    created_at: AwareDatetime
    image_id: str
    model: ModelRef
    engine: str = Field(description="what computed it: torch or openvino")
    label: str | None = Field(description="class code; null for retake and non-finite output")
    confidence: Probability | None
    probabilities: dict[str, Probability] | None = Field(description="calibrated, in class order")
    prediction_set: list[str]
    label_in_set: bool | None = Field(
        default=None,
        description="false: the label's probability is lower than is usual for images of its class, and the image goes "
        "to review; null without a label",
    )
    decision: Decision
    reasons: list[Reason]
    review: ReviewStatus | None
    explanation: Explanation | None
    context_effect: ContextEffect | None = Field(
        default=None,
        description="null if nothing was given that the model uses; without consent it is not stored, and null later",
    )


class PredictionPage(Body):
    """A page of predictions, newest first."""

    items: list[PredictionResponse]
    next: str | None = Field(description="pass as `after` for the next page; null on the last")


class FlagRequest(Body):
    """A flag on a prediction."""

    reason: FlagReason
    suggested_label: Text | None = Field(default=None, description="class code")
    comment: LongText | None = None


class FlagResponse(Body):
    """A stored flag and the state of its review item."""

    id: str
    prediction_id: PredictionId
    review: ReviewStatus
    text: str = Field(description="what happens next, one sentence")


class BatchItem(Body):
    """Result for one image of a batch: a prediction or a problem."""

    prediction: PredictionResponse | None
    problem: Problem | None


class LesionSummary(Body):
    """All images of one lesion in a batch: the most cautious of their decisions."""

    lesion_id: str
    decision: Decision
    prediction_ids: list[PredictionId]


class BatchResponse(Body):
    """Results of a batch, in the order of its images."""

    items: list[BatchItem]
    lesions: list[LesionSummary] = Field(description="one per lesion that a context names")


class OutcomeRequest(Body):
    """A diagnosis reported after the prediction."""

    diagnosis: Text = Field(description="class code")
    confirmation: Literal[
        Confirmation.HISTOPATHOLOGY, Confirmation.CONFOCAL, Confirmation.FOLLOW_UP, Confirmation.CONSENSUS,
        Confirmation.SINGLE_READER,
    ] = Field(description="how it was established")  # fmt: skip
    observed_at: Moment


class OutcomeResponse(Body):
    """A stored outcome."""

    id: str
    prediction_id: PredictionId
    agrees: bool | None = Field(description="whether the predicted label was the same; null if there was none")
    text: str = Field(description="what it is used for, one sentence")


class Event(Body):
    """A change that concerns a prediction of the caller's organisation."""

    id: str
    created_at: AwareDatetime
    kind: Literal["amended", "confirmed", "undecided", "overdue", "recalled"]
    prediction_id: PredictionId
    details: dict[str, Any]


class EventPage(Body):
    """A page of events, oldest first."""

    items: list[Event]
    next: str | None = Field(description="pass as `after` next time; unchanged while there are no new events")


class ErasureResponse(Body):
    """What an erasure removed."""

    image_id: str
    blobs: int
    withdrawn: int = Field(description="open review items that were withdrawn")
    left_in_place: bool = Field(description="true if the file was imported in place and therefore not deleted")


class ConsentRequest(Body):
    """Consent that a person took back."""

    consent: Literal[Consent.NONE, Consent.REVIEW, Consent.TRAINING] = Field(
        description="the new, lower consent; none erases the image"
    )


class ImageConsent(Body):
    """The consent of an image from now on."""

    image_id: str
    consent: Consent


class RolloutRequest(Body):
    """The traffic share that a candidate should get, in a new rollout or in the one that is named."""

    model: ModelName = Field(description="the candidate: its id, or a prefix of 8 or more")
    percent: Whole = Field(default=0, ge=0, le=100, description="traffic share by lesion; 0 is shadow, 100 promotes")
    rollout: RolloutId | None = Field(
        default=None, description="the rollout to change or promote; null starts one, with at most 99 %"
    )
    champion: ModelName | None = Field(
        default=None, description="to start: refuse unless this model serves now; its id, or a prefix of 8 or more"
    )
    reason: Why | None = Field(default=None, description="needed if the gate has not passed it")


class UndoRequest(Body):
    """Which model should serve again, and why."""

    back_to: ModelName = Field(description="the model that was replaced: its id, or a prefix of 8 or more")
    reason: Why = Field(description="for the audit")


class GuardrailStatus(Body):
    """A guardrail and its counts so far."""

    name: str
    observations: int
    events: int
    limit: float = Field(description="tolerated rate of events per observation")
    evidence: FiniteFloat = Field(description="log e-value against `limit`; the rollout ends at `threshold`")
    threshold: FiniteFloat


class RolloutInfo(Body):
    """The rollout of a candidate."""

    id: str
    created_at: AwareDatetime
    champion_id: str
    candidate_id: str
    stage: RolloutStage
    percent: int
    guardrails: list[GuardrailStatus]
    ended_at: AwareDatetime | None
    why: str | None


class ClassInfo(Body):
    """A class of the taxonomy."""

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
    replaced_id: str | None = Field(default=None, description="the model that served before it, if it was promoted")
    created_at: AwareDatetime
    status_changed_at: AwareDatetime


class ContextInfo(Body):
    """A column of the context that a model uses."""

    name: str = Field(description="as in the context of a request")
    kind: Literal["categorical", "numeric"]
    values: list[str] = Field(description="categorical: values that it knows, compared without case")
    low: float | None = Field(description="numeric: smallest value that it knows")
    high: float | None = Field(description="numeric: largest value that it knows")


class ServedModelInfo(Body):
    """The model that serves now."""

    id: str
    status: str
    status_text: str
    architecture: str
    dataset_id: str
    engine: str
    precision: str
    side_px: int
    crop: Crop = Field(
        default=Crop.CENTER, description="what it sees of an image: the centre square, or the whole image"
    )
    classes: list[ClassInfo]
    loaded_at: AwareDatetime
    golden_difference: FiniteFloat = Field(description="largest difference from the golden logits at load time")
    metrics: dict[str, Any]
    context: list[ContextInfo] = Field(default_factory=list, description="what it uses beside the image")
    views: int = Field(default=1, ge=1, description="flips and turns of an image whose logits are averaged")


class ModelList(Body):
    """All registered models, newest first."""

    items: list[ModelInfo]


class Health(Body):
    """Liveness of the process."""

    status: Literal["ok"] = "ok"


class Readiness(Body):
    """Whether predictions can be made now."""

    ready: bool
    model: ModelRef | None
    detail: str


class ScoreBand(Body):
    """How often predictions in a band of scores were right, one image per lesion."""

    low: Probability
    high: Probability
    lesions: int = Field(ge=1)
    right: int = Field(ge=0)
    right_ci: tuple[Probability, Probability] = Field(description="exact 95 % interval of the share that was right")


class ModelDetails(ModelInfo):
    """A registered model and its measured figures."""

    status_text: str
    classes: list[ClassInfo]
    scores: list[ScoreBand] = Field(
        description="on the calibration split, by rising score; empty for models without them"
    )
    rule: Rule = Field(
        default="natural",
        description="label: the most probable class (natural), the same if all classes came equally often (even), or "
        "that of the smallest expected cost (cost)",
    )
    point: PointName = Field(
        default="proven",
        description="sensitivity at the review thresholds: proven on calibration, or estimated on held-out lesions",
    )
    promise: Probability = Field(description="guaranteed coverage of the prediction sets; see pooled_classes")
    pooled_classes: list[str] = Field(
        description="classes with few calibration lesions; the guarantee holds for them together, not for each"
    )
    refer: dict[str, Probability] = Field(
        description="class code, or `malignant`: probability from which an image goes to review"
    )
    metrics: dict[str, Any] = Field(description="on the splits that training may read")
    faithfulness: dict[str, Any] | None = Field(description="measured faithfulness of its Grad-CAM maps")
    has_report: bool = Field(description="whether the bundle has an evaluation report")
    crop: Crop = Field(
        default=Crop.CENTER, description="what it sees of an image: the centre square, or the whole image"
    )
    context: list[ContextInfo] = Field(default_factory=list, description="what it uses beside the image")
    views: int = Field(default=1, ge=1, description="flips and turns of an image whose logits are averaged")


class RoundInfo(Body):
    """A round with the test figures of its model; no decision uses the test figures."""

    number: int = Field(ge=1)
    started_at: AwareDatetime
    finished_at: AwareDatetime | None
    verdict: str | None = Field(description="promote, refuse or undecided; null while it runs")
    why: str | None
    model_id: str | None
    dataset_id: str | None
    images: int | None = Field(description="images of its dataset")
    labels_from_annotators: int | None = Field(description="training labels from annotators")
    lesions: int | None = Field(description="lesions of the test split")
    balanced_accuracy: FiniteFloat | None
    balanced_accuracy_ci: tuple[FiniteFloat, FiniteFloat] | None
    key_class: dict[str, Any] | None = Field(description="sensitivity and specificity at the refer threshold")


class RoundList(Body):
    """All rounds, oldest first."""

    items: list[RoundInfo]


class CallerInfo(Body):
    """The caller and their scopes."""

    id: str = Field(description="id of the key, or `local` without one")
    organisation: str
    scopes: list[Scope]
    sandbox: bool = Field(description="true if images are not stored, reviewed or used for training")


class SessionInfo(Body):
    """The part of a browser's session that is no cookie."""

    proof: str = Field(description="sent by the page as X-Relook-Proof; together with the cookie it is the key")
