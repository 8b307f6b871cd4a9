"""What a run reports after every epoch, how that is shown as progress, and the file that keeps it."""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field
from rich.progress import Progress

from records.errors import UnavailableError
from trainers.settings import BestBy

_EPOCH = re.compile(r'\{"epoch":(\d+),.*\}$')

CLOCKS = frozenset({"images_per_s", "seconds", "validation_seconds"})
"""Fields of a report that tell time, so no two runs have them in common."""


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
    val_macro_auc: float | None = Field(
        default=None, ge=0, le=1, description="mean one-against-rest AUC of the classes that val has"
    )
    val_even_loss: float | None = Field(
        default=None, allow_inf_nan=False, description="cross-entropy on val at equal weights of the classes"
    )
    learning_rate: float = Field(ge=0, description="at the end of the epoch")
    images_per_s: float = Field(ge=0, description="training images per second, over all workers, without validation")
    seconds: float = Field(ge=0, description="of the epoch, validation included")
    validation_seconds: float = Field(
        default=0.0, ge=0, description="of the epoch, spent on batch norm's statistics and on val"
    )


def best_epoch_of(reports: list[EpochReport], by: BestBy = "balanced_accuracy") -> int:
    """Return the epoch that validated best, 1-based; among equal figures that of the lowest loss."""

    def rank(report: EpochReport) -> tuple[float, float, int]:
        figure = {
            "balanced_accuracy": report.val_balanced_accuracy,
            "macro_auc": report.val_macro_auc,
            "even_loss": None if report.val_even_loss is None else -report.val_even_loss,
            "last": float(report.epoch),
        }[by]
        # Val may have classes without an AUC, in every epoch; the loss decides then.
        return (-math.inf if figure is None else figure, -report.val_loss, -report.epoch)

    return max(reports, key=rank).epoch


OnEpoch = Callable[[EpochReport], bool | None]
"""Told of every epoch; True stops the run."""
OnStep = Callable[[int, int, int], object]
"""Told of steps: the number of epochs that are done, and of the next epoch the steps done and all its steps."""


class EpochBar:
    """An `OnEpoch` that shows a training as one task of a progress: a bar, or a line per epoch and per minute."""

    def __init__(
        self,
        progress: Progress,
        epochs: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        what: str = "train",
        split: str = "val",
    ) -> None:
        self._progress = progress
        self._epochs = epochs
        self._split = split
        self._clock = clock
        self._first: tuple[float, float] | None = None
        self._seconds: list[float] = []
        self._task = progress.add_task(what, total=epochs, step="epoch")

    def __call__(self, report: EpochReport) -> bool:
        """Show an epoch; never stops the run."""
        self._seconds.append(report.seconds)
        # From the epochs' own seconds: a resumed run starts at a later epoch, and decoding comes before the first.
        left_s = self._seconds_of_epoch() * (self._epochs - report.epoch)
        detail = epoch_text(report, self._split)
        self._progress.update(self._task, completed=report.epoch, within="", detail=detail, left_s=left_s)
        return False

    def on_step(self, epochs_done: int, step: int, steps: int) -> None:
        """Show a position within an epoch; an `OnStep`."""
        # One more part than steps: after the last step, validation is left.
        done, now_s = epochs_done + step / (steps + 1), self._clock()
        self._first = self._first or (now_s, done)
        left_s = None
        if self._seconds:
            left_s = self._seconds_of_epoch() * (self._epochs - done)
        elif done > self._first[1]:
            left_s = (now_s - self._first[0]) / (done - self._first[1]) * (self._epochs - done)
        self._progress.update(self._task, completed=done, within=f"step {step}/{steps}", left_s=left_s)

    def _seconds_of_epoch(self) -> float:
        return sum(self._seconds) / len(self._seconds)


def epoch_text(report: EpochReport, split: str = "val") -> str:
    """Return an epoch's loss, validation score and rate as one line."""
    return (
        f"loss {report.train_loss:.3f}, {split} balanced accuracy {report.val_balanced_accuracy:.3f}, "
        f"{report.images_per_s:.0f} images/s"
    )


class EpochFiles(Protocol):
    """Files of another format that keep the same epochs."""

    def epoch(self, report: EpochReport) -> None:
        """Add an epoch."""

    def complete(self, reports: list[EpochReport]) -> None:
        """Add the epochs that are missing."""


class MetricsLog:
    """Writes `metrics.jsonl`, a line per epoch, and event files for TensorBoard, and passes every report on."""

    def __init__(self, path: Path, on_epoch: OnEpoch | None, events: EpochFiles) -> None:
        self._path = path
        self._on_epoch = on_epoch
        self._events = events

    def __call__(self, report: EpochReport) -> bool:
        """Append a line; return whether training shall stop."""
        self._put("a", [report])
        self._events.epoch(report)
        return bool(self._on_epoch(report)) if self._on_epoch is not None else False

    def complete(self, reports: list[EpochReport]) -> None:
        """Rewrite the file with all lines."""
        self._put("w", reports)
        self._events.complete(reports)

    def _put(self, mode: str, reports: list[EpochReport]) -> None:
        try:
            with self._path.open(mode, encoding="utf-8") as file:
                file.writelines(report.model_dump_json() + "\n" for report in reports)
        except OSError as error:
            raise UnavailableError(
                f"{self._path} cannot be written ({error.strerror}); see that the folder is there and has space"
            ) from error


def epochs_in(path: Path) -> list[int]:
    """Return the epochs that an earlier process wrote; a line that a kill cut off is the last one."""
    if not path.is_file():
        return []
    return [int(found[1]) for line in path.read_text().splitlines() if (found := _EPOCH.match(line))]
