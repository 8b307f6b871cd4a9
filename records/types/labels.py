"""Annotations from Label Studio, and the consensus of several."""

from enum import StrEnum
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from records.types.base import Record, Timestamp
from records.types.images import Confirmation


class AnnotationKind(StrEnum):
    """What kind of choice an annotator made."""

    CLASS = "class"
    CANT_TELL = "cant_tell"
    OTHER = "other"


class Annotation(Record):
    """One revision of one annotation. Edits add a row; deletions add a tombstone."""

    table: ClassVar[str] = "annotations"
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("image_id",), ("review_item_id",), ("created_at",))
    unique: ClassVar[tuple[tuple[str, ...], ...]] = (("server", "annotation_id", "revision"),)

    id: str
    created_at: Timestamp = Field(description="when Relook read it")
    review_item_id: str
    image_id: str
    kind: AnnotationKind
    label: str | None = Field(default=None, description="class code if `kind` is class")
    other_text: str | None = Field(default=None, description="what the annotator wrote if no class fits")
    image_quality: str | None = Field(default=None, description="good | usable | unusable")
    comment: str | None = None
    annotator: str
    annotated_at: Timestamp
    lead_time_s: float | None = Field(default=None, ge=0)
    blind: bool = Field(default=False, description="true if the prediction was hidden from the annotator")
    outline: str | None = Field(
        default=None, description="the lesion as it was painted: a grey PNG of the whole image in base64"
    )
    gold: bool = Field(
        default=False, description="true for a gold task: it measures the annotator, and is no label of the image"
    )
    server: str = Field(description="base URL of the Label Studio that holds it")
    project_id: int
    task_id: int
    annotation_id: int
    revision: str = Field(description="hash of the annotation's result and update time")
    deleted: bool = Field(default=False, description="true for a tombstone")


class ResolvedLabel(BaseModel):
    """The consensus of the annotations of one image, made by labeling and used by dataset versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_id: str
    label: str | None = Field(description="class code; empty if no annotator could tell, or no class fits")
    confirmation: Confirmation = Field(description="single_reader, or consensus of two and more")
    confidence: float | None = Field(default=None, ge=0, le=1, description="share or probability behind the label")
    method: str = Field(default="majority", description="majority, dawid_skene or adjudication")
    annotators: list[str] = Field(default_factory=list)
    annotation_ids: list[str] = Field(default_factory=list, description="the rows that were counted")
    from_audit_sample: bool = Field(
        default=False, description="true only if every review item of the image came from the random audit sample"
    )
