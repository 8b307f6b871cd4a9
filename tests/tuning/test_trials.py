"""Shortening a training into a trial: by hand numbers."""

import pytest

from trainers.settings import SchedulerSettings, TrainersSettings
from tuning.trials import shortened, trial_budget

WHOLE = TrainersSettings(
    epochs=20,
    scheduler=SchedulerSettings(step_size_epochs=10, plateau_patience_epochs=4, warmup_epochs=2.0),
    early_stop_patience_epochs=5,
)


def test_durations_shrink_by_the_same_factor():
    short = shortened(WHOLE, 5)

    assert (short.epochs, short.scheduler.step_size_epochs, short.scheduler.plateau_patience_epochs) == (5, 2, 1)
    assert short.scheduler.warmup_epochs == pytest.approx(0.5)


def test_changes_of_the_learning_rate_move_with_the_budget():
    settings = WHOLE.with_values({"scheduler.learning_rate_factors": ((9, 0.5), (10, 0.4), (17, 2.0))})

    assert shortened(settings, 5).scheduler.learning_rate_factors == ((3, 0.4), (5, 2.0))
    assert shortened(settings, 20).scheduler.learning_rate_factors == settings.scheduler.learning_rate_factors


def test_only_successive_halving_ends_a_trial():
    assert shortened(WHOLE, 5).early_stop_patience_epochs is None


def test_nothing_else_changes():
    short = shortened(WHOLE, 5)
    durations = {name for name in WHOLE.flat() if name.endswith("epochs")}

    assert durations == {
        "epochs",
        "scheduler.step_size_epochs",
        "scheduler.plateau_patience_epochs",
        "scheduler.warmup_epochs",
        "early_stop_patience_epochs",
    }
    unchanged = [name for name in WHOLE.flat() if name not in durations]
    assert [short.flat()[name] for name in unchanged] == [WHOLE.flat()[name] for name in unchanged]


def test_a_duration_never_vanishes_and_zero_stays_zero():
    short = shortened(WHOLE.with_values({"scheduler.plateau_patience_epochs": 0, "scheduler.step_size_epochs": 1}), 2)

    assert (short.scheduler.step_size_epochs, short.scheduler.plateau_patience_epochs) == (1, 0)


@pytest.mark.parametrize(("asked", "given"), [(5, 5), (20, 20), (50, 20)])
def test_a_trial_is_never_longer_than_the_training(asked, given):
    assert trial_budget(WHOLE, asked) == given
    assert shortened(WHOLE, asked).epochs == given


def test_a_full_budget_changes_no_schedule():
    assert shortened(WHOLE, 20) == WHOLE.model_copy(update={"early_stop_patience_epochs": None})
