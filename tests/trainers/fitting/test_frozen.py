"""Training on features that cannot change: computed once, the same model as without it, and only where it may be."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from records.errors import UnavailableError
from records.taxonomy import Taxonomy
from trainers.augmentation.mixing import Mixing
from trainers.augmentation.policy import Operation, Phase, Policy
from trainers.fitting import frozen, loop
from trainers.fitting.loop import train
from trainers.fitting.training_data import TrainingData
from trainers.fitting.workers import SingleWorker
from trainers.settings import TrainersSettings

HEADS = {
    "resnet18": "pooled",
    "mobilenet_v3": "pooled, but two layers",
    "custom_cnn": "batch norm before it pools",
    "timm/test_vit": "built by probing",
}
FLIP = Operation(operation="horizontal_flip")


@dataclass
class Counted:
    """Pixels that count how many images were taken."""

    inner: Any
    taken: int = 0

    def __len__(self) -> int:
        return len(self.inner)

    def take(self, indices: Any) -> NDArray[Any]:
        self.taken += len(indices)
        return self.inner.take(indices)


@pytest.fixture
def head_only(toy_settings: TrainersSettings) -> TrainersSettings:
    values = {"epochs": 3, "augmentation": "none", "optimizer.trainable_blocks": 0, "model.name": "resnet18"}
    return toy_settings.with_values(values | {"model.side_px": 16, "optimizer.learning_rate": 0.005})


@pytest.fixture
def small_data(toy_data: TrainingData) -> TrainingData:
    class Small:
        def __len__(self) -> int:
            return len(toy_data.pixels)

        def take(self, indices: Any) -> NDArray[Any]:
            return toy_data.pixels.take(indices)[:, ::2, ::2].copy()

    return replace(toy_data, pixels=Small())


def every_step_anew(network: Any, data: Any, geometry: Any, *_: Any) -> Any:
    return network, data, geometry


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", [name if name == "custom_cnn" else pytest.param(name, marks=pytest.mark.long) for name in HEADS]
)
def test_the_weights_are_those_of_a_training_on_pixels(
    name: str, precision: str, head_only: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    settings = head_only.with_values(
        {
            "model.name": name, "model.side_px": 32, "precision": precision, "optimizer.accumulate_steps": 2,
            "optimizer.ema_decay": 0.9, "loss.label_smoothing": 0.1, "sampler": "balanced",
        }
    )  # fmt: skip
    once = train(settings, toy_data, three_classes)
    monkeypatch.setattr(loop, "without_frozen", every_step_anew)
    anew = train(settings, toy_data, three_classes)
    one, two = once.weights(), anew.weights()
    # bf16 rounds to 3 digits in every step.
    allowed = 1e-4 if precision == "fp32" else 0.02
    for key in two:
        scale = max(1.0, float(np.abs(two[key]).max()))
        assert np.abs(one[key] - two[key]).max() <= allowed * scale, key
    assert [report.val_loss for report in once.reports] == pytest.approx(
        [report.val_loss for report in anew.reports], abs=allowed
    )
    assert len({report.val_loss for report in once.reports}) == 3


def test_every_image_is_seen_once_however_many_epochs(
    head_only: TrainersSettings, small_data: TrainingData, three_classes: Taxonomy, tmp_path: Path
) -> None:
    counts = []
    for epochs in (1, 3):
        pixels = Counted(small_data.pixels)
        run = SingleWorker(tmp_path / str(epochs), use_gpu=False)
        train(head_only.with_values({"epochs": epochs}), replace(small_data, pixels=pixels), three_classes, workers=run)
        counts.append(pixels.taken)
        # Their file has no name.
        assert [path.name for path in (tmp_path / str(epochs)).iterdir()] == ["checkpoint.pt"]
    # The mean and deviation of the pixels are those of the images to train on.
    assert counts == [len(small_data.train_index) + len(small_data.pixels)] * 2


def test_a_resumed_run_ends_with_the_same_weights(
    head_only: TrainersSettings, small_data: TrainingData, three_classes: Taxonomy, tmp_path: Path
) -> None:
    whole = train(head_only, small_data, three_classes).weights()
    train(head_only, small_data, three_classes, workers=SingleWorker(tmp_path, use_gpu=False), pause_after=1)
    resumed = train(head_only, small_data, three_classes, workers=SingleWorker(tmp_path, use_gpu=False)).weights()
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(
    "values",
    [{"augmentation": "flips"}, {"augmentation": "ops:cutout@0.1*0.2/2:d4@1"}, {"optimizer.trainable_blocks": 1}],
    ids=["another image in every epoch", "in later epochs", "a block that moves"],
)
def test_what_changes_is_computed_in_every_step(
    values: dict[str, Any], head_only: TrainersSettings, small_data: TrainingData, three_classes: Taxonomy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = []

    def noted(*given: Any) -> Any:
        found.append(result := frozen.without_frozen(*given))
        return result

    monkeypatch.setattr(loop, "without_frozen", noted)
    train(head_only.with_values({"epochs": 1, **values}), small_data, three_classes)
    ((network, data, geometry),) = found
    assert data.pixels is small_data.pixels
    assert geometry is not None
    assert network.get_submodule("features") is not None


def test_streams_and_groups_compute_in_every_step(
    head_only: TrainersSettings, small_data: TrainingData, make_network: Callable[..., Any]
) -> None:
    from records.bundles import Geometry
    from trainers.optimization.freezing import freeze

    network, geometry, alone = make_network("resnet18", 3, seed=0), Geometry(side_px=16), SingleWorker(use_gpu=False)
    freeze(network, 0)
    streamed = replace(small_data, stream=lambda parts: map(small_data.pixels.take, parts))
    as_they_are = Policy(name="none")
    assert frozen.without_frozen(network, streamed, geometry, as_they_are, "fp32", alone)[2] is geometry
    two = SingleWorker(use_gpu=False)
    two.world_size = 2
    assert frozen.without_frozen(network, small_data, geometry, as_they_are, "fp32", two)[2] is geometry
    head, data, scaled_by = frozen.without_frozen(network, small_data, geometry, as_they_are, "fp32", alone)
    assert scaled_by is None
    assert data.pixels.take([0, 5]).shape == (2, 512)
    assert [name for name, _ in head.named_children()] == ["dropout", "linear"]


def test_a_full_disk_is_a_sentence(
    head_only: TrainersSettings, small_data: TrainingData, three_classes: Taxonomy, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frozen, "TemporaryFile", full)
    with pytest.raises(UnavailableError, match=r"features cannot be written \(No space left.*; free some space"):
        train(head_only, small_data, three_classes, workers=SingleWorker(tmp_path, use_gpu=False))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(name="a"), True),
        (Policy(name="a", phases=(Phase(from_epoch=2),)), True),
        (Policy(name="a", operations=(FLIP,)), False),
        (Policy(name="a", phases=(Phase(from_epoch=2, operations=(FLIP,)),)), False),
        (Policy(name="a", mixing=Mixing(kind="mixup", alpha=0.4)), False),
    ],
)
def test_a_policy_that_changes_nothing(policy: Policy, expected: bool) -> None:
    assert policy.changes_nothing is expected
