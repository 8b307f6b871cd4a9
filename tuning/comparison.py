"""Our figures beside the dissertation's, row by row, and why they differ.

In: header and trials of a search that tried the dissertation's rows. Out: a Comparison. It says what was
measured and what was published; it does not say that one is better, since they are not of the same images.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tuning.experiments import EXPERIMENTS, WHY_DIFFERENT, Experiment
from tuning.trials import SearchHeader, TrialResult

Interval = tuple[float, float]


class ComparedRow(BaseModel):
    """One row of one table; figures are empty until its trial had all its epochs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str
    name: str
    trial: int | None = Field(description="number of its trial; empty if it was not tried")
    model: str
    side_px: int
    epochs: int
    max_train_images: int | None = Field(description="empty if it trained on all")
    best_epoch: int | None
    balanced_accuracy: float | None
    balanced_accuracy_ci: Interval | None
    accuracy: float | None
    accuracy_ci: Interval | None
    macro_f1: float | None
    macro_f1_ci: Interval | None
    published: float | None = Field(description="by the dissertation, on its own test images")
    metric: str = Field(description="of the published figure")
    difference: float | None = Field(description="ours less the published one, in its metric")
    failure: str | None = Field(description="why its trial failed")


class Comparison(BaseModel):
    """All rows, and what keeps the two splits from being comparable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[ComparedRow, ...]
    groups: int | None = Field(description="lesions that the intervals rest on")
    why_different: tuple[str, ...]


def compare(header: SearchHeader, trials: Sequence[TrialResult]) -> Comparison | None:
    """Set the trials of a search beside what was published.

    Args:
        header: of the search.
        trials: of the search, in any order.
    Returns:
        The rows, table after table; None for a search that tried none of them.
    """
    rows = EXPERIMENTS.get(header.experiments, ())
    if not rows:
        return None
    tables = list(dict.fromkeys(table for row in rows for table in row.tables))
    figures = [trial.figures for trial in trials if trial.figures is not None]
    return Comparison(
        rows=tuple(_row(table, row, header, trials) for table in tables for row in rows if table in row.tables),
        groups=figures[0].groups if figures else None,
        why_different=WHY_DIFFERENT,
    )


def _row(table: str, row: Experiment, header: SearchHeader, trials: Sequence[TrialResult]) -> ComparedRow:
    settings: dict[str, Any] = header.base | dict(row.overrides)
    trial = next((trial for trial in trials if header.base | trial.overrides == settings), None)
    measured: dict[str, Any] = dict.fromkeys(
        f"{name}{end}" for name in ("balanced_accuracy", "accuracy", "macro_f1") for end in ("", "_ci")
    )
    figures = None if trial is None else trial.figures
    if figures is not None:
        measured = figures.model_dump(exclude={"epoch", "groups"})
    ours = measured[row.metric]
    return ComparedRow(
        table=table,
        name=row.name,
        trial=None if trial is None else trial.number,
        model=settings["model.name"],
        side_px=settings["model.side_px"],
        epochs=min(settings["epochs"], header.trial_epochs),
        max_train_images=settings["max_train_images"],
        best_epoch=None if figures is None else figures.epoch,
        **measured,
        published=row.published,
        metric=row.metric,
        difference=None if ours is None or row.published is None else ours - row.published,
        failure=None if trial is None else trial.error,
    )
