"""Records about operation: datasets, models, rounds, leases, audit events, API keys, rollouts."""

from enum import StrEnum
from typing import Any, ClassVar

from pydantic import Field

from records.types.base import Record, Timestamp
from records.types.images import Consent


class ModelStatus(StrEnum):
    """What a model may be used for."""

    REGISTERED = "registered"
    CANDIDATE = "candidate"
    CHAMPION = "champion"
    PROVISIONAL = "provisional"
    RETIRED = "retired"
    REFUSED = "refused"


class DatasetRecord(Record):
    """A dataset version that exists. The manifest itself is a parquet file."""

    table: ClassVar[str] = "datasets"

    id: str = Field(description="content hash, 64 hex characters")
    created_at: Timestamp
    parent_id: str | None = None
    taxonomy_hash: str
    num_images: int = Field(ge=0)
    num_groups: int = Field(ge=0)
    round: int = Field(ge=0)
    num_changes: int | None = Field(
        default=None, ge=0, description="rows of `dataset_changes`; empty: there are none, look into the manifest"
    )


class DatasetChange(Record):
    """An image whose row in a dataset version differs from its row in the version's parent, or is missing from one.

    Rows without a version name images that changed since the newest one was read, see `records.changes`.
    """

    table: ClassVar[str] = "dataset_changes"
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("image_id",), ("dataset_id",))

    id: str
    dataset_id: str = Field(description="a version; empty, or the mark of a build, until a version knows the change")
    image_id: str


class ModelRecord(Record):
    """A bundle that is registered. At most one model is served: champion or provisional."""

    table: ClassVar[str] = "models"
    mutable: ClassVar[frozenset[str]] = frozenset({"status", "status_changed_at", "replaced_id", "replaced_status"})
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("status",), ("dataset_id",))

    id: str = Field(description="content hash of the bundle, 64 hex characters")
    created_at: Timestamp
    status: ModelStatus = ModelStatus.REGISTERED
    status_changed_at: Timestamp
    path: str = Field(description="folder of the bundle")
    architecture: str
    dataset_id: str
    taxonomy_hash: str
    round: int | None = None
    replaced_id: str | None = Field(
        default=None, description="the model that served before it, to which an undo returns"
    )
    replaced_status: ModelStatus | None = Field(default=None, description="champion or provisional, as that model was")


class RoundRecord(Record):
    """A round: its number, its inputs and its verdict."""

    table: ClassVar[str] = "rounds"
    mutable: ClassVar[frozenset[str]] = frozenset({"finished_at", "verdict", "why", "model_id", "dataset_id"})

    id: str
    number: int = Field(ge=1)
    started_at: Timestamp
    finished_at: Timestamp | None = None
    seed: int
    settings_hash: str
    dataset_id: str | None = None
    model_id: str | None = None
    verdict: str | None = Field(default=None, description="promote | refuse | undecided")
    why: str | None = None


class RoundStep(Record):
    """A finished step of a round with its result. Written once, at its end."""

    table: ClassVar[str] = "round_steps"
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("round_id",),)
    unique: ClassVar[tuple[tuple[str, ...], ...]] = (("round_id", "step"),)

    id: str
    round_id: str
    step: str
    started_at: Timestamp
    finished_at: Timestamp
    result: dict[str, Any] = Field(default_factory=dict)


class LabelValueRecord(Record):
    """What the labels of a dataset version bought, as `relook labels value` measured it once."""

    table: ClassVar[str] = "label_values"

    id: str
    created_at: Timestamp
    dataset_id: str
    model_id: str = Field(description="the bundle whose features were used, registered or not")
    labels: int = Field(ge=0, description="training images")
    figures: dict[str, Any] = Field(description="see `cluster.label_value.LabelValue`")


class Lease(Record):
    """A lock that one process at a time may hold until it expires."""

    table: ClassVar[str] = "leases"
    key: ClassVar[str] = "name"
    mutable: ClassVar[frozenset[str]] = frozenset({"holder", "expires_at", "fence"})

    name: str
    holder: str
    expires_at: Timestamp = Field(description="by the database's clock")
    fence: int = Field(default=0, ge=0, description="grows with every new holder; writes of an earlier one are refused")


class Cursor(Record):
    """The position of a reader or a long-running job, so that it can continue."""

    table: ClassVar[str] = "cursors"
    key: ClassVar[str] = "name"
    mutable: ClassVar[frozenset[str]] = frozenset({"position"})

    name: str
    position: dict[str, Any]


class AuditEvent(Record):
    """One link of the audit chain: each event carries the hash of the one before, and its own under a key."""

    table: ClassVar[str] = "audit_events"
    key: ClassVar[str] = "number"

    number: int = Field(ge=1)
    at: Timestamp
    actor: str
    action: str = Field(description="for example gate.read, model.promoted, image.erased")
    subject: str
    details: dict[str, Any] = Field(default_factory=dict)
    previous_hash: str
    hash: str
    key_id: str | None = Field(
        default=None, description="which key made the hash; null in events from before there were keys"
    )


class EventRecord(Record):
    """Something that happened to a prediction, for its caller, in order."""

    table: ClassVar[str] = "events"
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("organisation", "id"), ("prediction_id",))
    unique: ClassVar[tuple[tuple[str, ...], ...]] = (("source", "prediction_id"),)

    id: str
    created_at: Timestamp
    organisation: str
    kind: str = Field(description="amended | confirmed | undecided | overdue | recalled")
    prediction_id: str
    source: str | None = Field(
        default=None, description="id of what caused it: annotation, outcome, review item, rollout, row of an incident"
    )
    details: dict[str, Any] = Field(default_factory=dict)


class Scope(StrEnum):
    """What the bearer of an API key may do."""

    PREDICT = "predict"
    FLAG = "flag"
    REVIEW = "review"
    AUDIT = "audit"
    METRICS = "metrics"
    APPROVE = "approve"
    ADMIN = "admin"


class ApiKey(Record):
    """A key of the HTTP API. Its secret is shown once, when it is made; only a hash of it is kept."""

    table: ClassVar[str] = "api_keys"
    mutable: ClassVar[frozenset[str]] = frozenset({"revoked_at"})

    id: str = Field(description="16 hex characters; part of the key, and the caller's name in predictions")
    created_at: Timestamp
    name: str = Field(description="for people: who uses it")
    organisation: str = Field(description="its bearer sees the objects of this organisation")
    scopes: list[Scope]
    secret_hash: str = Field(repr=False, description="SHA-256 of the whole key; a key is random, so no salt is needed")
    sandbox: bool = Field(default=False, description="its images are never stored, reviewed or trained on")
    default_consent: Consent | None = Field(default=None, description="consent of a request that names none")
    expires_at: Timestamp | None = None
    revoked_at: Timestamp | None = None


class RolloutStage(StrEnum):
    """The stage of a rollout."""

    SHADOW = "shadow"
    CANARY = "canary"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"


class Rollout(Record):
    """A candidate's way to champion, with its evidence. At most one is in progress."""

    table: ClassVar[str] = "rollouts"
    mutable: ClassVar[frozenset[str]] = frozenset({"stage", "percent", "evidence", "ended_at", "why"})
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("stage",),)

    id: str
    created_at: Timestamp
    actor: str
    champion_id: str = Field(description="the model that served when it began")
    candidate_id: str
    stage: RolloutStage
    percent: int = Field(default=0, ge=0, le=100, description="traffic share of the candidate, percent of lesions")
    evidence: dict[str, Any] = Field(
        default_factory=dict, description="per guardrail: number of observations and of events"
    )
    ended_at: Timestamp | None = None
    why: str | None = Field(default=None, description="why it ended, one sentence")
