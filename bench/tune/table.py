"""A table of whole learning curves, on which searches are replayed thousands of times without training.

Every configuration of the table is trained for its whole budget, once. A replayed search takes the score of
(configuration, epoch) from the table where a real one would train, and is charged the epoch. One JSON line per
configuration, so an interrupted table can be continued.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records.datasets import DatasetVersion
from records.errors import DivergedError, IntegrityError
from records.store import Store
from trainers.fitting.epoch_report import EpochReport
from trainers.fitting.training_data import plan_data
from trainers.settings import TrainersSettings
from tuning.planner import Planner
from tuning.search import searched_part
from tuning.space import SearchSpace, with_overrides


@dataclass(frozen=True)
class Row:
    """One configuration with its whole curve.

    Args:
        overrides: of the given settings.
        scores: validation balanced accuracy after each epoch.
        seconds: of each epoch.
    """

    overrides: dict[str, Any]
    scores: tuple[float, ...]
    seconds: tuple[float, ...]


def read_table(path: Path, epochs: int | None = None) -> list[Row]:
    """Read a table.

    Args:
        path: the file.
        epochs: that every row has to have; None takes what the first one has.
    Returns:
        Its rows.
    Raises:
        IntegrityError: a line cannot be read, or has another number of epochs.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found = json.loads(line)
            row = Row(dict(found["overrides"]), tuple(found["scores"]), tuple(found["seconds"]))
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"line {number} of the table {path} is damaged; delete the line") from error
        epochs = epochs or len(row.scores)
        if len(row.scores) != epochs:
            raise IntegrityError(f"line {number} of the table {path} has {len(row.scores)} epochs, not {epochs}")
        rows.append(row)
    return rows


def train_table(
    store: Store,
    dataset: DatasetVersion,
    base: TrainersSettings,
    space: SearchSpace,
    path: Path,
    *,
    configurations: int,
    max_train_images: int | None,
    seed: int = 0,
) -> list[Row]:
    """Train every configuration of a table for its whole budget, or go on with a table.

    Args:
        store: with the images.
        dataset: its train and val splits are read.
        base: the given settings, which are the first configuration; its epochs are the budget.
        space: the others are drawn from it.
        path: the file; a line is added per configuration.
        configurations: how many.
        max_train_images: train on so many at most.
        seed: of the draws.
    Returns:
        The rows; a configuration that diverged scores 0 from there on.
    """
    planner = Planner(space, base, trials=configurations, seed=seed)
    images = plan_data(searched_part(dataset, max_train_images, seed), store.taxonomy)
    data = images.open(store, base.model.frame)
    done = len(read_table(path, base.epochs)) if path.is_file() else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(done, configurations):
        overrides = planner.plan(number).overrides
        scores, seconds = _curve(with_overrides(base, overrides), data, store)
        line = json.dumps({"overrides": overrides, "scores": scores, "seconds": seconds})
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return read_table(path, base.epochs)


def _curve(settings: TrainersSettings, data: Any, store: Store) -> tuple[list[float], list[float]]:
    from trainers.fitting.loop import train

    reports: list[EpochReport] = []

    def keep(report: EpochReport) -> bool:
        reports.append(report)
        return False

    # A run that diverges is recorded as what it is worth: nothing, from that epoch on.
    with contextlib.suppress(DivergedError):
        train(settings, data, store.taxonomy, on_epoch=keep)
    missing = settings.epochs - len(reports)
    scores = [round(report.val_balanced_accuracy, 5) for report in reports] + [0.0] * missing
    return scores, [round(report.seconds, 3) for report in reports] + [0.0] * missing


def best_score(rows: Sequence[Row]) -> float:
    """Return the best score of the table at any epoch."""
    return max(max(row.scores) for row in rows)
