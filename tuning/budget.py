"""How a whole training is squeezed into the budget of a trial, so that trials can be compared.

Every trial trains for the same number of epochs, and every duration of its learning-rate schedule is
shortened by the same factor: a schedule that cuts the rate at half time does so in the trial as well.
Trials that meet at a rung are then at the same point of their schedules. Rounding to whole epochs can
make two schedules equal in a short trial; the winner is trained with its own, unshortened durations.
"""

from trainers.augmentation.policy import scaled_start
from trainers.settings import TrainersSettings

UNIT_SUFFIX = "_epochs"


def trial_budget(settings: TrainersSettings, trial_epochs: int) -> int:
    """Return the epochs of a trial: `trial_epochs`, but never more than the whole training has."""
    return min(trial_epochs, settings.epochs)


def squeeze(settings: TrainersSettings, trial_epochs: int) -> TrainersSettings:
    """Shorten a training to the budget of a trial.

    Args:
        settings: of the whole training.
        trial_epochs: the budget, at least 1.
    Returns:
        The same settings with `epochs` set to the budget and every other duration in epochs shortened
        by the same factor (whole ones to at least 1, zero stays zero). Early stopping is switched off:
        in a search only successive halving ends a trial.
    """
    epochs = trial_budget(settings, trial_epochs)
    factor = epochs / settings.epochs
    changes: dict[str, object] = {"epochs": epochs, "early_stop_patience_epochs": None}
    for name, value in settings.flat().items():
        if name == "scheduler.learning_rate_factors":
            changes[name] = tuple({scaled_start(start, factor): rate for start, rate in value}.items())
        if not name.endswith(UNIT_SUFFIX) or name in changes or not value:
            continue
        changes[name] = max(1, round(value * factor)) if isinstance(value, int) else value * factor
    return settings.with_values(changes)
