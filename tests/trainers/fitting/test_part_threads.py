"""Parts of a batch side by side: the gradient that they have one after the other, and the same weights each time."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from records.bundles import Geometry
from records.taxonomy import Taxonomy
from trainers.fitting.feeding import Batch
from trainers.fitting.loop import TrainedModel, TrainingData, train
from trainers.fitting.part_threads import PartThreads, _OwnRandom, parallel_parts_of, part_threads
from trainers.fitting.steps import Stepper
from trainers.fitting.workers import SingleWorker, compute_threads
from trainers.settings import OptimizerSettings, TrainersSettings

CPU = torch.device("cpu")
PARTS = {"workers.parallel_parts": 2, "workers.threads": 2, "augmentation": "light"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"workers.threads": 2}, 2),
        ({"workers.threads": 2, "batch_size": 63}, 1),
        ({"workers.threads": 16}, 2),
        ({"workers.threads": 6, "batch_size": 256}, 6),
        ({"workers.threads": 6, "batch_size": 128}, 3),
        ({"workers.threads": 7, "batch_size": 128}, 1),
        ({"workers.threads": 4, "batch_size": 128, "optimizer.accumulate_steps": 2}, 2),
        ({"workers.threads": 1}, 1),
        ({"workers.threads": 2, "workers.parallel_parts": 5}, 5),
        ({"workers.threads": 2, "workers.parallel_parts": 1}, 1),
        ({"workers.threads": 2, "workers.compile": True}, 1),
        ({"workers.threads": 2, "workers.count": 2}, 1),
        ({"workers.threads": 2, "workers.strategy": "fsdp"}, 1),
    ],
)
def test_a_part_is_a_threads_and_not_too_small_for_batch_norm(changes: dict[str, Any], parts: int) -> None:
    settings = TrainersSettings(batch_size=64).with_values(changes)
    assert parallel_parts_of(settings, CPU) == parts
    assert parallel_parts_of(settings, torch.device("cuda")) == 1


@pytest.mark.parametrize("other", [{"workers.count": 2}, {"workers.compile": True}, {"workers.strategy": "ddp"}])
def test_parts_that_nothing_computes_side_by_side_are_refused(other: dict[str, Any]) -> None:
    TrainersSettings().with_values({**other, "workers.parallel_parts": 1})
    with pytest.raises(ValidationError, match=r"parallel_parts is 2 and .* take parallel_parts=auto"):
        TrainersSettings().with_values({**other, "workers.parallel_parts": 2})


class Small(nn.Module):
    """A convolution with batch norm, a linear layer, and whatever a test puts between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.between = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), between
        self.linear = nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.between(self.norm(self.conv(inputs)).relu()).mean(dim=(2, 3)))
        return logits


def steps(
    data: TrainingData, between: nn.Module, parts: int, *, together: bool, count: int = 3
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Take steps of a batch; return the network's state after them, and the losses."""
    torch.manual_seed(1)
    network = Small(between)
    settings = OptimizerSettings(accumulate_steps=1 if together else parts)
    stepper = Stepper(
        network, torch.optim.SGD(network.parameters(), lr=0.1), None, nn.CrossEntropyLoss(),
        Geometry(side_px=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)), "fp32", CPU, settings,
        side_by_side=PartThreads(network, parts, parts) if together else None,
    )  # fmt: skip
    batch = Batch(data.pixels.take(np.arange(24)), data.labels[:24], np.arange(24))
    with compute_threads(1):
        losses = [float(stepper.train_step(batch)) for _ in range(count)]
    stepper.close()
    return network.state_dict(), losses


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_the_gradient_is_that_of_parts_one_after_the_other(toy_data: TrainingData, parts: int) -> None:
    together, losses = steps(toy_data, nn.Identity(), parts, together=True)
    one_by_one, expected = steps(toy_data, nn.Identity(), parts, together=False)
    assert losses == expected
    running = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    for name in together.keys() - running:
        assert torch.equal(together[name], one_by_one[name]), name
    # Threads do not write running means, which are measured before each validation.
    assert torch.equal(together["norm.running_mean"], torch.zeros(8))
    assert together["norm.num_batches_tracked"] == 0


def test_more_parts_than_threads_are_computed_in_turns(toy_data: TrainingData) -> None:
    torch.manual_seed(1)
    network, lock, most, running = Small(nn.Identity()), threading.Lock(), 0, 0
    pair = threading.Barrier(2, timeout=60)

    def loss_of(part: Batch) -> torch.Tensor:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        if part.rows[0] < 16:  # all but the last, which is alone
            pair.wait()
        with lock:
            running -= 1
        logits: torch.Tensor = network(torch.ones(len(part.rows), 3, 8, 8))
        return logits.sum()

    threads = PartThreads(network, 2, 2)
    threads.add_gradient(
        loss_of, Batch(toy_data.pixels.take(np.arange(20)), toy_data.labels[:20], np.arange(20)).parts(5)
    )
    threads.close()
    assert most == 2
    assert network.linear.bias.grad is not None
    assert torch.allclose(network.linear.bias.grad, torch.full((3,), 4.0))  # a fifth of 20 images
    assert network.norm.track_running_stats


def test_threads_share_those_of_the_worker_and_leave_the_caller_as_it_was() -> None:
    before = sys.getswitchinterval()
    with compute_threads(6):
        threads = PartThreads(nn.Linear(2, 2), 3, 6)
        assert {threads._pool.submit(torch.get_num_threads).result() for _ in range(9)} == {2}
        assert torch.get_num_threads() == 6
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 6
        assert sys.getswitchinterval() < before
        threads.close()
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize("between", [nn.Dropout(0.5), nn.Dropout(0.5, inplace=True)])
def test_each_part_draws_from_its_own_generator(toy_data: TrainingData, between: nn.Module) -> None:
    state, losses = steps(toy_data, between, 2, together=True, count=8)
    again, same = steps(toy_data, between, 2, together=True, count=8)
    assert losses == same
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert losses != steps(toy_data, nn.Identity(), 2, together=True, count=8)[1]


class UnknownRandom(nn.Module):
    """Draws from torch's global generator by a function that takes no other one."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return functional.alpha_dropout(values, 0.3, training=self.training)


def test_a_network_that_draws_otherwise_is_computed_part_by_part(
    toy_data: TrainingData, caplog: pytest.LogCaptureFixture
) -> None:
    state, losses = steps(toy_data, UnknownRandom(), 2, together=True)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "parts of a batch are computed one after the other" in said
    again, same = steps(toy_data, UnknownRandom(), 2, together=True)
    assert losses == same
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_own_draws_leave_torchs_generator_alone_and_have_the_asked_rate() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    values = torch.ones(200_000)
    with _OwnRandom(5):
        dropped, off = functional.dropout(values, 0.25), functional.dropout(values, 0.25, training=False)
        none, all_of_it = functional.dropout(values, 0.0), functional.dropout(values, 1.0)
        drawn = torch.rand(5), torch.randint(9, (5,)), torch.empty(5).bernoulli_(0.5), torch.randn(5), torch.randperm(5)
        given = torch.rand(5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert sorted(set(dropped.tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(off, values)
    assert torch.equal(none, values)
    assert not all_of_it.any()
    assert torch.equal(given, torch.rand(5, generator=torch.Generator().manual_seed(1)))
    with _OwnRandom(5):
        functional.dropout(values, 0.25), functional.dropout(values, 1.0)
        again = torch.rand(5), torch.randint(9, (5,)), torch.empty(5).bernoulli_(0.5), torch.randn(5), torch.randperm(5)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_a_part_that_fails_ends_the_step_after_the_others(toy_data: TrainingData) -> None:
    network, ended = Small(nn.Identity()), list[int]()

    def loss_of(part: Batch) -> torch.Tensor:
        if part.rows[0] == 0:
            raise RuntimeError("first part")
        time.sleep(0.1)
        ended.append(int(part.rows[0]))
        logits: torch.Tensor = network(torch.ones(len(part.rows), 3, 8, 8))
        return logits.sum()

    threads = PartThreads(network, 2, 2)
    parts = Batch(toy_data.pixels.take(np.arange(8)), toy_data.labels[:8], np.arange(8)).parts(2)
    with pytest.raises(RuntimeError, match="first part"):
        threads.add_gradient(loss_of, parts)
    assert ended == [4]
    assert network.norm.track_running_stats
    assert all(parameter.grad is None for parameter in network.parameters())
    threads.close()


def same(a: TrainedModel, b: TrainedModel) -> bool:
    left, right = a.weights(), b.weights()
    return all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "network",
    [
        {"model.name": "custom_cnn"},  # drops positions
        {"model.name": "custom_cnn", "precision": "bf16"},  # autocast's cache of weights is one for all threads
        pytest.param({"model.name": "custom_cnn", "model.dropout": 0.3}, marks=pytest.mark.long),
        {"model.name": "efficientnet_lite0", "model.side_px": 32, "epochs": 2},  # dropout, and drops whole residuals
        pytest.param({"model.name": "mobilenet_v3", "epochs": 2}, marks=pytest.mark.long),
    ],
)
def test_a_killed_run_of_parts_ends_as_an_uninterrupted_one(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path,
    network: dict[str, Any], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings = toy_settings.with_values({**PARTS, "workers.checkpoint_every_steps": 1, **network})
    whole = train(settings, toy_data, three_classes)
    steps_taken = 0

    class KilledError(Exception):
        pass

    def kill(epoch: int, step: int, steps: int) -> None:
        nonlocal steps_taken
        steps_taken += 1
        if steps_taken == 5:
            raise KilledError

    with pytest.raises(KilledError):
        train(settings, toy_data, three_classes, workers=SingleWorker(tmp_path, use_gpu=False), on_step=kill)
    resumed = train(settings, toy_data, three_classes, workers=SingleWorker(tmp_path, use_gpu=False))
    assert same(resumed, whole)
    assert [report.train_loss for report in resumed.reports] == [report.train_loss for report in whole.reports]
    assert not caplog.records
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("part")]


def test_training_takes_the_parts_of_its_settings(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy
) -> None:
    """Batch norm takes its mean over a part, so another number of parts is another model."""
    two = train(toy_settings.with_values(PARTS), toy_data, three_classes)
    one = train(toy_settings.with_values({**PARTS, "workers.parallel_parts": 1}), toy_data, three_classes)
    assert not same(one, two)
    for model in (one, two):  # what three short epochs reach depends on how a machine rounds; that they learn does not
        assert model.reports[-1].train_loss < model.reports[0].train_loss
    assert part_threads(nn.Linear(2, 2), toy_settings, CPU) is None
