"""Single steps: a hand-made update, the watch over the loss, measured batch norm, validation by shares."""

from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from records.bundles import Geometry
from records.errors import DivergedError
from records.taxonomy import Taxonomy
from trainers.fitting.epoch_report import EpochReport, best_epoch_of
from trainers.fitting.feeding import Batch
from trainers.fitting.steps import LossWatch, Stepper, validate
from trainers.fitting.training_data import TrainingData
from trainers.fitting.workers import SingleWorker
from trainers.settings import BestBy, OptimizerSettings

IDS = [f"{number:064x}" for number in range(200)]
CPU = torch.device("cpu")


def batch(rows: list[int]) -> Batch:
    size = len(rows)
    return Batch(np.zeros((size, 4, 4, 3), np.uint8), np.zeros(size, np.int64), np.array(rows, dtype=np.int64))


def make_stepper(network: nn.Module, geometry: Geometry, settings: OptimizerSettings | None = None) -> Stepper:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return Stepper(
        network, optimizer, None, nn.CrossEntropyLoss(), geometry, "fp32", CPU, settings or OptimizerSettings()
    )


class Flat(nn.Module):
    """Logits are a linear function of the mean colour."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, num_classes, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(inputs.mean(dim=(2, 3)))
        return logits


def test_a_step_by_hand() -> None:
    # White is 1 after (x - 0) / 1, softmax of zeros is 1/2, so dL/dw = (p - y) * x = -0.5 for the true class.
    network = Flat(2)
    stepper = make_stepper(network, Geometry(side_px=4, mean=(0, 0, 0), std=(1, 1, 1)))
    white = Batch(np.full((3, 4, 4, 3), 255, np.uint8), np.zeros(3, np.int64), np.arange(3))
    assert stepper.train_step(white).item() == pytest.approx(np.log(2))
    assert torch.allclose(network.linear.weight.detach(), torch.tensor([[0.05] * 3, [-0.05] * 3]))


def test_a_mixed_step_by_hand() -> None:
    # With 3/4 of class 0 and 1/4 of class 1 the target is (0.75, 0.25): dL/dw = (0.5 - 0.75) * x.
    network = Flat(2)
    stepper = make_stepper(network, Geometry(side_px=4, mean=(0, 0, 0), std=(1, 1, 1)))
    white, zeros = np.full((3, 4, 4, 3), 255, np.uint8), np.zeros(3, np.int64)
    mixed = Batch(white, zeros, np.arange(3), partner_labels=np.ones(3, np.int64), share=0.75)
    assert stepper.train_step(mixed).item() == pytest.approx(np.log(2))
    assert torch.allclose(network.linear.weight.detach(), torch.tensor([[0.025] * 3, [-0.025] * 3]))


def test_l1_by_hand() -> None:
    # Weights 2 and -2 of a grey image whose input is 0: the loss has no gradient, L1 pulls by its weight.
    network = Flat(2)
    with torch.no_grad():
        network.linear.weight.copy_(torch.tensor([[2.0] * 3, [-2.0] * 3]))
    stepper = make_stepper(
        network, Geometry(side_px=4, mean=(0, 0, 0), std=(1, 1, 1)), settings=OptimizerSettings(l1=0.05)
    )
    stepper.train_step(batch([0, 1]))
    assert torch.allclose(network.linear.weight.detach(), torch.tensor([[1.995] * 3, [-1.995] * 3]))


def test_weighted_parts_add_up_to_the_share() -> None:
    share = Batch(np.zeros((5, 4, 4, 3), np.uint8), np.arange(5), np.arange(5), weight=1.25)
    parts = share.parts(2)
    assert [len(part.rows) for part, _ in parts] == [3, 2]
    assert [weight for _, weight in parts] == [pytest.approx(0.75), pytest.approx(0.5)]
    assert np.concatenate([part.labels for part, _ in parts]).tolist() == [0, 1, 2, 3, 4]
    assert len(share.parts(9)) == 5


def test_the_watch_averages() -> None:
    watch = LossWatch(IDS)
    for value in (1.0, 2.0, 6.0):
        watch.add(torch.tensor(value), batch([0, 1]))
    assert watch.total() == pytest.approx(9.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_watch_names_step_and_images(value: float) -> None:
    watch = LossWatch(IDS)
    watch.add(torch.tensor(1.0), batch([0, 1]))
    watch.add(torch.tensor(value), batch(list(range(100, 110))))
    with pytest.raises(DivergedError, match=rf"at step 2 of the epoch, on images {IDS[100]}.* and 2 more; lower"):
        watch.add(torch.tensor(1.0), batch([0, 1]))


def test_the_watch_looks_at_the_last_step_too() -> None:
    watch = LossWatch(IDS)
    watch.add(torch.tensor(float("nan")), batch([3]))
    with pytest.raises(DivergedError, match=f"on images {IDS[3]};"):
        watch.total()


def test_batch_norm_is_measured_on_the_images_as_they_are(toy_data: TrainingData) -> None:
    norm = nn.BatchNorm2d(3)
    network = nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stepper = make_stepper(network, Geometry(side_px=32, mean=(0, 0, 0), std=(1, 1, 1)))
    stepper.refresh_statistics(toy_data.pixels, toy_data.train_index)
    values = toy_data.pixels.take(toy_data.train_index) / 255.0
    assert norm.running_mean is not None
    assert norm.running_mean.numpy() == pytest.approx(values.mean(axis=(0, 1, 2)), abs=2e-4)
    assert norm.running_var is not None
    assert norm.running_var.numpy() == pytest.approx(values.var(axis=(0, 1, 2)), rel=1e-3)
    assert norm.momentum == 0.1


@dataclass
class Share:
    """One of several workers; `gather` is answered from what the others computed before."""

    rank: int
    world_size: int
    parts: dict[int, NDArray[Any]] = field(default_factory=dict)
    device: torch.device = CPU

    def gather(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        self.parts[self.rank] = array
        return [self.parts.get(rank, array) for rank in range(self.world_size)]


def test_validation_by_shares_is_validation_of_the_whole(toy_data: TrainingData, three_classes: Taxonomy) -> None:
    network = Flat(3)
    nn.init.eye_(network.linear.weight)
    stepper = make_stepper(network, Geometry(side_px=32, mean=(0.4, 0.4, 0.4), std=(0.1, 0.1, 0.1)))
    whole = validate(stepper, toy_data, three_classes, SingleWorker(use_gpu=False))
    assert whole.balanced_accuracy == whole.accuracy == whole.key_class_sensitivity == whole.macro_auc == 1.0
    parts: dict[int, NDArray[Any]] = {}
    first, second = Share(0, 2, parts), Share(1, 2, parts)
    for group in (first, second, first):
        try:
            shared = validate(stepper, toy_data, three_classes, group)
        except ValueError:
            continue  # the first worker has no answer of the second yet
    assert shared == whole


def test_an_answer_that_is_not_finite_is_named(toy_data: TrainingData, three_classes: Taxonomy) -> None:
    network = Flat(3)
    nn.init.constant_(network.linear.weight, float("nan"))
    stepper = make_stepper(network, Geometry(side_px=32))
    with pytest.raises(DivergedError, match=f"val image {toy_data.image_ids[72]} are not finite"):
        validate(stepper, toy_data, three_classes, SingleWorker(use_gpu=False))


def test_the_best_epoch_is_that_of_the_figure_that_is_chosen() -> None:
    figures = [(0.6, 0.9, 1.0), (0.7, 0.8, 1.1), (0.5, 0.8, 0.9)]
    reports = [
        EpochReport(
            epoch=epoch, train_loss=0.5, val_loss=0.6, val_balanced_accuracy=accuracy, val_accuracy=0.7,
            key_class_sensitivity=None, val_macro_auc=auc, val_even_loss=loss, learning_rate=0.1, images_per_s=5.0,
            seconds=1.0,
        )
        for epoch, (accuracy, auc, loss) in enumerate(figures, 1)
    ]  # fmt: skip
    assert [best_epoch_of(reports, by) for by in get_args(BestBy)] == [2, 1, 3, 3]
    without = [report.model_copy(update={"val_macro_auc": None}) for report in reports]
    assert best_epoch_of(without, "macro_auc") == 1


def test_every_class_weighs_the_same_in_the_even_loss(toy_data: TrainingData, three_classes: Taxonomy) -> None:
    labels = toy_data.labels[toy_data.val_index]
    # One image of class 0 and all of the others: the loss of the whole hardly shows class 0.
    kept = np.concatenate([toy_data.val_index[labels == 0][:1], toy_data.val_index[labels != 0]])
    data = TrainingData(toy_data.pixels, toy_data.image_ids, toy_data.labels, toy_data.train_index, kept)
    network = Flat(3)
    nn.init.eye_(network.linear.weight)
    stepper = make_stepper(network, Geometry(side_px=32, mean=(0.4, 0.4, 0.4), std=(0.1, 0.1, 0.1)))
    found = validate(stepper, data, three_classes, SingleWorker(use_gpu=False))
    logits = torch.from_numpy(stepper.score(data.pixels, kept)).double()
    losses = nn.functional.cross_entropy(logits, torch.from_numpy(data.labels[kept]), reduction="none").numpy()
    by_class = [losses[data.labels[kept] == each].mean() for each in range(3)]
    assert found.even_loss == pytest.approx(np.mean(by_class))
    assert found.loss == pytest.approx(losses.mean())
    others = TrainingData(data.pixels, data.image_ids, data.labels, data.train_index, kept[:1])
    assert validate(stepper, others, three_classes, SingleWorker(use_gpu=False)).macro_auc is None


def test_a_key_class_without_images_has_no_sensitivity(toy_data: TrainingData, three_classes: Taxonomy) -> None:
    others = toy_data.val_index[toy_data.labels[toy_data.val_index] != 2]
    data = TrainingData(toy_data.pixels, toy_data.image_ids, toy_data.labels, toy_data.train_index, others)
    stepper = make_stepper(Flat(3), Geometry(side_px=32))
    assert validate(stepper, data, three_classes, SingleWorker(use_gpu=False)).key_class_sensitivity is None
