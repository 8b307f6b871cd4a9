"""The report of a search: who led, what failed and why, and the command that repeats the winner.

In: the journal of a run. Out: a SearchReport, as JSON or drawn by `tuning.live`. It says nothing
about which optimizer or augmentation is better in general: trials that were favoured by successive
halving cannot show that.
"""

import shlex
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from records.errors import UnknownIdError
from trainers.settings import TrainersSettings
from tuning.journal import FILE_NAME, read_journal
from tuning.live import ranked
from tuning.log import best_of
from tuning.trials import SearchHeader, TrialResult, TrialState

RUN_PREFIX = "tune-"


class SearchReport(BaseModel):
    """What a search found, best first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(description="name of the run's folder")
    header: SearchHeader
    complete: bool = Field(description="whether every trial was settled")
    best: dict[str, Any] | None = Field(description="number, score, overrides of the winner")
    command: str | None = Field(description="trains with the winner's settings")
    leaderboard: tuple[dict[str, Any], ...] = Field(description="the trials, best score first")
    failures: tuple[dict[str, Any], ...] = Field(description="trial number, kind and reason")
    epochs_trained: int = Field(ge=0)
    epochs_budget: int = Field(ge=1, description="if no trial had been cut off")
    start_seconds_median: float | None = Field(description="start of a trial, the first of each process left out")


def report_on(run_dir: Path) -> SearchReport:
    """Build the report of a run from its journal.

    Args:
        run_dir: the run's folder.
    Returns:
        The report; of a search that is still running or was killed, as far as it came.
    Raises:
        UnknownIdError: the folder holds no search.
        IntegrityError: the journal is damaged.
    """
    header, trials = read_journal(run_dir)
    best = best_of(trials)
    return SearchReport(
        run=run_dir.name,
        header=header,
        complete=len(trials) >= header.trials and all(trial.settled for trial in trials),
        best=None if best is None else {"number": best.number, "score": best.score, "overrides": best.overrides},
        command=None if best is None else _command(header, best),
        leaderboard=tuple(_row(trial) for trial in ranked(trials)),
        failures=tuple(
            {"number": trial.number, "kind": trial.error_kind, "reason": trial.error}
            for trial in trials
            if trial.state in (TrialState.FAILED, TrialState.LOST)
        ),
        epochs_trained=sum(trial.epochs for trial in trials),
        epochs_budget=header.trials * header.trial_epochs,
        start_seconds_median=_later_starts_median(trials),
    )


def find_run(runs: Path, name: str | None = None) -> Path:
    """Return the folder of a search.

    Args:
        runs: the runs folder of the home.
        name: of the run, or the path of any folder that holds a search; None takes the one started last.
    Returns:
        The folder.
    Raises:
        UnknownIdError: there is no such search.
    """
    if name is not None:
        for candidate in (runs / name, Path(name)):
            if (candidate / FILE_NAME).is_file():
                return candidate
        raise UnknownIdError(f"no search is named {name!r}; the folders of searches are in {runs}")
    # Run names carry their creation time, so the last name is the last search.
    found = sorted(path.parent for path in runs.glob(f"{RUN_PREFIX}*/{FILE_NAME}"))
    if not found:
        raise UnknownIdError(f"{runs} holds no search yet; `relook tune` starts one")
    return found[-1]


def _row(trial: TrialResult) -> dict[str, Any]:
    return {"score": trial.score, "epochs": trial.epochs, **trial.model_dump(mode="json")}


def _command(header: SearchHeader, best: TrialResult) -> str:
    """Name every setting of the winner that is not the trainers' own default."""
    defaults = TrainersSettings().model_dump(mode="json")
    winner = header.base | best.overrides
    parts = ["relook", "train", "--data", header.dataset_id[:12]]
    for name, value in winner.items():
        if value != defaults.get(name):
            parts += ["--set", f"trainers.{name}={value}"]
    return shlex.join(parts)


def _later_starts_median(trials: list[TrialResult]) -> float | None:
    starts = [trial.start_seconds for trial in trials if trial.start_seconds is not None and not trial.cold_start]
    return median(starts) if starts else None
