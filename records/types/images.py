"""Images, the groups that keep them on one split, and the labels that were imported with them."""

from enum import StrEnum
from typing import ClassVar

from pydantic import Field

from records.types.base import Record, Timestamp


class Consent(StrEnum):
    """What the person in the image agreed to; each level includes the ones before."""

    NONE = "none"
    REVIEW = "review"
    TRAINING = "training"
    DISPLAY = "display"

    @property
    def allows_training(self) -> bool:
        """Whether models may be trained on the image."""
        return self in TRAINABLE


TRAINABLE = (Consent.TRAINING, Consent.DISPLAY)
"""Levels that allow training; `display` also lets users of the service see the image beside others like it."""


class Split(StrEnum):
    """The split that a group was drawn to, once."""

    TRAIN = "train"
    VAL = "val"
    CALIBRATION = "calibration"
    GATE = "gate"
    TEST = "test"


class Confirmation(StrEnum):
    """How a diagnosis was established, best first; the order is the label rank."""

    HISTOPATHOLOGY = "histopathology"
    CONFOCAL = "confocal"
    FOLLOW_UP = "follow_up"
    CONSENSUS = "consensus"
    SINGLE_READER = "single_reader"
    FLAG = "flag"


LABEL_RANK: dict[Confirmation, int] = {
    Confirmation.HISTOPATHOLOGY: 0,
    Confirmation.CONFOCAL: 1,
    Confirmation.FOLLOW_UP: 1,
    Confirmation.CONSENSUS: 2,
    Confirmation.SINGLE_READER: 3,
    Confirmation.FLAG: 4,
}
"""Rank of a label by its confirmation; a label never replaces one with a smaller rank."""


class Image(Record):
    """A stored image. Its id is the SHA-256 of the stored bytes."""

    table: ClassVar[str] = "images"
    mutable: ClassVar[frozenset[str]] = frozenset(
        {"group_id", "erased_at", "expired_at", "consent", "consent_lowered_at"}
    )
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("group_id",),
        ("source_id",),
        ("lesion_id",),
        ("provenance", "created_at"),
    )

    id: str = Field(min_length=64, max_length=64, description="SHA-256 of the stored bytes, hex")
    source_id: str | None = Field(default=None, description="name at the source, for example ISIC_0024306")
    uri: str = Field(description="where the bytes are: a blob URI, or a file if imported in place")
    format: str = Field(description="jpeg, png or webp, by content")
    width_px: int = Field(gt=0)
    height_px: int = Field(gt=0)
    lesion_id: str | None = None
    patient_hash: str | None = Field(default=None, description="salted hash; the id itself is never stored")
    age_years: float | None = Field(default=None, ge=0, le=130)
    sex: str | None = None
    localization: str | None = Field(default=None, description="body site of the lesion")
    device: str | None = None
    site: str | None = Field(default=None, description="institution that took the image")
    acquired_at: Timestamp | None = None
    provenance: str = Field(description="import:<id>, served, or generated")
    consent: Consent = Consent.NONE
    perceptual_hash: str | None = Field(default=None, description="64-bit pHash, 16 hex characters")
    group_id: str | None = Field(default=None, description="set once, when the image is grouped")
    consent_lowered_at: Timestamp | None = Field(
        default=None, description="when a person took consent back; since then no request raises it again"
    )
    created_at: Timestamp
    erased_at: Timestamp | None = Field(
        default=None, description="when its bytes were deleted; since then it is a tombstone"
    )
    expired_at: Timestamp | None = Field(
        default=None, description="set with erased_at by retention; such an image may be added again"
    )

    @property
    def is_erased_for_good(self) -> bool:
        """Whether it was erased on request, so that it may not be added again."""
        return self.erased_at is not None and self.expired_at is None


class Group(Record):
    """Images connected by lesion, patient or near-duplicate; the unit that a split draws."""

    table: ClassVar[str] = "groups"
    mutable: ClassVar[frozenset[str]] = frozenset({"split", "drawn_by", "drawn_at", "merged_into"})

    id: str = Field(description="first 16 hex characters of the hash of its first image's id")
    split: Split | None = Field(default=None, description="empty until the first label arrives")
    drawn_by: str | None = Field(default=None, description="given | stratified | hash | doubt: what drew the split")
    drawn_at: Timestamp | None = None
    merged_into: str | None = Field(default=None, description="the group that took this one in, if any")
    created_at: Timestamp


class SourceLabel(Record):
    """A diagnosis that came with an imported table or as an outcome, not from an annotator's task."""

    table: ClassVar[str] = "source_labels"
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("image_id",),)
    unique: ClassVar[tuple[tuple[str, ...], ...]] = (("image_id", "source", "label", "confirmation"),)

    id: str
    image_id: str
    label: str = Field(description="class code")
    confirmation: Confirmation
    source: str = Field(description="import:<id>, correction:<number>:<import id> or outcome:<id>")
    created_at: Timestamp


class Quarantined(Record):
    """A row or file that an import could not use, and why."""

    table: ClassVar[str] = "quarantine"
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = (("import_id",),)

    id: str
    import_id: str
    source_id: str = Field(description="the image's name in the table")
    code: str = Field(description="missing | unreadable | unknown_class | label_conflict | links_two_splits")
    reason: str = Field(description="one sentence")
    created_at: Timestamp


class ManifestRow(Record):
    """One labelled image in a dataset version."""

    table: ClassVar[str] = "manifest"
    key: ClassVar[str] = "image_id"

    image_id: str
    group_id: str
    split: Split
    label: str = Field(description="class code")
    label_source: str = Field(description="as of SourceLabel, or annotator:<annotation key>")
    label_rank: int = Field(ge=0, description="see LABEL_RANK; smaller is stronger")
    round: int = Field(ge=0, description="0 for imported labels, else the round that brought the label in")
