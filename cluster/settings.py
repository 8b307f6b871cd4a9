"""The whole settings of a run: one frozen model per room, composed into `Settings`.

It holds `Settings` and the models of this room (cluster, round, gate, demo): names, units, ranges and defaults.
Where values come from (preset, file, environment, `--set`) is in `cluster.sources`.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from images.settings import ImagesSettings
from labeling.settings import LabelingSettings
from records.ids import hash_of
from records.redaction import without_secrets
from records.settings import RecordsSettings, RoomSettings
from serving.settings import ServingSettings
from trainers.settings import TrainersSettings
from trainers.tracking.settings import TrackingSettings
from tuning.settings import TuningSettings

# These settings say where and how long data is kept, on what a round runs and when it starts. They do not change its
# results, so `settings_hash` leaves them out.
_PLACES: dict[str, bool | set[str]] = {
    "preset": True,
    "records": {
        *("home", "database", "blobs", "keep_images_days", "keep_predictions_days", "trace_endpoint", "trace_share")
    },
    "serving": {"host", "port", "hooks", "tls_certificate", "tls_key"},
    "labeling": {"url", "token", "environment", "port", "webhook_url"},
    "tracking": True,
    "cluster": True,
    "round": {"watch_labels", "watch_days", "watch_poll_s", "notify_url"},
}


class ClusterSettings(RoomSettings):
    """What Ray runs on."""

    ray_address: str | None = Field(
        default=None,
        description="running Ray cluster to join, host:port or auto; default: Ray is started here, per command",
    )
    logical_cpus: int = Field(
        default=4,
        ge=1,
        le=1024,
        description="CPUs that a Ray started here hands out; above the cores of the machine where services mostly wait",
    )
    num_gpus: int | None = Field(
        default=0, ge=0, le=64, description="GPUs that a Ray started here hands out; null = those it finds"
    )
    object_store_mb: int = Field(
        default=300, ge=80, le=1_000_000, description="shared memory of a Ray started here, MB; taken only as it fills"
    )
    temp_dir: Path | None = Field(
        default=None, description="folder of Ray's sockets and logs, at most 40 characters; default: one under /tmp"
    )
    storage: str | None = Field(
        default=None, description="where runs of several nodes meet, a path or s3:// URL; default: runs/ in home"
    )
    worker_logs: bool = Field(default=False, description="print what Ray workers print")
    stop_timeout_s: float = Field(
        default=10.0, gt=0, le=300, description="how long Ray's processes may take to end before a kill, seconds"
    )


class RoundSettings(RoomSettings):
    """What a round does and when it starts."""

    tune: Literal["always", "every_n", "on_drop", "never"] = Field(
        default="always", description="when a round searches anew; otherwise it fits the last winner"
    )
    tune_every: int = Field(default=3, ge=1, description="for tune=every_n: search in every n-th round, rounds")
    tune_drop: float = Field(
        default=0.02,
        gt=0,
        lt=1,
        description="for tune=on_drop: lost validation balanced accuracy that asks for a search",
    )
    approval: Literal["automatic", "person"] = Field(
        default="automatic",
        description="who lets a model that passed the gate serve: the round itself, or the bearer of a key with the "
        "scope approve, another than the round was started with",
    )
    select_budget: int = Field(default=40, ge=0, description="images that a round proposes to the annotators, images")
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of everything random in a round")
    watch_labels: int = Field(
        default=50, ge=1, description="for --watch: new annotator labels that start a round, labels"
    )
    watch_days: float = Field(
        default=7.0, gt=0, le=3650, description="for --watch: time since the last round that starts one, days"
    )
    watch_poll_s: float = Field(
        default=60.0, gt=0, le=86_400, description="for --watch: time between two looks, seconds"
    )
    notify_url: SecretStr | None = Field(
        default=None,
        description="http(s) address that receives how a round ended; only from RELOOK_ROUND__NOTIFY_URL",
    )

    @field_validator("notify_url")
    @classmethod
    def _is_an_address(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("http://", "https://")):
            raise ValueError("it is no address to send to; begin it with https:// or http://")
        return value


class GateSettings(RoomSettings):
    """What a challenger has to show. All figures are on the gate split, resampled by group within class."""

    margin: float = Field(
        default=0.02, ge=0, lt=1, description="balanced accuracy that a challenger may lose at its lower bound, 0 to 1"
    )
    key_class_margin: float = Field(
        default=0.10, ge=0, lt=1, description="key-class sensitivity at matched specificity that it may lose, 0 to 1"
    )
    min_slice_lesions: int = Field(
        default=30,
        ge=1,
        description="key-class lesions from which a slice must hold the key-class margin, too; smaller ones show "
        "their count only, lesions",
    )
    min_specificity: float = Field(
        default=0.30, ge=0, le=1, description="key-class specificity that must come with the sensitivity floor, 0 to 1"
    )
    max_calibration_error: float = Field(
        default=0.15, gt=0, le=1, description="expected calibration error of a challenger, at most, 0 to 1"
    )
    max_random_similarity: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="likeness of its heat maps to those of the same network with random weights, at most, 0 to 1",
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="level of the one-sided bounds, 0.5 to 1")
    bootstrap_resamples: int = Field(default=2000, ge=100, le=100_000, description="bootstrap draws, count")
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of the bootstrap")


class DemoSettings(RoomSettings):
    """What `relook demo` runs."""

    synth_lesions: int = Field(default=700, ge=70, description="lesions to generate when no data are given, count")
    fit_images: int = Field(
        default=60_000,
        ge=1,
        description="training images shown in one fit at most; on more data the demo trains fewer epochs, images",
    )
    withhold_share: float = Field(
        default=0.15, gt=0, lt=0.9, description="share of training groups whose labels only the annotator knows, 0 to 1"
    )
    requests: int = Field(default=240, ge=1, description="images sent to the service, count")
    concurrency: int = Field(default=4, ge=1, le=64, description="requests under way at once, count")
    retry_s: float = Field(
        default=0.0,
        ge=0,
        le=600,
        description="how long a caller repeats a request that fails, with the same Idempotency-Key; 0: every failure "
        "shows, seconds",
    )
    flags: int = Field(default=20, ge=0, description="predictions that the simulated user flags, count")
    tasks: int = Field(default=60, ge=1, description="tasks pushed to Label Studio, at most, count")
    annotator_error_rate: float = Field(
        default=0.05, ge=0, le=1, description="share the simulated annotator gets wrong, 0 to 1"
    )
    cant_tell_rate: float = Field(default=0.05, ge=0, le=1, description="share the annotator cannot tell, 0 to 1")
    seed: int = Field(default=7, ge=0, lt=2**31, description="seed of the generated images, users and annotators")


class Settings(RoomSettings):
    """Everything a command needs to know, in one frozen value that can be sent to any process."""

    preset: str = Field(default="laptop", description="the preset these settings started from")
    records: RecordsSettings = RecordsSettings()
    images: ImagesSettings = ImagesSettings()
    trainers: TrainersSettings = TrainersSettings()
    tuning: TuningSettings = TuningSettings()
    serving: ServingSettings = ServingSettings()
    labeling: LabelingSettings = LabelingSettings()
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()
    round: RoundSettings = RoundSettings()
    gate: GateSettings = GateSettings()
    demo: DemoSettings = DemoSettings()

    @model_validator(mode="after")
    def _clinic_keeps_watching(self) -> Self:
        if self.preset == "clinical" and self.serving.audit_share == 0:
            raise ValueError("serving.audit_share may not be 0 with preset clinical; live figures rest on it alone")
        return self


def public_dump(settings: Settings) -> dict[str, Any]:
    """Return the settings as JSON values, secrets and passwords in URLs masked, for manifests and reports."""
    dumped = settings.model_dump(mode="json")
    masked: dict[str, Any] = _masked(dumped)
    return masked


def settings_hash(settings: Settings) -> str:
    """Hash what decides a result: everything except secrets and places.

    Args:
        settings: composed.
    Returns:
        64 hex characters; equal for the same work on another machine, home or cluster.
    """
    return hash_of(_masked(settings.model_dump(mode="json", exclude=_PLACES)))


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value
