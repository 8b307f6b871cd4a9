"""How many trials run at a time, counted by hand, without a GPU."""

import pytest

from records.errors import ConfigError
from tuning.resources import trial_shape, trials_at_a_time
from tuning.settings import TuningSettings


@pytest.mark.parametrize(
    ("changes", "offered", "cores", "fits"),
    [
        ({}, {"CPU": 2.0}, None, 2),
        ({"cpus_per_trial": 2}, {"CPU": 5.0}, None, 2),
        ({}, {"CPU": 8.0}, 2, 2),
        ({"max_concurrent": 3}, {"CPU": 8.0}, None, 3),
        ({"gpus_per_trial": 1}, {"CPU": 16.0, "GPU": 4.0}, None, 4),
        ({"gpus_per_trial": 0.25}, {"CPU": 16.0, "GPU": 2.0}, None, 8),
        ({"gpus_per_trial": 0.4}, {"CPU": 16.0, "GPU": 2.0}, None, 4),
        ({"gpus_per_trial": 0.25}, {"CPU": 3.0, "GPU": 2.0}, None, 3),
        ({"gpus_per_trial": 1, "workers_per_trial": 4}, {"CPU": 16.0, "GPU": 8.0}, None, 2),
        ({"cpus_per_trial": 2, "workers_per_trial": 2}, {"CPU": 8.0}, 2, 1),
    ],
)
def test_as_many_trials_run_as_fit(changes, offered, cores, fits):
    assert trials_at_a_time(TuningSettings(**changes), offered, cores) == fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpus_per_trial": 3}, r"tuning\.cpus_per_trial is 3 but this Ray session has 2 CPUs; set it to at most 2"),
        ({"gpus_per_trial": 0.5}, r"tuning\.gpus_per_trial is 0\.5 but this Ray session has 0 GPUs"),
        ({"workers_per_trial": 4}, r"tuning\.cpus_per_trial is 4 workers with 1 each but this Ray session has 2 CPUs"),
    ],
)
def test_a_trial_that_does_not_fit_is_refused_with_the_fix(changes, message):
    with pytest.raises(ConfigError, match=message):
        trials_at_a_time(TuningSettings(**changes), {"CPU": 2.0}, None)


def test_a_group_only_passes_messages_in_its_own_process():
    alone, group = (trial_shape(TuningSettings(gpus_per_trial=1, workers_per_trial=count)) for count in (1, 3))

    assert alone.total == alone.own == {"CPU": 1.0, "GPU": 1.0}
    assert (group.own, group.total) == ({"CPU": 0.01}, {"CPU": 3.0, "GPU": 3.0})
