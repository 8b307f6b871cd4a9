"""Asynchronous successive halving that journals each decision before Ray Tune acts on it.

After grace_epochs * factor^k epochs a trial goes on only if it is among the best 1/factor of those
that came to that rung before it. Trial 0, the given settings, always goes on, so that the winner is
compared with it at its full budget. A search that goes on starts with the rungs of its settled trials.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from tuning.ray_search.recorder import Recorder, number_of
from tuning.trials import SearchHeader, TrialResult

SCORE = "val_balanced_accuracy"
TIME = "training_iteration"
FAILURE = "error_kind"


class JournalledHalving(AsyncHyperBandScheduler):
    """Ray's ASHA with a journal.

    Args:
        recorder: told of each epoch with the decision that follows it.
        header: with budget, grace and factor.
        settled: trials of an earlier run, whose scores stand in the rungs.
    """

    def __init__(self, recorder: Recorder, header: SearchHeader, settled: Sequence[TrialResult]) -> None:
        super().__init__(
            time_attr=TIME,
            metric=SCORE,
            mode="max",
            max_t=header.trial_epochs,
            grace_period=header.grace_epochs,
            reduction_factor=header.reduction_factor,
        )
        self._recorder = recorder
        self._trial_epochs = header.trial_epochs
        for trial in settled:
            # A rung asks a trial for nothing but its id.
            stand_in: Any = SimpleNamespace(trial_id=f"settled-{trial.number}")
            for epoch, score in enumerate(trial.scores, start=1):
                self._brackets[0].on_result(stand_in, epoch, score)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on, after writing the decision down."""
        number = number_of(trial)
        self._recorder.record(lambda log: log.began(number, result["began_at"], result["process"]))
        if FAILURE in result:
            kind, message = result[FAILURE], result["error"]
            self._recorder.record(lambda log: log.failed(number, kind=kind, message=message, lost=False))
            return str(TrialScheduler.STOP)
        decision = str(super().on_trial_result(tune_controller, trial, result))
        last = result[TIME] >= self._trial_epochs
        if number == 0 and not last:
            decision = str(TrialScheduler.CONTINUE)
        self._recorder.record(
            lambda log: log.epoch(
                number,
                score=result[SCORE],
                seconds=result["seconds"],
                key_class_sensitivity=result.get("key_class_sensitivity"),
                goes_on=last or decision == TrialScheduler.CONTINUE,
            )
        )
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Forget a trial that is over."""
        if FAILURE in result:
            self._trial_info.pop(trial.trial_id, None)
        else:
            super().on_trial_complete(tune_controller, trial, result)
