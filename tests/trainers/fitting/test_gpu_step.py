"""What a step does for a GPU, as far as a CPU shows it: losses read together, too little memory, first contact."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn

from records.bundles import Geometry
from records.errors import DivergedError, UnavailableError
from records.taxonomy import Taxonomy
from trainers.fitting.checkpoints import load_checkpoint
from trainers.fitting.contact import require_contact
from trainers.fitting.feeding import Batch
from trainers.fitting.loop import TrainingData, train
from trainers.fitting.memory import first_that_fits, largest_batch
from trainers.fitting.sharding import restore_optimizer
from trainers.fitting.steps import LossWatch, Stepper
from trainers.fitting.workers import SingleWorker
from trainers.optimization.optimizers import build_optimizer
from trainers.settings import OptimizerSettings, TrainersSettings

IDS = [f"{number:064x}" for number in range(200)]
FORK = multiprocessing.get_context("fork")


def rows(*numbers: int) -> Batch:
    size = len(numbers)
    return Batch(np.zeros((size, 4, 4, 3), np.uint8), np.zeros(size, np.int64), np.array(numbers))


@pytest.mark.parametrize("every", [1, 3, 100])
def test_losses_that_are_read_together_name_the_step_that_diverged(every: int) -> None:
    watch = LossWatch(IDS, every=every)
    taken: list[int] = []

    def run() -> None:
        for step in range(1, 20):
            watch.add(torch.tensor(float("nan") if step >= 4 else 1.0), rows(10 * step, 10 * step + 1))
            taken.append(step)
        watch.total()

    with pytest.raises(DivergedError, match=rf"is nan at step 4 of the epoch, on images {IDS[40]}, {IDS[41]};"):
        run()
    assert len(taken) < 4 + every
    finite = LossWatch(IDS, 2, 5.0, every=every)
    for value in (1.0, 2.0, 4.0):
        finite.add(torch.tensor(value), rows(0))
    assert finite.total() == 12.0


class Small(nn.Module):
    """Logits by mean colour, on a device that holds so many images at once."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.norm, self.linear, self.fits, self.seen = nn.BatchNorm2d(3), nn.Linear(3, 2), fits, list[int]()
        nn.init.zeros_(self.linear.bias)
        nn.init.eye_(self.linear.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(inputs))
        if len(inputs) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        # The norm is used where batches are measured; training is compared without it.
        inputs = inputs if self.training else self.norm(inputs)
        logits: torch.Tensor = self.linear(inputs.mean(dim=(2, 3)))
        return logits


def stepper(network: nn.Module, *, halves: bool = True) -> Stepper:
    geometry = Geometry(side_px=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    optimizer, cpu = torch.optim.SGD(network.parameters(), lr=0.1), torch.device("cpu")
    loss = nn.CrossEntropyLoss()
    return Stepper(network, optimizer, None, loss, geometry, "fp32", cpu, OptimizerSettings(), halves=halves)


def test_a_step_that_needs_too_much_memory_is_taken_in_parts(
    toy_data: TrainingData, caplog: pytest.LogCaptureFixture
) -> None:
    batch = Batch(toy_data.pixels.take(np.arange(24)), toy_data.labels[:24] % 2, np.arange(24))
    large, small = Small(1000), Small(7)
    whole, parts = stepper(large), stepper(small)
    for _ in range(2):
        assert parts.train_step(batch).item() == pytest.approx(whole.train_step(batch).item(), rel=1e-5)
    assert torch.allclose(large.linear.weight, small.linear.weight, atol=1e-6)
    assert small.seen == [24, 12, *[6] * 4, *[6] * 4]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("out of memory on cpu with 24 images at once: they are computed 6 at a time from now on")
    with pytest.raises(torch.OutOfMemoryError):
        stepper(Small(7), halves=False).train_step(batch)
    with pytest.raises(torch.OutOfMemoryError):  # two images are the fewest that batch norm can use
        stepper(Small(1)).train_step(batch)


def test_what_is_measured_and_scored_takes_fewer_images_at_once_too(toy_data: TrainingData) -> None:
    large, small = Small(1000), Small(20)
    for network in (large, small):
        stepper(network).refresh_statistics(toy_data.pixels, toy_data.train_index[:64])
    assert small.norm.running_mean is not None
    assert large.norm.running_mean is not None
    assert torch.allclose(large.norm.running_mean, small.norm.running_mean, atol=1e-5)
    assert small.norm.num_batches_tracked == 4  # none of those that did not fit
    scores = [stepper(network).score(toy_data.pixels, toy_data.val_index) for network in (large, small)]
    assert scores[1] == pytest.approx(scores[0], abs=0.01)  # variances are means over parts


def test_a_run_that_cannot_take_smaller_parts_says_what_to_set(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Stepper, "_logits", full)
    with pytest.raises(UnavailableError, match=r"epoch 1: cpu of worker 0 is out of memory; .*accumulate_steps=2 .*no"):
        train(toy_settings, toy_data, three_classes)


@pytest.mark.parametrize(("fits", "train_images", "found"), [
    (5000, 100_000, 1024), (100, 100_000, 64), (3, 100_000, 2), (5000, 1000, 32), (5000, 3, 2),
])  # fmt: skip
def test_the_largest_batch_that_fits(fits: int, train_images: int, found: int) -> None:
    tried: list[int] = []
    assert largest_batch(lambda size: tried.append(size) or within(fits)(size), train_images) == found
    assert tried == sorted(tried, reverse=True)
    with pytest.raises(torch.OutOfMemoryError):
        largest_batch(within(1), train_images)


def within(fits: int) -> Callable[[int], int]:
    def take(size: int) -> int:
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size

    return take


def test_errors_of_other_kinds_are_not_taken_for_too_little_memory() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"):
        first_that_fits(lambda _: (_ for _ in ()).throw(RuntimeError("illegal memory access")), [8, 4])


def test_a_batch_size_that_the_run_finds_stays_when_it_is_resumed(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path
) -> None:
    def weights(batch_size: object, *pauses: int | None) -> dict[str, Any]:
        settings = toy_settings.with_values({"batch_size": batch_size, "epochs": 2})
        group = SingleWorker(tmp_path / str(batch_size), use_gpu=False)
        for pause in pauses:
            found = train(settings, toy_data, three_classes, workers=group, pause_after=pause)
        return found.weights()

    by_itself, given = weights("auto", 1, None), weights(64, None)
    assert all(np.array_equal(by_itself[name], given[name]) for name in given)
    assert load_checkpoint(tmp_path / "auto" / "checkpoint.pt").batch_size == 64
    assert load_checkpoint(tmp_path / "64" / "checkpoint.pt").batch_size is None
    for change in ({"workers.count": 2}, {"optimizer.accumulate_steps": 4}):
        with pytest.raises(ValueError, match=r"batch_size 'auto' is found for one worker .*take a number, as batch_s"):
            toy_settings.with_values({"batch_size": "auto", **change})
    with pytest.raises(ValueError, match=r"greater than or equal to 2"):
        toy_settings.with_values({"batch_size": 1})


def test_an_optimizer_goes_on_the_way_its_own_device_computes() -> None:
    network = nn.Linear(2, 2)
    for name in ("sgd", "adam", "adamw", "rmsprop"):
        here, elsewhere = (build_optimizer(network, OptimizerSettings(name=name)) for _ in range(2))
        for group in elsewhere.param_groups:
            group |= {how: True for how in ("fused", "capturable") if how in group} | {"lr": 0.25}
        restore_optimizer(here, elsewhere.state_dict())
        assert [(group.get("fused"), group["lr"]) for group in here.param_groups] == [(None, 0.25)] * 2


@pytest.mark.parametrize("wanted", [False, True])
def test_a_network_is_compiled_where_the_settings_say_so(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, monkeypatch: pytest.MonkeyPatch,
    wanted: bool,
) -> None:  # fmt: skip
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))
    train(toy_settings.with_values({"epochs": 1, "workers.compile": wanted}), toy_data, three_classes)
    assert len(compiled) == wanted


@pytest.mark.soak
def test_a_compiled_network_learns_the_same(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy
) -> None:
    settings = toy_settings.with_values({"epochs": 1, "model.name": "custom_cnn_base", "model.dropout": 0.0})
    plain, compiled = (
        train(settings.with_values({"workers.compile": wanted}), toy_data, three_classes).weights()
        for wanted in (False, True)
    )
    assert all(np.allclose(plain[name], compiled[name], atol=1e-3) for name in plain)


def _join(rank: int, folder: Path, timeout_s: float, talks: bool, told: Any, over: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    try:
        if talks:
            require_contact(torch.device("cpu"), timeout_s)
            told.put("reached")
    except UnavailableError as error:
        told.put(str(error))
    over.wait(300)


@pytest.mark.parametrize("other_talks", [True, False])
def test_workers_that_cannot_talk_name_their_interface(
    other_talks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    told, over = FORK.Queue(), FORK.Event()
    timeout_s = 250.0 if other_talks else 0.5
    workers = [
        FORK.Process(target=_join, args=(rank, tmp_path, timeout_s, talks, told, over), daemon=True)
        for rank, talks in enumerate((True, other_talks))
    ]
    for worker in workers:
        worker.start()
    said = [told.get(timeout=600) for _ in range(1 + other_talks)]
    over.set()
    for worker in workers:
        worker.join(600)
        worker.kill()
    if other_talks:
        assert said == ["reached", "reached"]
    else:
        assert said[0].startswith("worker 0 of 2 reaches the others not by gloo within 0.5 s, with GLOO_SOCKET_IFN")
        assert "set GLOO_SOCKET_IFNAME on every machine to the interface that connects them (here there are" in said[0]
