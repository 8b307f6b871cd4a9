"""Settings that cannot work are refused."""

import pytest
from pydantic import ValidationError

from tuning.settings import Axis, TuningSettings


def test_everything_is_searched_by_default():
    assert TuningSettings().search == (Axis.OPTIMIZER, Axis.SCHEDULER, Axis.AUGMENTATION)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": 0}, "greater than or equal to 1"),
        ({"reduction_factor": 1}, "greater than or equal to 2"),
        ({"grace_epochs": 7, "trial_epochs": 6}, "a trial would never reach its first rung"),
        ({"search": ()}, "at least 1 item"),
        ({"search": ("optimizer", "optimizer")}, "search names something twice"),
        ({"search": ("colour",)}, "'optimizer', 'scheduler', 'augmentation', 'model', 'loss' or 'sampler'"),
        ({"workers_per_trial": 2, "gpus_per_trial": 0.5}, "cannot be given to each of 2 workers; set it to 0 or 1"),
        ({"workers": 3}, "Extra inputs are not permitted"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValidationError, match=message):
        TuningSettings(**values)


def test_every_field_is_described():
    assert all(field.description for field in TuningSettings.model_fields.values())
