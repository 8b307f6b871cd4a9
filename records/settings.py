"""The settings of the records room, and the base that every room's settings share."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RoomSettings(BaseModel):
    """Base of a room's settings: frozen, closed, every field documented with unit and range."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class RecordsSettings(RoomSettings):
    """Where things are kept."""

    home: Path = Field(default=Path(".relook"), description="the one folder everything lives under; made absolute once")
    database: str | None = Field(
        default=None,
        description="SQLAlchemy URL, sqlite:///FILE or postgresql+psycopg://...; default: ledger.db in home",
        repr=False,
    )
    blobs: str | None = Field(default=None, description="fsspec URL of the blob store; default: blobs/ in home")
    taxonomy: str = Field(default="ham10000", description="a built-in taxonomy's name, or the path of a YAML file")
    split_salt: str = Field(
        default="relook", min_length=1, description="salt of the hash that draws splits; another salt is another split"
    )
    durability: Literal["normal", "full"] = Field(
        default="normal",
        description="SQLite synchronous mode: normal survives kill -9, full survives a power cut too (about 7x slower)",
    )
    busy_timeout_s: float = Field(
        default=30.0, gt=0, le=600, description="how long a writer waits for another, seconds"
    )
    keep_images_days: int | None = Field(
        default=None,
        ge=1,
        le=36_500,
        description="for `relook retention`: served images that nobody needs go so long after they were last sent; "
        "null keeps them, days",
    )
    keep_predictions_days: int | None = Field(
        default=None,
        ge=1,
        le=36_500,
        description="for `relook retention`: answers that nothing refers to go so long after they were given, and with "
        "them what the caller said; at least keep_images_days; null keeps them, days",
    )

    @model_validator(mode="after")
    def _answers_outlast_images(self) -> Self:
        images, predictions = self.keep_images_days, self.keep_predictions_days
        # How long an image was not sent is read from its answers.
        if images is not None and predictions is not None and predictions < images:
            raise ValueError(
                f"keep_predictions_days is {predictions} and keep_images_days {images}; an answer has to be kept "
                "at least as long as its image"
            )
        return self

    def apart(self, home: Path) -> "RecordsSettings":
        """Return settings of a home of its own, which neither sees nor changes what these keep, wherever it is."""
        return self.model_copy(update={"home": home, "blobs": None, "database": None})
