"""Lets Ray Tune ask the judge of the search, and the journal hear the answer before Tune does."""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tuning.judge import Judge
from tuning.ray_search.recorder import Recorder, number_of, plan_of
from tuning.trials import TrialFigures

SCORE = "val_balanced_accuracy"
FAILURE = "error_kind"
FIGURES = "figures/"


class JudgedTrials(FIFOScheduler):
    """Runs trials in order and ends those that the judge ends. Ray's own ASHA loses its rungs at a crash.

    Args:
        recorder: told of each epoch with the decision that follows it.
        judge: knows the decisions of an earlier run.
    """

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
