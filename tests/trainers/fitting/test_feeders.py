"""Feeder processes: the same batches and weights for any number of them; their deaths stop nothing."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from records.taxonomy import Taxonomy
from trainers.augmentation import Augmenter, load_policy
from trainers.augmentation.operations import Canvas
from trainers.fitting.epoch_report import EpochReport
from trainers.fitting.feeder_processes import lacking_memory
from trainers.fitting.feeding import Feeder
from trainers.fitting.loop import TrainedModel, TrainingData, train
from trainers.fitting.workers import SingleWorker, feeders_of
from trainers.settings import TrainersSettings, WorkersSettings

SETTINGS = TrainersSettings().with_values({"batch_size": 16, "model.side_px": 32})
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = multiprocessing.active_children()
    yield
    assert [child for child in multiprocessing.active_children() if child not in before] == []


def feeder(data: TrainingData, feeders: int, policy: str, **shared: int) -> Feeder:
    augmenter = Augmenter(load_policy(policy), Canvas(32, (128.0, 128.0, 128.0)))
    rows = (data.pixels, data.labels, data.image_ids, data.train_index)
    return Feeder(*rows, augmenter, SETTINGS.with_values({"augmentation": policy}), feeders=feeders, **shared)


def batches(source: Feeder, *epochs: int) -> list[tuple[bytes, ...]]:
    """Return all that batches hold; the source is closed."""
    found = [
        (batch.pixels.tobytes(), batch.labels.tobytes(), batch.rows.tobytes(), str(batch.share).encode(),
         b"" if batch.partner_labels is None else batch.partner_labels.tobytes())
        for epoch in epochs for batch in source.epoch(epoch)
    ]  # fmt: skip
    source.close()
    return found


@pytest.mark.parametrize(
    "policy", ["mixup", "cutmix", "ops:rotate@1*0.1+d4@1/3:rotate@1*0.8+vertical_flip@0.5", "none"]
)
def test_any_number_of_processes_gives_the_same_batches(policy: str, toy_data: TrainingData) -> None:
    alone = batches(feeder(toy_data, 0, policy), 2, 0, 1)
    assert len(alone) == 3 * 5
    for count in (1, 3):
        assert batches(feeder(toy_data, count, policy), 2, 0, 1) == alone


def test_workers_with_feeders_share_a_batch_as_workers_without(toy_data: TrainingData) -> None:
    for rank in (0, 1):
        with_processes, alone = (
            batches(feeder(toy_data, count, "mixup", rank=rank, world_size=2), 1) for count in (2, 0)
        )
        assert with_processes == alone


def test_an_epoch_that_is_left_early_does_not_leak_into_the_next(toy_data: TrainingData) -> None:
    source = feeder(toy_data, 2, "light")
    left = source.epoch(0)
    next(left)
    left.close()
    assert batches(source, 1) == batches(feeder(toy_data, 0, "light"), 1)


@pytest.fixture(scope="module")
def settings(toy_settings: TrainersSettings) -> TrainersSettings:
    """With dropout, which depends on torch's own generator, and an average of the weights."""
    return toy_settings.with_values(
        {"model.dropout": 0.1, "optimizer.ema_decay": 0.9, "augmentation": "light", "epochs": 2}
    )


@pytest.fixture(scope="module")
def alone(settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy) -> TrainedModel:
    return train(fed(settings, 0), toy_data, three_classes)


def fed(settings: TrainersSettings, feeders: int) -> TrainersSettings:
    return settings.with_values({"workers.feeders": feeders, "workers.checkpoint_every_steps": 1})


def same_weights(a: TrainedModel, b: TrainedModel) -> bool:
    left, right = a.weights(), b.weights()
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("feeders", [1, 4])
def test_any_number_of_processes_gives_the_same_weights(
    settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, alone: TrainedModel, feeders: int
) -> None:
    assert same_weights(train(fed(settings, feeders), toy_data, three_classes), alone)


class KilledError(Exception):
    """Stands for the end of the process."""


class Rows:
    """Pixels that are read so many times."""

    def __init__(self, data: TrainingData, readings: int) -> None:
        self._data, self._left = data, readings

    def __len__(self) -> int:
        return len(self._data.pixels)

    def take(self, indices: object) -> np.ndarray:
        self._left -= 1
        if self._left < 0:
            raise KilledError
        return self._data.pixels.take(indices)


def test_a_run_that_died_within_an_epoch_goes_on_with_another_number_of_them(
    settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, alone: TrainedModel, tmp_path: Path
) -> None:
    # Mean and deviation, and two of three batches of the first epoch.
    dying = TrainingData(Rows(toy_data, 3), *list(toy_data.__dict__.values())[1:])
    group = SingleWorker(tmp_path, use_gpu=False)
    with pytest.raises(KilledError):
        train(fed(settings, 0), dying, three_classes, workers=group)
    found = group.load()
    assert found is not None
    assert (found.epochs_done, found.step) == (0, 2)
    train(fed(settings, 1), toy_data, three_classes, workers=group, pause_after=1)
    assert same_weights(train(fed(settings, 2), toy_data, three_classes, workers=group), alone)


def test_a_run_outlives_a_feeder_that_is_killed(
    settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, alone: TrainedModel,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    before = multiprocessing.active_children()
    killed: list[int | None] = []

    def kill_one(report: EpochReport) -> bool:
        if report.epoch == 1:
            process = next(child for child in multiprocessing.active_children() if child not in before)
            os.kill(process.pid or 0, signal.SIGKILL)
            killed.append(process.pid)
        return False

    model = train(fed(settings, 2), toy_data, three_classes, on_epoch=kill_one)
    assert same_weights(model, alone)
    (said,) = [record.getMessage() for record in caplog.records if "feeder" in record.getMessage()]
    assert f"feeder process {killed[0]} of trainers.workers.feeders=2 was ended by SIGKILL" in said
    assert said.endswith("the training goes on with its feeder thread")


def test_shared_memory_that_is_too_small_stops_nothing(
    toy_data: TrainingData, file_size_limit: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    # A batch has 49,152 bytes; shared memory is made of files, which cannot be that long for now.
    file_size_limit(30_000)
    assert batches(feeder(toy_data, 2, "light"), 0) == batches(feeder(toy_data, 0, "light"), 0)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "found no room in shared memory (/dev/shm); enlarge it (docker run --shm-size=2g;" in said


def test_too_little_shared_memory_is_seen_before_it_is_used(tmp_path: Path) -> None:
    assert lacking_memory(1) is None
    lacking = lacking_memory(10**18)
    assert lacking is not None
    assert lacking.startswith("feeder processes need 1000000000000 MB of shared memory and /dev/shm has ")
    assert "--shm-size" in lacking
    assert "is not there; set trainers.workers.feeders=0" in str(lacking_memory(1, str(tmp_path / "none")))


def test_an_error_in_a_process_reaches_the_loop(toy_data: TrainingData) -> None:
    broken = TrainingData(Rows(toy_data, 2), *list(toy_data.__dict__.values())[1:])
    source = feeder(broken, 1, "light")
    with pytest.raises(KilledError):
        list(source.epoch(0))
    source.close()


def test_how_many_there_are_by_themselves() -> None:
    cores = WorkersSettings(threads=2), WorkersSettings(threads=16), WorkersSettings(threads=64)
    assert [feeders_of(workers, CPU) for workers in cores] == [0, 2, 8]
    assert [feeders_of(workers, GPU) for workers in cores] == [1, 15, 16]
    assert feeders_of(WorkersSettings(threads=64, data_source="stream"), GPU) == 0
    assert feeders_of(WorkersSettings(threads=2, feeders=5), CPU) == 5
    with pytest.raises(ValueError, match=r"feeders is 2 and data_source 'stream', .* take feeders=0"):
        WorkersSettings(data_source="stream", feeders=2)
