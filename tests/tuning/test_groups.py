"""A trial that is a group of workers under Ray Train, inside Ray Tune, for real."""

import pytest

from tuning.search import search
from tuning.trial import trial_folder
from tuning.trials import EventKind


@pytest.mark.slow
@pytest.mark.soak
def test_two_workers_train_one_trial(ray_session, labelled, trainers, tuning, tmp_path):
    """Two workers with a CPU each share every batch; the search scores every epoch and clears up behind the group."""
    store, dataset = labelled
    two = tuning.model_copy(update={"trials": 1, "trial_epochs": 2, "workers_per_trial": 2})
    checkpoints = []

    def note(event):
        if event.kind is EventKind.EPOCH:
            checkpoints.append(sorted(trial_folder(tmp_path, 0).glob("ray/checkpoint_*/checkpoint.pt")))

    result = search(store, two, trainers, dataset, run_dir=tmp_path, on_event=note)

    assert [(trial.state, trial.epochs, trial.error) for trial in result.trials] == [("finished", 2, None)]
    assert len(checkpoints) == 2
    assert all(checkpoints)
    assert not trial_folder(tmp_path, 0).exists()
