"""What a run says after every epoch."""

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field


class EpochReport(BaseModel):
    """One epoch, as it is shown, written to `metrics.jsonl` and judged by a search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = Field(ge=1, description="1 for the first")
    train_loss: float = Field(allow_inf_nan=False, description="mean over the epoch's steps, without L1 and L2")
    val_loss: float = Field(allow_inf_nan=False, description="cross-entropy on val, before calibration")
    val_balanced_accuracy: float = Field(ge=0, le=1, description="mean sensitivity of the classes that val has")
    val_accuracy: float = Field(ge=0, le=1)
    key_class_sensitivity: float | None = Field(
        description="of the taxonomy's key class, by the most probable class; empty if there is none on val"
    )
    learning_rate: float = Field(ge=0, description="at the end of the epoch")
    images_per_s: float = Field(ge=0, description="training images per second, over all workers, without validation")
    seconds: float = Field(ge=0, description="of the epoch, validation included")
    validation_seconds: float = Field(
        default=0.0, ge=0, description="of the epoch, spent on batch norm's statistics and on val"
    )


OnEpoch = Callable[[EpochReport], bool | None]
"""Told of every epoch; True stops the run."""
