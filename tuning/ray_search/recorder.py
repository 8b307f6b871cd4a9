"""Between Ray Tune and the search's log: what is recorded may raise, and Tune must not see it.

Tune wraps an error of a callback into a text, or leaves trials running behind it. So an error of the
journal or of a listener is kept here, asks Tune to end the search, and is raised when Tune is done.
"""

from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback

from tuning.log import SearchLog
from tuning.trials import TrialPlan

SLOT = "plan"


class Recorder:
    """Passes happenings to the log until something ends the search.

    Args:
        log: of the search.
    """

    def __init__(self, log: SearchLog) -> None:
        self.log = log
        self.error: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as an empty shell: Tune saves its scheduler and callbacks, which nobody restores."""
        return {"error": None}

    def record(self, happening: Callable[[SearchLog], None]) -> None:
        """Record something, unless the search is already ending."""
        if self.error is not None:
            return
        try:
            happening(self.log)
        except BaseException as error:  # noqa: BLE001  raised by run_trials when Tune has stopped its actors
            self.error = error


class Watch(tune.Callback):
    """Records starts, ends and deaths of trials.

    Args:
        recorder: of the search.
    """

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
        kind = type(cause).__name__
        self._recorder.record(lambda log: log.failed(number, kind=kind, message=sentence(cause), lost=True))

    def _start(self, plan: TrialPlan) -> None:
        self._started.add(plan.number)
        self._recorder.record(lambda log: log.started(plan))


class EndOnError(tune.Stopper):
    """Ends the whole search once the recorder holds an error.

    Args:
        recorder: of the search.
    """

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
