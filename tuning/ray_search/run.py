"""Run trials with Ray Tune on the caller's Ray session and record events in the search's log.

In: plans, made one at a time as there is room, a function that runs one, the judge, the log. Ray's
tables and warnings are kept off the terminal.
The first trial of an actor waits for a process and its imports; later ones reuse the actor.
"""

import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from records.errors import ConfigError, ContractError, UnavailableError, quoted_error
from records.ids import new_id
from records.settings import environment
from tuning.judge import Judge
from tuning.log import SearchLog
from tuning.ray_search.recorder import (
    FAILURE,
    SCORE,
    SLOT,
    EndOnError,
    JudgedTrials,
    Recorder,
    TensorBoardLogs,
    Watch,
    number_of,
    sentence,
)
from tuning.resources import trial_shape, trials_at_a_time
from tuning.settings import TuningSettings
from tuning.trials import TrialPlan

Report = Callable[[dict[str, Any]], None]
TrialFunction = Callable[[TrialPlan, Any, Report], None]
"""Runs one plan on some data and reports the fields of EpochReport after each epoch."""

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a table whatever the verbosity
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV and JSON files beside the journal
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's own stays installed after the search and eats a Ctrl-C
}
_LOGGERS = ("ray.tune", "ray.train", "ray.air")


def run_trials(
    plans: Iterable[TrialPlan | None],
    function: TrialFunction,
    data: Any,
    *,
    judge: Judge,
    tuning: TuningSettings,
    log: SearchLog,
    folder: Path,
) -> None:
    """Run every plan to its end, or until the judge cuts it off.

    Args:
        plans: what shall be tried, in this order; the next one is asked for when there is room for it, and again
            later where it is None.
        function: runs one plan.
        data: given to every call of the function; sent to each node once.
        judge: decides after each epoch.
        tuning: resources and concurrency.
        log: records every event; an error of its listener ends the search and is raised here.
        folder: Ray Tune keeps its own files in a new folder there (TensorBoard logs among them).
    Raises:
        ContractError: no Ray session is running.
        ConfigError: one trial needs more than the whole session has, or the folder cannot be written.
        UnavailableError: Ray failed, not a trial.
        KeyboardInterrupt: Ctrl-C; the trials were stopped first.
    """
    at_a_time = _room_for(tuning)
    waiting = iter(plans)
    first = list(islice(waiting, 1))
    if not first:
        return
    recorder = Recorder(log)
    logs = TensorBoardLogs()  # type: ignore[no-untyped-call]
    feed = PlanFeed(recorder, chain(first, waiting), at_a_time)
    tuner = _tuner(feed, function, data, judge, tuning, recorder, logs, folder)
    with _quiet(), _interruptible(recorder):
        try:
            tuner.fit()
        except Exception as error:
            if recorder.error is None:
                own = quoted_error(str(error))
                raise own or UnavailableError(f"Ray Tune failed and ended the search: {sentence(error)}") from error
        finally:
            logs.close()
    if recorder.error is not None:
        raise recorder.error


class PlanFeed(Searcher):
    """Hands Ray Tune the next plan whenever there is room for one more trial."""

    def __init__(self, recorder: Recorder, plans: Iterator[TrialPlan | None], at_a_time: int) -> None:
        super().__init__(metric=SCORE, mode="max")
        self._recorder = recorder
        self._plans = plans
        self._at_a_time = at_a_time
        self._running: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as an empty shell: the journal is what a search goes on from."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """Return the next plan as a Tune configuration, None if there is no room, or that there are no more."""
        if self._recorder.error is not None:
            return Searcher.FINISHED
        if len(self._running) >= self._at_a_time:
            return None
        try:
            plan = next(self._plans, Searcher.FINISHED)
        except BaseException as error:  # noqa: BLE001  raised by run_trials when Tune has stopped its actors
            self._recorder.error = error
            return Searcher.FINISHED
        if not isinstance(plan, TrialPlan):
            return plan
        self._running.add(trial_id)
        return {SLOT: plan.model_dump(mode="json")}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Make room for another trial."""
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the journal is what a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


def _tuner(
    feed: PlanFeed,
    function: TrialFunction,
    data: Any,
    judge: Judge,
    tuning: TuningSettings,
    recorder: Recorder,
    logs: TensorBoardLogs,
    folder: Path,
) -> tune.Tuner:
    trainable = tune.with_parameters(_trial, function=function, data=data)
    return tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([trial_shape(tuning).own])),
        tune_config=tune.TuneConfig(
            search_alg=feed,
            scheduler=JudgedTrials(recorder, judge),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"ray-{new_id()[:12]}",
            storage_path=str(folder.absolute()),
            callbacks=[Watch(recorder), logs],
            failure_config=tune.FailureConfig(max_failures=tuning.max_failures),
            stop=EndOnError(recorder),
            verbose=0,
        ),
    )


def _trial(config: dict[str, Any], function: TrialFunction, data: Any) -> None:
    """Run one plan inside a Tune actor; a failure is reported and not raised, so that the actor can be reused."""
    plan = TrialPlan.model_validate(config[SLOT])
    origin = {"began_at": time.time(), "process": f"{platform.node()}:{os.getpid()}"}

    def report(scores: dict[str, Any]) -> None:
        if scores["epoch"] == 1:
            origin["began_at"] = time.time() - scores["seconds"]
        tune.report({**scores, **origin})

    try:
        function(plan, data, report)
    except Exception as error:  # noqa: BLE001  every failure is recorded with its reason by the driver
        tune.report({SCORE: float("nan"), FAILURE: type(error).__name__, "error": sentence(error), **origin})


def _trial_name(trial: Trial) -> str:
    return f"trial-{number_of(trial):04d}-{trial.trial_id}"


def _room_for(tuning: TuningSettings) -> int:
    """Return how many trials run at a time; on a cluster that may still grow, a trial is only asked to wait.

    A trial that could never start on a session that cannot grow is refused.
    """
    if not ray.is_initialized():
        raise ContractError("a search needs a running Ray session; start one before calling it")
    offered: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cluster = _num_nodes() > 1
    may_grow = cluster or (Path.home() / "ray_bootstrap_config.yaml").exists()
    cores = None if cluster else len(os.sched_getaffinity(0))
    try:
        return trials_at_a_time(tuning, offered, cores)
    except ConfigError:
        if may_grow:
            return tuning.max_concurrent or 1
        raise


def _num_nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]


@contextmanager
def _quiet() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with environment(_QUIET):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _interruptible(recorder: Recorder) -> Iterator[None]:
    """Let the first Ctrl-C stop the trials and the second one cut everything short; restore the handlers after."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before[signal.SIGINT] or signal.default_int_handler)
        recorder.error = KeyboardInterrupt()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
