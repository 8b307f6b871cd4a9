"""Settings of labeling: the Label Studio to use, the size of tasks, who reads blind, and when to poll."""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from records.settings import RoomSettings


class LabelingSettings(RoomSettings):
    """Which Label Studio is used, and how review items reach its annotators."""

    url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="base URL of a Label Studio that runs elsewhere; default: the local one of `relook label up`",
    )
    token: SecretStr | None = Field(
        default=None,
        description="its access token (personal or legacy); set RELOOK_LABELING__TOKEN, never a config file",
    )
    environment: Path | None = Field(
        default=None,
        description="folder of Label Studio's own virtual environment; default: label-studio/ beside this program's",
    )
    port: int = Field(default=8090, ge=0, le=65535, description="port of the local Label Studio; 0 takes a free one")
    start_timeout_s: float = Field(
        default=180.0, gt=0, le=3600, description="how long a local Label Studio may take to come up, seconds"
    )
    request_timeout_s: float = Field(
        default=60.0, gt=0, le=600, description="how long one call to Label Studio may take, seconds"
    )
    webhook_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^/]+/?$",
        description="address under which Label Studio reaches `relook serve`, so that annotations are read at once; "
        "default: none, annotations are read at the next poll",
    )
    project_title: str = Field(
        default="Relook review", min_length=3, max_length=50, description="title of the project, 3 to 50 characters"
    )
    image_side_px: int = Field(
        default=512, ge=64, le=512, description="longer side of the images embedded in a task, pixels"
    )
    jpeg_quality: int = Field(default=88, ge=50, le=100, description="quality of embedded images, 50 to 100")
    blind_share: float = Field(
        default=0.1, ge=0, le=1, description="share of review items that are read without the prediction, 0 to 1"
    )
    cases_shown: int = Field(
        default=3,
        ge=0,
        le=5,
        description="nearest confirmed cases in a task that is not blind, if its model has some that may be displayed; "
        "0 shows none",
    )
    gold_share: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="share of blind tasks that ask about a training image with a confirmed diagnosis, to measure "
        "readers, 0 to 0.5",
    )
    readers: tuple[str, ...] = Field(
        default=(), description="e-mail addresses of the blind readers, each with a project of their own"
    )
    reads_per_item: int = Field(
        default=1, ge=1, le=9, description="reads of an urgent or flagged review item, all but one blind, 1 to 9"
    )
    outline: bool = Field(
        default=False,
        description="whether annotators may paint the outline of the lesion; on once somebody has painted one",
    )
    sitting_tasks: int = Field(
        default=0,
        ge=0,
        le=500,
        description="tasks of a sitting: so many are sent to a reader of labeling.readers at a time, and the next ones "
        "after all are annotated and a break; 0 sends all",
    )
    sitting_break_min: float = Field(
        default=10.0, ge=0, le=1440, description="break between two sittings of a reader, minutes"
    )
    consensus: Literal["majority", "dawid_skene"] = Field(
        default="majority", description="how several annotations of one image become a label"
    )
    adjudicate_below: float = Field(
        default=0.67, gt=0, le=1, description="share of agreeing annotators below which one more decides, 0 to 1"
    )
    prevalence: Literal["equal", "natural"] = Field(
        default="equal",
        description="class shares at which acquisition rules read probabilities: equal where the aim is balanced "
        "accuracy, natural (as calibrated) where it is accuracy in the population; rare_margin always takes equal",
    )
    push_batch: int = Field(default=100, ge=1, le=1000, description="tasks in one import")
    imports_at_once: int = Field(
        default=1,
        ge=1,
        le=8,
        description="imports in flight, 1 to 8; more than 1 only for a Label Studio on PostgreSQL, since one on SQLite "
        "pauses for seconds when two imports meet",
    )
    poll_every_s: float = Field(
        default=15.0, ge=1, le=3600, description="pause of `relook label sync --watch` between two polls, seconds"
    )
