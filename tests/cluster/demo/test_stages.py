import pytest

from cluster.demo.stages import limit_epochs
from cluster.presets import PRESETS


@pytest.mark.parametrize(
    ("train_images", "epochs", "trial_epochs"), [(500, 20, 4), (6000, 10, 4), (30_000, 2, 2), (10**6, 1, 1)]
)
def test_more_images_mean_fewer_epochs_and_never_none(train_images: int, epochs: int, trial_epochs: int) -> None:
    settings = limit_epochs(PRESETS["demo"](), train_images)
    assert (settings.trainers.epochs, settings.tuning.trial_epochs) == (epochs, trial_epochs)
    assert settings.tuning.grace_epochs <= settings.tuning.trial_epochs
