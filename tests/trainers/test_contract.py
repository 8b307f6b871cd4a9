"""Every registered part trains: one epoch each through the real loop, and a count of what was run."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from records.taxonomy import Taxonomy
from tests.models import NETWORKS
from trainers.augmentation import Policy
from trainers.cli.catalog import REGISTRIES, catalogue
from trainers.fitting.loop import TrainingData, train
from trainers.settings import TrainersSettings
from vision.networks import MODELS

SETTING_OF = {
    "optimizers": "optimizer.name",
    "schedulers": "scheduler.name",
    "losses": "loss.name",
    "samplers": "sampler",
    "augmentations": "augmentation",
}
COUNTS = {
    "models": 14, "optimizers": 4, "schedulers": 4, "losses": 5, "samplers": 3, "augmentations": 8, "operations": 15,
}  # fmt: skip
OTHERS = [(kind, name) for kind in COUNTS if kind != "models" for name in REGISTRIES[kind]]
CASES = [
    *(pytest.param("models", *case.values, marks=case.marks, id=f"models-{case.values[0]}") for case in NETWORKS),
    *(pytest.param(kind, name, id=f"{kind}-{name}") for kind, name in OTHERS),
]
ran: Counter[str] = Counter()


class Rows:
    """Images in memory."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def take(self, indices: object) -> np.ndarray:
        return self._pixels[indices]


def images(side_px: int) -> TrainingData:
    """Eight images to train on and four for validation."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, side_px, side_px, 3)).astype(np.uint8)
    ids = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(12)]
    return TrainingData(Rows(pixels), ids, np.arange(12) % 3, np.arange(8), np.arange(8, 12))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_it_trains(
    kind: str, name: str, toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy
) -> None:
    changes: dict[str, object] = {"epochs": 1}
    data, policy = toy_data, None
    if kind == "models":
        side_px = MODELS[name].minimum_side_px
        changes |= {"model.name": name, "model.side_px": side_px, "batch_size": 4, "optimizer.learning_rate": 0.001}
        data = images(side_px)
    elif kind == "operations":
        policy = Policy.model_validate({"name": name, "operations": [{"operation": name, "probability": 1.0}]})
    else:
        changes[SETTING_OF[kind]] = name
    settings = toy_settings.with_values(changes)
    trained = train(settings, data, three_classes, policy=policy)
    assert len(trained.reports) == 1
    assert np.isfinite(trained.reports[0].train_loss)
    assert all(np.isfinite(value).all() for value in trained.weights().values())
    ran[kind] += 1


def test_how_many_were_run() -> None:
    assert dict(ran) == COUNTS | {"models": 3}  # the other networks with `make soak`
    # One row more says how networks of timm are named.
    listed = COUNTS | {"models": COUNTS["models"] + 1}
    assert {kind: len(rows) for kind, rows in catalogue().items() if kind in COUNTS} == listed
    assert {name: MODELS[name].parameters for name in ("custom_cnn", "resnet18", "resnet34")} == {
        "custom_cnn": 51_221,
        "resnet18": 11_172_423,
        "resnet34": 21_280_583,
    }
