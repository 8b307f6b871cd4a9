"""Ray Tune's callbacks and scheduler for a search: they ask the judge and write to the search's log.

Tune converts an error of a callback to text, or leaves trials running. So an error of the journal or of a listener is
stored in the `Recorder`, which makes Tune end the search, and raised when Tune is done.
"""

from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from records.errors import quoted_error
from tuning.judge import Judge
from tuning.log import SearchLog
from tuning.trials import TrialFigures, TrialPlan

SLOT = "plan"


class Recorder:
    """Writes events to the log until an error ends the search."""

    def __init__(self, log: SearchLog) -> None:
        self.log = log
        self.error: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as an empty shell: Tune saves its scheduler and callbacks, which nobody restores."""
        return {"error": None}

    def record(self, event: Callable[[SearchLog], None]) -> None:
        """Record something, unless the search is already ending."""
        if self.error is not None:
            return
        try:
            event(self.log)
        except BaseException as error:  # noqa: BLE001  raised by run_trials when Tune has stopped its actors
            self.error = error


class Watch(tune.Callback):
    """Records starts, ends and deaths of trials."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._started: set[int] = set()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record that a trial got its actor."""
        self._start(plan_of(trial))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record that a trial is over, or waits for the other members of its population."""
        plan = plan_of(trial)
        waits = plan.until_epoch is not None
        self._recorder.record(lambda log: (log.waits if waits else log.ended)(plan.number))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record that a trial's process died, or never came up."""
        number = number_of(trial)
        if number not in self._started:
            self._start(plan_of(trial))
        cause = trial.get_pickled_error() or RuntimeError("the trial's process died")
        own = quoted_error(str(cause))
        kind, message = type(own or cause).__name__, sentence(own or cause)
        self._recorder.record(lambda log: log.failed(number, kind=kind, message=message, lost=True))

    def _start(self, plan: TrialPlan) -> None:
        self._started.add(plan.number)
        self._recorder.record(lambda log: log.started(plan))


class EndOnError(tune.Stopper):
    """Ends the whole search once the recorder holds an error."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stop a single trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether the search shall end now."""
        return self._recorder.error is not None


class TensorBoardLogs(TBXLoggerCallback):
    """Ray's TensorBoard logger, which leaves files open when a search ends early; `close` closes them."""

    def close(self) -> None:
        """Finish the logs of all trials."""
        for trial in list(self._trial_writer):
            self.log_trial_end(trial)


def plan_of(trial: Trial) -> TrialPlan:
    """Return the plan that a Tune trial runs."""
    return TrialPlan.model_validate(trial.config[SLOT])


def number_of(trial: Trial) -> int:
    """Return the number of the plan that a Tune trial runs."""
    number: int = trial.config[SLOT]["number"]
    return number


def sentence(error: BaseException) -> str:
    """Return the last line of an error's text, where Ray puts the cause, or the error's class name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__


SCORE = "val_balanced_accuracy"
FAILURE = "error_kind"
FIGURES = "figures/"


class JudgedTrials(FIFOScheduler):
    """Runs trials in order and ends those that the judge ends. Ray's own ASHA loses its rungs at a crash."""

    def __init__(self, recorder: Recorder, judge: Judge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder
        self._judge = judge

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without judge: Tune saves its scheduler, which nobody restores."""
        return {"_recorder": self._recorder, "_judge": None}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on, after writing the decision down."""
        number = number_of(trial)
        self._recorder.record(lambda log: log.began(number, result["began_at"], result["process"]))
        if FAILURE in result:
            kind, message = result[FAILURE], result["error"]
            self._recorder.record(lambda log: log.failed(number, kind=kind, message=message, lost=False))
            return str(TrialScheduler.STOP)
        # The decision is in the journal before Tune gets it: a kill in between leads to the same decision after
        # resuming.
        decision = self._judge.decide(number, result["epoch"], result[SCORE])
        # Tune hands over nested values flat.
        figures = {name.removeprefix(FIGURES): value for name, value in result.items() if name.startswith(FIGURES)}
        self._recorder.record(
            lambda log: log.epoch(
                decision,
                seconds=result["seconds"],
                key_class_sensitivity=result.get("key_class_sensitivity"),
                figures=TrialFigures.model_validate(figures) if figures else None,
            )
        )
        over = not decision.goes_on or decision.epoch >= (plan_of(trial).until_epoch or self._judge.max_epochs)
        return str(TrialScheduler.STOP if over else TrialScheduler.CONTINUE)
