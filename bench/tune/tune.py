"""Overhead of Ray Tune: time between trials, and memory of the driver, with simulated trials.

In: a running Ray session. Out: figures. Runner, log and journal are those of a real search.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tuning.journal import open_journal
from tuning.judge import Judge, NoStopping
from tuning.log import SearchLog
from tuning.settings import TuningSettings
from tuning.trials import EventKind, Origin, SearchEvent, SearchHeader, TrialPlan, TrialResult

EPOCHS = 3
WARM_TRIALS = 0.1
"""Share of the simulated trials after which memory is first measured: by then everything is imported."""


def pretend(plan: TrialPlan, epoch_s: float, report: Callable[[dict[str, Any]], None]) -> None:
    """Compute for some time instead of training, three epochs long.

    Args:
        plan: its number decides the score.
        epoch_s: seconds of an epoch.
        report: told the fields of EpochReport that a search reads.
    """
    factors = np.random.default_rng(0).normal(size=(128, 128))
    for epoch in range(1, EPOCHS + 1):
        began = time.perf_counter()
        while time.perf_counter() - began < epoch_s:
            np.linalg.norm(factors @ factors)
        report(
            {
                "epoch": epoch,
                "val_balanced_accuracy": plan.number % 97 / 97,
                "seconds": time.perf_counter() - began,
                "key_class_sensitivity": None,
            }
        )


def overhead(folder: Path, trial_s: float, at_a_time: int, trials_each: int) -> float:
    """Measure which share of the time no trial computes, with one trial per core.

    Args:
        folder: for the journal; new.
        trial_s: seconds of a trial.
        at_a_time: trials that run at once.
        trials_each: one after the other.
    Returns:
        0 to 1; the start of the processes is in it.
    """
    began = time.perf_counter()
    trials = _run(folder, trial_s / EPOCHS, at_a_time * trials_each, at_a_time)
    wall = time.perf_counter() - began
    return 1.0 - sum(sum(trial.epoch_seconds) for trial in trials) / (wall * at_a_time)


def memory_growth(folder: Path, trials: int, at_a_time: int) -> float:
    """Measure how much the driver grows over many trials that take no time.

    Args:
        folder: for the journal; new.
        trials: how many.
        at_a_time: trials that run at once.
    Returns:
        MB of resident memory, from a tenth of the trials to the end.
    """
    process = psutil.Process()
    seen: list[float] = []

    def look(event: SearchEvent) -> None:
        if event.kind is EventKind.FINISHED and event.trials_done >= WARM_TRIALS * trials:
            seen.append(process.memory_info().rss / 1e6)

    _run(folder, 0.0, trials, at_a_time, look)
    return seen[-1] - seen[0]


def _run(
    folder: Path,
    epoch_s: float,
    trials: int,
    at_a_time: int,
    on_event: Callable[[SearchEvent], None] | None = None,
) -> list[TrialResult]:
    # Its import takes a second, which the command's help need not wait for.
    from tuning.ray_search import run_trials

    header = SearchHeader(
        dataset_id="0" * 64,
        base={},
        seed=0,
        search=(),
        space_hash="0" * 64,
        scheduler="none",
        trials=trials,
        trial_epochs=EPOCHS,
        grace_epochs=1,
        reduction_factor=2,
        train_images=1,
        train_images_available=1,
        val_images=1,
    )
    plans = (TrialPlan(number=n, origin=Origin.SAMPLED, overrides={"seed": n}) for n in range(trials))
    tuning = TuningSettings(trials=trials, max_concurrent=at_a_time, max_failures=0)
    with open_journal(folder, header) as journal:
        log = SearchLog(header, journal, on_event)
        judge = Judge(NoStopping(), EPOCHS, lambda number: False)
        run_trials(plans, pretend, epoch_s, judge=judge, tuning=tuning, log=log, folder=folder)
        return log.trials
