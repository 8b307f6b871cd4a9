"""Run trials on the Ray session of the caller, and tell the search's log what happens to them.

In: plans, a function that runs one, the log. Ray's tables and warnings are kept off the terminal.
The first trial of an actor waits for a process and its imports; later ones reuse the actor.
"""

import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial

from records.errors import ConfigError, ContractError, UnavailableError
from records.ids import new_id
from tuning.log import SearchLog
from tuning.ray_search.recorder import SLOT, EndOnError, Recorder, TensorBoardLogs, Watch, number_of, sentence
from tuning.ray_search.rungs import FAILURE, SCORE, JournalledHalving
from tuning.settings import TuningSettings
from tuning.trials import SearchHeader, TrialPlan

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
    plans: Sequence[TrialPlan],
    function: TrialFunction,
    data: Any,
    *,
    header: SearchHeader,
    tuning: TuningSettings,
    log: SearchLog,
    folder: Path,
) -> None:
    """Run every plan to its end, or until successive halving cuts it off.

    Args:
        plans: what shall be tried, in this order.
        function: runs one plan.
        data: given to every call of the function; sent to each node once.
        header: with the budget of a trial.
        tuning: resources and concurrency.
        log: told of every happening; what its listener raises ends the search and is raised here.
        folder: Ray Tune keeps its own files in a new folder there (TensorBoard logs among them).
    Raises:
        ContractError: no Ray session is running.
        ConfigError: one trial needs more than the whole session has.
        UnavailableError: Ray failed, not a trial.
        KeyboardInterrupt: Ctrl-C; the trials were stopped first.
    """
    if not plans:
        return
    _require_resources(tuning)
    recorder = Recorder(log)
    logs = TensorBoardLogs()  # type: ignore[no-untyped-call]
    tuner = _tuner(plans, function, data, header, tuning, recorder, logs, folder)
    with _quiet(), _interruptible(recorder):
        try:
            tuner.fit()
        except Exception as error:
            if recorder.error is None:
                raise UnavailableError(f"Ray Tune failed and ended the search: {sentence(error)}") from error
        finally:
            logs.close()
    if recorder.error is not None:
        raise recorder.error


def _tuner(
    plans: Sequence[TrialPlan],
    function: TrialFunction,
    data: Any,
    header: SearchHeader,
    tuning: TuningSettings,
    recorder: Recorder,
    logs: TensorBoardLogs,
    folder: Path,
) -> tune.Tuner:
    resources = {"CPU": float(tuning.cpus_per_trial)} | ({"GPU": g} if (g := tuning.gpus_per_trial) else {})
    trainable = tune.with_parameters(_trial, function=function, data=data)
    return tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([resources])),
        param_space={SLOT: tune.grid_search([plan.model_dump(mode="json") for plan in plans])},
        tune_config=tune.TuneConfig(
            scheduler=JournalledHalving(recorder, header, recorder.log.trials),
            max_concurrent_trials=tuning.max_concurrent or _cores_for_trials(tuning),
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"ray-{new_id()[:12]}",
            storage_path=str(folder.absolute()),
            callbacks=[Watch(recorder, {plan.number: plan for plan in plans}), logs],
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


def _require_resources(tuning: TuningSettings) -> None:
    """Refuse a trial that could never start; a cluster of several nodes may still grow, so it is only asked to wait."""
    if not ray.is_initialized():
        raise ContractError("a search needs a running Ray session; start one before calling it")
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    may_grow = _num_nodes() > 1 or (Path.home() / "ray_bootstrap_config.yaml").exists()
    for name, field, needed in (
        ("CPU", "cpus_per_trial", float(tuning.cpus_per_trial)),
        ("GPU", "gpus_per_trial", tuning.gpus_per_trial),
    ):
        if needed > total.get(name, 0.0) and not may_grow:
            raise ConfigError(
                f"tuning.{field} is {needed:g} but this Ray session has {total.get(name, 0.0):g} {name}s; "
                f"set it to at most {total.get(name, 0.0):g}"
            )


def _cores_for_trials(tuning: TuningSettings) -> int | None:
    """Return how many trials the cores of this machine carry; None, that is no limit, on a cluster.

    A Ray of our own may hand out more CPUs than there are cores, for services that mostly wait; trials never wait.
    """
    if _num_nodes() > 1:
        return None
    return max(1, len(os.sched_getaffinity(0)) // tuning.cpus_per_trial)


def _num_nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]


@contextmanager
def _quiet() -> Iterator[None]:
    environment = {name: os.environ.get(name) for name in _QUIET}
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    os.environ.update(_QUIET)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
