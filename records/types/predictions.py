"""Predictions, and what people reported about them: review items, flags and outcomes."""

from enum import StrEnum
from typing import Any, ClassVar

from pydantic import Field

from records.frames import Crop
from records.types.base import Probability, Record, Timestamp
from records.types.images import Confirmation, Consent


class Decision(StrEnum):
    """What the service decided to do with an image."""

    ANSWERED = "answered"
    REVIEW = "review"
    URGENT = "urgent"
    RETAKE = "retake"


class Arm(StrEnum):
    """The role of a model when it made a prediction."""

    CHAMPION = "champion"
    CANDIDATE = "candidate"
    SHADOW = "shadow"


class ReasonCode(StrEnum):
    """Why an image is sent to an annotator or, for `bad_image`, has to be taken again."""

    LOW_CONFIDENCE = "low_confidence"
    PREDICTION_SET = "prediction_set"
    REFER = "refer"
    URGENT = "urgent"
    OUT_OF_DISTRIBUTION = "out_of_distribution"
    NON_FINITE = "non_finite"
    FLAGGED = "flagged"
    AUDIT_SAMPLE = "audit_sample"
    SELECTED = "selected"
    LABEL_NOISE = "label_noise"
    ADJUDICATION = "adjudication"
    INCIDENT = "incident"
    GOLD = "gold"
    DRIFT = "drift"
    BAD_IMAGE = "bad_image"


class ReviewState(StrEnum):
    """The state of a review item."""

    NEW = "new"
    PUSHED = "pushed"
    ANSWERED = "answered"
    WITHDRAWN = "withdrawn"


class FlagReason(StrEnum):
    """What a caller says is wrong with a prediction."""

    WRONG_LABEL = "wrong_label"
    UNSURE = "unsure"
    BAD_IMAGE = "bad_image"
    OTHER = "other"


class Prediction(Record):
    """One prediction of one model. It is never changed, and holds what is needed to compute it again exactly."""

    table: ClassVar[str] = "predictions"
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("image_id",),
        ("request_id",),
        ("organisation", "id"),
        ("decision", "id"),
        ("model_id", "created_at"),
        ("created_at", "id"),
    )
    unique: ClassVar[tuple[tuple[str, ...], ...]] = (("caller", "idempotency_key", "arm"),)

    id: str
    request_id: str
    created_at: Timestamp
    caller: str = Field(description="id of the key, or `local`")
    organisation: str = "local"
    idempotency_key: str | None = None
    image_id: str
    consent: Consent = Consent.NONE
    context: dict[str, str | float | None] = Field(
        default_factory=dict, description="what the caller said about the image"
    )
    model_id: str
    model_status: str = Field(description="champion | provisional | candidate, when it predicted")
    arm: Arm = Arm.CHAMPION
    rollout_id: str | None = Field(default=None, description="of the candidate's rollout; empty for the champion")
    served: bool = Field(
        default=True, description="false for a shadow or candidate prediction that the caller did not get"
    )
    engine: str = Field(description="what computed it: torch or openvino")
    precision: str = Field(description="fp32 or bf16")
    num_threads: int = Field(ge=1)
    settings_hash: str
    label: str | None = Field(default=None, description="class code; empty for retake and non-finite")
    confidence: Probability | None = None
    probabilities: dict[str, Probability] | None = Field(default=None, description="calibrated, in class order")
    context_effect: dict[str, Any] | None = Field(
        default=None, description="what the context changed; see serving.schemas.ContextEffect"
    )
    prediction_set: list[str] = Field(default_factory=list, description="class codes of the conformal set")
    out_of_distribution_score: float | None = None
    quality_score: float | None = None
    quality_reason: str | None = Field(default=None, description="what is wrong with the image, if anything")
    decision: Decision
    reasons: list[ReasonCode] = Field(default_factory=list)
    latency_ms: float = Field(ge=0)


class ReviewItem(Record):
    """A doubt about an image, for annotators to resolve.

    It is written in the same transaction as what caused it (transactional outbox).
    """

    table: ClassVar[str] = "review_items"
    mutable: ClassVar[frozenset[str]] = frozenset(
        {"state", "priority", "reasons", "project_id", "task_id", "pushed_at", "answered_at", "overlay_blob"}
        | {"comment", "suggested_label", "blind", "reader", "sent_hash", "heat_map", "crop", "cases"}
    )
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("state", "priority"),
        ("prediction_id",),
        ("image_id",),
        ("project_id", "task_id"),
        ("selection_probability",),
        ("state", "sent_hash"),
        ("state", "due"),
    )

    id: str
    created_at: Timestamp
    prediction_id: str | None = Field(default=None, description="empty for an item about a pool image")
    image_id: str
    reasons: list[ReasonCode]
    priority: float = Field(allow_inf_nan=False, description="items with a larger priority are pushed first")
    due: Timestamp | None = Field(default=None, description="deadline of an urgent item")
    selection_probability: Probability | None = Field(default=None, description="set for audit samples")
    heat_map: list[list[int]] | None = Field(
        default=None, description="rows of the heat map, 0 to 255 of its maximum; it is drawn over the image when shown"
    )
    crop: Crop = Field(default=Crop.CENTER, description="the part of the image that `heat_map` covers")
    overlay_blob: str | None = Field(
        default=None, description="blob id of the drawn heat map, PNG, in items that are older than `heat_map`"
    )
    comment: str | None = Field(default=None, description="comment of the user who flagged the prediction")
    suggested_label: str | None = None
    blind: bool = Field(default=False, description="true if the reader is not shown the prediction")
    reader: str | None = Field(
        default=None, description="annotator whose own project gets the item; empty for the shared project"
    )
    cases: list[str] | None = Field(
        default=None, description="ids of the confirmed cases that its task shows beside its image"
    )
    sent_hash: str | None = Field(
        default=None, description="whether its task shows it as it is; empty before it was sent"
    )
    state: ReviewState = ReviewState.NEW
    project_id: int | None = None
    task_id: int | None = None
    pushed_at: Timestamp | None = None
    answered_at: Timestamp | None = None


class Flag(Record):
    """A caller's report that a prediction looks wrong."""

    table: ClassVar[str] = "flags"
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("prediction_id",),)

    id: str
    created_at: Timestamp
    prediction_id: str
    caller: str
    organisation: str = "local"
    reason: FlagReason
    suggested_label: str | None = None
    comment: str | None = Field(default=None, max_length=2000)
    review_item_id: str


class Outcome(Record):
    """A diagnosis that was reported later, for example a biopsy result."""

    table: ClassVar[str] = "outcomes"
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("prediction_id",), ("image_id",))

    id: str
    created_at: Timestamp
    prediction_id: str
    image_id: str
    caller: str
    diagnosis: str
    confirmation: Confirmation
    observed_at: Timestamp
