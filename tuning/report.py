"""The report of a search: who led and how surely, what each choice did, what failed and why, what it cost.

In: the journal of a run. Out: a SearchReport, as JSON, in a terminal (`tuning.live`), or as one HTML page that loads
nothing from a network. Statements about choices rest on balanced trials only (`tuning.effects`).
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from records.durable import write_file
from records.errors import RefusedError, UnknownIdError
from trainers.settings import TrainersSettings
from tuning.confirm import verdict_on
from tuning.effects import Effects, effects_of, importance_of
from tuning.experiments import Comparison, compare
from tuning.journal import FILE_NAME, read_past
from tuning.live import describe, ranked
from tuning.log import best_of
from tuning.trials import Decision, GenerationStep, SearchHeader, TrialResult, TrialState, Verdict

RUN_PREFIX = "tune-"
LEAK_FILE = "leak.json"


class SearchReport(BaseModel):
    """What a search found, best first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(description="name of the run's folder")
    header: SearchHeader
    complete: bool = Field(description="whether every trial was settled")
    best: dict[str, Any] | None = Field(description="number, score, overrides of the winner")
    verdict: Verdict | None = Field(description="what fresh seeds say; empty if nothing was confirmed")
    command: str | None = Field(description="trains with the winner's settings")
    leaderboard: tuple[dict[str, Any], ...] = Field(description="the trials, best score first")
    effects: Effects
    comparison: Comparison | None = Field(description="beside published figures; empty if no such rows were tried")
    leak: dict[str, Any] | None = Field(
        default=None, description="the winner on honest and leaky splits; empty if no mistake was made on purpose"
    )
    importance: dict[str, float] | None = Field(description="share of each setting; empty with too few trials")
    rungs: tuple[dict[str, Any], ...] = Field(description="rung, trials that came, went on, were cut off, last cutoff")
    exploits: tuple[GenerationStep, ...] = Field(
        description="of a population: steps that took over another trial's weights"
    )
    failures: tuple[dict[str, Any], ...] = Field(description="trial number, kind and reason")
    epochs_trained: int = Field(ge=0)
    epochs_budget: int = Field(ge=1, description="if no trial had been cut off")
    confirmation_epochs: int = Field(ge=0, description="epochs of the fresh seeds")
    compute_seconds: float = Field(ge=0, description="in epochs of trials and confirmations, over all processes")
    start_seconds_median: float | None = Field(description="start of a trial, the first of each process left out")


def report_on(run_dir: Path) -> SearchReport:
    """Build the report of a run from its journal.

    Returns the report; of a search that is still running or was killed, as far as it came.
    Raises UnknownIdError: the folder holds no search.
    Raises IntegrityError: the journal is damaged.
    """
    past = read_past(run_dir)
    header = past.header
    trials = [trial for trial in past.trials if not trial.confirms]
    leader = best_of(trials)
    verdict = verdict_on(leader, past.trials) if leader is not None else None
    best = next((trial for trial in trials if verdict and trial.number == verdict.winner), leader)
    return SearchReport(
        run=run_dir.name,
        header=header,
        complete=len(trials) >= header.trials and all(trial.settled for trial in past.trials),
        best=None if best is None else {"number": best.number, "score": best.score, "overrides": best.overrides},
        verdict=verdict,
        command=None if best is None else _command(header, best),
        leaderboard=tuple(_row(trial, verdict) for trial in ranked(trials)),
        effects=effects_of(header, trials),
        comparison=compare(header, trials),
        leak=_leak(run_dir),
        importance=importance_of(header, trials),
        rungs=_rungs([d for d in past.decisions if d.number < header.trials]),
        exploits=tuple(step for step in past.generations if step.exploits),
        failures=tuple(
            {"number": trial.number, "kind": trial.error_kind, "reason": trial.error}
            for trial in past.trials
            if trial.state in (TrialState.FAILED, TrialState.LOST)
        ),
        epochs_trained=sum(trial.epochs for trial in trials),
        epochs_budget=header.trials * header.trial_epochs,
        confirmation_epochs=sum(trial.epochs for trial in past.trials if trial.confirms),
        compute_seconds=sum(sum(trial.epoch_seconds) for trial in past.trials),
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


def find_resumable(runs: Path, name: str | None = None) -> Path:
    """Return the folder of the search to resume: the one that is named, the unfinished one, else the last one.

    The last one is found so that it can be extended by trials. Without a name, RefusedError lists several unfinished
    searches; UnknownIdError says that there is none at all.
    """
    if name is not None:
        return find_run(runs, name)
    last = find_run(runs)
    found = sorted(path.parent for path in runs.glob(f"{RUN_PREFIX}*/{FILE_NAME}"))
    unfinished = [folder for folder in found if not report_on(folder).complete]
    if len(unfinished) > 1:
        names = ", ".join(folder.name for folder in unfinished)
        raise RefusedError(f"{len(unfinished)} searches are unfinished ({names}); name one with --run")
    return unfinished[0] if unfinished else last


def _row(trial: TrialResult, verdict: Verdict | None) -> dict[str, Any]:
    """One line of the leaderboard, with the interval over fresh seeds where there is one."""
    fresh = None
    if verdict is not None:
        fresh = next(
            (found for found in (verdict.winner_confirmed, verdict.given_confirmed) if found.number == trial.number),
            None,
        )
    confirmed = None if fresh is None else fresh.model_dump(mode="json", exclude={"number"})
    return {
        "score": trial.score,
        "epochs": trial.epochs,
        "confirmed": confirmed,
        **trial.model_dump(mode="json"),
    }


def _rungs(decisions: Sequence[Decision]) -> tuple[dict[str, Any], ...]:
    found: dict[int, list[Decision]] = {}
    for decision in decisions:
        if decision.rung is not None:
            found.setdefault(decision.rung, []).append(decision)
    return tuple(
        {
            "rung": rung,
            "trials": len(made),
            "went_on": sum(decision.goes_on for decision in made),
            "cut_off": sum(not decision.goes_on for decision in made),
            "last_cutoff": made[-1].cutoff,
        }
        for rung, made in sorted(found.items())
    )


def _command(header: SearchHeader, best: TrialResult) -> str:
    """Name every setting of the winner that is not the trainers' own default."""
    defaults = TrainersSettings().flat()
    winner = header.base | best.overrides
    parts = ["relook", "train", "--data", header.dataset_id[:12]]
    for name, value in winner.items():
        if value != defaults.get(name):
            parts += ["--set", f"trainers.{name}={value}"]
    return shlex.join(parts)


def _later_starts_median(trials: list[TrialResult]) -> float | None:
    starts = [trial.start_seconds for trial in trials if trial.start_seconds is not None and not trial.cold_start]
    return median(starts) if starts else None


TEMPLATE = Path(__file__).with_name("page.html")
WIDTH, HEIGHT, LEFT, BOTTOM = 720, 260, 44, 28


def _leak(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / LEAK_FILE
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found


def write_report(report: SearchReport, folder: Path) -> Path:
    """Write the page and the JSON of a report.

    Raises UnavailableError: the folder cannot be written.
    """
    page = folder / "report.html"
    # A report can be written again, so it does not wait for the disk.
    write_file(page, render(report), sync=False)
    write_file(folder / "report.json", report.model_dump_json(indent=2) + "\n", sync=False)
    return page


def render(report: SearchReport) -> str:
    """Return the page; everything that comes from settings or errors is escaped."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"points": _points, "score": _score, "described": describe, "span": _span}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, curves=_curves(report), bars=_bars(report), size=(WIDTH, HEIGHT))


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _span(row: Any, unit: str = "points") -> str:
    low, high = (row["low"], row["high"]) if isinstance(row, dict) else (row.low, row.high)
    if low is None or high is None:
        return "-"
    show = _points if unit == "points" else _score
    return f"{show(low)} to {show(high)}"


def _curves(report: SearchReport) -> dict[str, Any]:
    """Return the learning curves as SVG points, the winner marked, with ticks of both axes."""
    rows = [row for row in report.leaderboard if row["scores"]]
    if not rows:
        return {"lines": [], "x": [], "y": []}
    epochs = report.header.trial_epochs
    low: float = min(min(row["scores"]) for row in rows)
    high: float = max(max(row["scores"]) for row in rows)
    reach: float = max(high - low, 0.01)

    def x(epoch: float) -> float:
        return LEFT + (WIDTH - LEFT - 12) * (epoch - 1) / max(1, epochs - 1)

    def y(score: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 12) * (score - low) / reach

    lines = [
        {
            "points": " ".join(f"{x(e):.1f},{y(s):.1f}" for e, s in enumerate(row["scores"], start=1)),
            "end": (round(x(len(row["scores"])), 1), round(y(row["scores"][-1]), 1)),
            "state": row["state"],
            "best": report.best is not None and row["number"] == report.best["number"],
            "title": f"trial {row['number']}: {describe(row['overrides'])}",
        }
        for row in reversed(rows)
    ]
    ticks = [low + reach * part / 4 for part in range(5)]
    step = max(1, epochs // 10)
    return {
        "lines": lines,
        "x": [(round(x(epoch), 1), epoch) for epoch in range(1, epochs + 1, step)],
        "y": [(round(y(tick), 1), f"{tick:.2f}") for tick in ticks],
    }


def _bars(report: SearchReport) -> list[dict[str, Any]]:
    """Return one interval bar per effect that could be estimated, in percent of the widest."""
    shown = [row for row in report.effects.table if row.low is not None and row.high is not None]
    widest = max((max(abs(row.low or 0), abs(row.high or 0)) for row in shown), default=0.0) or 1.0
    return [
        {
            "row": row,
            "left": 50 + 50 * (row.low or 0) / widest,
            "width": 50 * ((row.high or 0) - (row.low or 0)) / widest,
            "at": 50 + 50 * (row.effect or 0) / widest,
        }
        if row.low is not None
        else {"row": row, "left": 0, "width": 0, "at": None}
        for row in report.effects.table
    ]
