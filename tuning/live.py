"""What a person sees while a search runs and after it: tables for rich, made from events and results.

In: SearchEvents, or a SearchHeader with TrialResults. Out: renderables. It prints nothing by itself.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuning.confirm import verdict_on
from tuning.effects import Effects
from tuning.experiments import Comparison
from tuning.log import best_of
from tuning.trials import EventKind, SearchEvent, SearchHeader, TrialResult, TrialState

_BARS = "▁▂▃▄▅▆▇█"
_STATE_STYLES = {
    TrialState.RUNNING: "cyan",
    TrialState.FINISHED: "green",
    TrialState.STOPPED: "dim",
    TrialState.FAILED: "red",
    TrialState.LOST: "red",
}


class SearchView:
    """A live image of a search."""

    def __init__(self, max_rows: int = 12) -> None:
        self._max_rows = max_rows
        self._trials: dict[int, TrialResult] = {}
        self._last: SearchEvent | None = None

    def update(self, event: SearchEvent) -> None:
        """Take in what happened."""
        self._trials[event.trial.number] = event.trial
        self._last = event

    def __rich__(self) -> RenderableType:
        """Draw the search as it stands."""
        if self._last is None:
            return Text("Search: waiting for the first trial ...", style="dim")
        return Group(self._headline(self._last), trial_table(self._in_sight(), self._last.best))

    def _headline(self, event: SearchEvent) -> Text:
        line = Text(f"Search: {event.trials_done} of {event.trials_total} trials done, ")
        line.append(f"{event.epochs_done} of at most {event.epochs_budget} epochs, {event.seconds:.0f} s")
        left = seconds_left(event)
        if left is not None:
            line.append(f", at most {left:.0f} s left")
        if event.best is not None and event.best.score is not None:
            line.append("; best so far ")
            line.append(f"{event.best.score:.3f}", style="bold green")
            line.append(f" by {describe(event.best.overrides)}")
        return line

    def _in_sight(self) -> list[TrialResult]:
        running = [trial for trial in self._trials.values() if trial.state is TrialState.RUNNING]
        rest = ranked(trial for trial in self._trials.values() if trial.state is not TrialState.RUNNING)
        return [*running, *rest][: self._max_rows]


def seconds_left(event: SearchEvent) -> float | None:
    """Return how long the rest would take if no trial were cut off; None before anything is known.

    Args:
        event: the last one; a search that goes on counts epochs of before, so the guess is then too small.
    Returns:
        Seconds.
    """
    if not event.epochs_done:
        return None
    return event.seconds / event.epochs_done * max(0, event.epochs_budget - event.epochs_done)


def line_of(event: SearchEvent) -> str | None:
    """Return one line about a trial that ended; None for anything else that happens."""
    if event.kind in (EventKind.STARTED, EventKind.EPOCH):
        return None
    trial, best = event.trial, event.best
    outcome = trial.error or ("no score" if trial.score is None else f"{trial.score:.3f}")
    leader = "" if best is None or best.score is None else f"; best so far {best.score:.3f} (trial {best.number})"
    return (
        f"trial {trial.number} {event.kind.value} after {trial.epochs} epochs: {outcome}, {describe(trial.overrides)}; "
        f"{event.trials_done} of {event.trials_total} done{leader}"
    )


def ranked(trials: Iterable[TrialResult]) -> list[TrialResult]:
    """Return trials with the best first; those without a score come last, in order of number."""
    return sorted(trials, key=lambda trial: (-(trial.score if trial.score is not None else -1.0), trial.number))


def trial_table(trials: Sequence[TrialResult], best: TrialResult | None) -> Table:
    """Draw trials, one a row, in the given order."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("trial", "right"), ("score", "right"), ("by epoch", "left"), ("state", "left")):
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for trial in trials:
        leads = best is not None and best.number == trial.number
        what = describe(trial.overrides) if trial.error is None else f"{describe(trial.overrides)}: {trial.error}"
        table.add_row(
            f"{'* ' if leads else ''}{trial.number}",
            "-" if trial.score is None else f"{trial.score:.3f}",
            sparkline(trial.scores),
            Text(trial.state.value, style=_STATE_STYLES[trial.state]),
            f"{trial.seconds:.1f}" if trial.seconds else "",
            what,
            style="bold" if leads else None,
        )
    return table


def effects_table(effects: Effects) -> Table:
    """Draw the effect of each choice with its interval and cost."""
    table = Table(box=None, pad_edge=False, header_style="dim", title=f"Effects: {effects.basis}", title_justify="left")
    for name in ("choice", "effect", "interval", "verdict", "s/epoch"):
        table.add_column(name, no_wrap=True)
    for row in effects.table:
        table.add_row(
            f"{row.axis} {row.choice}",
            "-" if row.effect is None else f"{100 * row.effect:+.1f}",
            "-" if row.low is None or row.high is None else f"{100 * row.low:+.1f} to {100 * row.high:+.1f}",
            row.verdict,
            "-" if row.seconds_per_epoch is None else f"{row.seconds_per_epoch:.1f}",
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Draw our figures beside the published ones, each row once."""
    title = "Beside the dissertation: validation here, its own test images there"
    table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left")
    table.add_column("row", overflow="fold")
    for name in ("balanced accuracy", "accuracy", "published"):
        table.add_column(name, no_wrap=True)
    for row in {row.name: row for row in comparison.rows}.values():
        metric = "" if row.metric == "accuracy" else f" {row.metric.replace('_', ' ')}"
        table.add_row(
            row.name,
            _with_interval(row.balanced_accuracy, row.balanced_accuracy_ci),
            _with_interval(row.accuracy, row.accuracy_ci),
            "-" if row.published is None else f"{row.published:.3f}{metric}",
        )
    return table


def _with_interval(value: float | None, ends: tuple[float, float] | None) -> str:
    return "-" if value is None or ends is None else f"{value:.3f} ({ends[0]:.3f}-{ends[1]:.3f})"


def search_summary(header: SearchHeader, trials: Sequence[TrialResult]) -> RenderableType:
    """Draw a whole search: what it saw, its trials with the best first, its winner."""
    searched = [trial for trial in trials if not trial.confirms]
    leader = best_of(searched)
    verdict = None if leader is None else verdict_on(leader, trials)
    best = next((trial for trial in searched if verdict and trial.number == verdict.winner), leader)
    seen = f"{header.train_images} training images"
    if header.train_images < header.train_images_available:
        seen += f" of {header.train_images_available}"
    lines = [
        f"Search on dataset {header.dataset_id[:12]}: {len(searched)} of {header.trials} trials, up to "
        f"{header.trial_epochs} epochs each, {seen}, {header.val_images} validation images."
    ]
    winner = "No trial was scored."
    if best is not None and best.score is not None:
        winner = (
            f"Winner: trial {best.number}, validation balanced accuracy {best.score:.3f}, {describe(best.overrides)}."
        )
    confirmed = () if verdict is None else (f"Fresh seeds: {verdict.words}.",)
    return Group(*lines, trial_table(ranked(searched), best), winner, *confirmed)


def describe(overrides: dict[str, Any]) -> str:
    """Return overrides as a person reads them; no overrides are the given settings themselves."""
    if not overrides:
        return "the given settings"
    return ", ".join(
        f"{name.removesuffix('.name')} {value:.3g}"
        if isinstance(value, float)
        else f"{name.removesuffix('.name')} {value}"
        for name, value in overrides.items()
    )


def sparkline(scores: Sequence[float]) -> str:
    """Return one bar per score, from 0 to 1, in eight heights."""
    return "".join(_BARS[min(7, max(0, int(score * 8)))] for score in scores)
