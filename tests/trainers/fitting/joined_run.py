"""Trainings that two processes share over gloo, with no Ray: `python joined_run.py RANK PORT FOLDER CASE ...`.

`test_strategies` is rank 0 and starts the other one; rank 0 leaves one file of weights and figures per case. All cases
are trained one after the other, so that torch is imported once per process.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist

from records.taxonomy import DiagnosisClass, Taxonomy
from trainers.fitting.checkpoints import Checkpoint
from trainers.fitting.epoch_report import CLOCKS
from trainers.fitting.loop import TrainedModel, TrainingData, train
from trainers.fitting.workers import ProcessGroup
from trainers.optimization.strategies import strategy_of
from trainers.settings import TrainersSettings

CLASSES = tuple(DiagnosisClass(code=code, name=code, malignant=False) for code in ("red", "green", "blue"))
COLOURS = Taxonomy(name="colours", version=1, classes=CLASSES)
PLAIN = {
    "model.name": "custom_cnn_base", "model.dropout": 0.0, "batch_size": 16, "epochs": 2,
    "optimizer.learning_rate": 0.02,
}  # fmt: skip
EVERYTHING = {
    **PLAIN, "optimizer.accumulate_steps": 2, "optimizer.clip_norm": 0.5, "optimizer.l1": 1e-4,
    "optimizer.ema_decay": 0.9,
}  # fmt: skip
NORMS = {
    **PLAIN, "model.name": "custom_cnn", "model.dropout": 0.01, "epochs": 5, "optimizer.learning_rate": 0.05,
}  # fmt: skip
RESNET = {"model.name": "resnet18", "batch_size": 4, "epochs": 1, "optimizer.learning_rate": 0.005}

CASES: dict[str, dict[str, object]] = {
    "plain-ddp": PLAIN,
    "plain-fsdp": PLAIN,
    "everything-ddp": EVERYTHING,
    "everything-fsdp": {**EVERYTHING, "optimizer.name": "adam", "optimizer.learning_rate": 1e-3},
    "uneven-elastic": {**PLAIN, "batch_size": 17},
    "norms-ddp": NORMS,
    "norms-fsdp": NORMS,
    "resnet-ddp": RESNET,
    "resnet-fsdp": RESNET,
}


class Rows:
    """Noisy images in memory; the class is the brightest colour."""

    def __init__(self, labels: np.ndarray) -> None:
        pixels = np.random.default_rng(5).integers(60, 140, size=(len(labels), 32, 32, 3))
        pixels[np.arange(len(labels)), :, :, labels] += 60
        self._pixels = pixels.astype(np.uint8)

    def __len__(self) -> int:
        return len(self._pixels)

    def take(self, indices: object) -> np.ndarray:
        return self._pixels[indices]


def images(num_train: int = 80, num_val: int = 141) -> TrainingData:
    """Images to train on, and to validate with an odd number, which two workers cannot share evenly."""
    total = num_train + num_val
    labels = np.arange(total) % 3
    ids = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(total)]
    return TrainingData(Rows(labels), ids, labels, np.arange(num_train), np.arange(num_train, total))


def settings_of(case: str, num_workers: int) -> TrainersSettings:
    """Return a case's settings; one worker is always single."""
    strategy = case.split("-")[1] if num_workers > 1 else "single"
    shared = {
        "model.side_px": 32, "precision": "fp32", "augmentation": "flips", "workers.threads": 1,
        "workers.use_gpu": False, "workers.strategy": strategy, "workers.count": num_workers,
    }  # fmt: skip
    return TrainersSettings().with_values({**shared, **CASES[case]})


def train_case(case: str, rank: int, folder: Path | None) -> TrainedModel:
    """Train one case as one of two workers."""
    settings = settings_of(case, 2)
    group = ProcessGroup(strategy_of(settings.workers), rank, 2, torch.device("cpu"), folder)
    data = images(8, 3) if case.startswith("resnet") else images()
    return train(settings, data, COLOURS, workers=group)


def train_all(rank: int, port: int, folder: Path, cases: Sequence[str]) -> None:
    """Train the cases; then stop a sharded run half-way, for a single process to go on with, and runs that go on."""
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=240))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=240))
    for case in cases:
        model = train_case(case, rank, None)
        if rank == 0:
            scores = [report.val_balanced_accuracy for report in model.reports]
            np.savez(folder / f"{case}.npz", **model.weights(), _scores=scores, _loss=model.reports[-1].train_loss)
    stop_half_way(rank, folder / "half")
    stop_in_the_first_epoch(rank, folder)
    dist.destroy_process_group()


class StoppedError(Exception):
    """Stands for whatever ends a run in the middle of an epoch."""


@dataclass(frozen=True)
class Moment:
    """Where a run stops: at a checkpoint, before it is kept or after."""

    epochs_done: int
    step: int
    kept: bool


MOMENTS = (Moment(0, 2, False), Moment(0, 2, True), Moment(0, 4, True), Moment(1, 0, False), Moment(1, 0, True))
"""All in the first epoch, whose five steps have a checkpoint after the second and the fourth."""


class Stopping(ProcessGroup):
    """Workers that go down at a moment."""

    def stop_at(self, moment: Moment) -> "Stopping":
        """Set the moment."""
        self._moment = moment
        return self

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep the checkpoint, or stop before or after that."""
        here = (checkpoint.epochs_done, checkpoint.step) == (self._moment.epochs_done, self._moment.step)
        if not here or self._moment.kept:
            super().save(checkpoint)
        if here:
            raise StoppedError


def train_until(moment: Moment, settings: TrainersSettings, rank: int, folder: Path) -> None:
    """Train as one of two workers that stop at a moment."""
    folder.mkdir(exist_ok=True)
    group = Stopping(strategy_of(settings.workers), rank, 2, torch.device("cpu"), folder).stop_at(moment)
    with contextlib.suppress(StoppedError):
        train(settings, images(), COLOURS, workers=group)


def stop_half_way(rank: int, folder: Path) -> None:
    """Train a sharded run until its second epoch is half done."""
    settings = settings_of("everything-fsdp", 2).with_values({"workers.checkpoint_every_steps": 3})
    train_until(Moment(1, 3, True), settings, rank, folder)


def stop_in_the_first_epoch(rank: int, folder: Path) -> None:
    """Stop and resume a run at each moment; rank 0 leaves what became of these and of an undisturbed run.

    With this seed the mean of the first losses, summed up over the workers half-way, is easily rounded differently.
    """
    base = settings_of("everything-ddp", 2).with_values(
        {"model.dropout": 0.1, "augmentation": "light", "workers.checkpoint_every_steps": 2, "seed": 3}
    )
    found = []
    for number, moment in enumerate((None, *MOMENTS)):
        own = folder / f"stopped-{number}"
        if moment is not None:
            train_until(moment, base, rank, own)
        settings = base.with_values({"workers.feeders": number % 3})
        group = ProcessGroup(strategy_of(settings.workers), rank, 2, torch.device("cpu"), own if moment else None)
        model = train(settings, images(), COLOURS, workers=group)
        figures = [report.model_dump(exclude=set(CLOCKS)) for report in model.reports]
        weights = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in model.weights().items()}
        found.append({"figures": figures, "weights": weights, "config": settings.kept()})
    if rank == 0:
        (folder / "stopped.json").write_text(json.dumps(found))


if __name__ == "__main__":
    train_all(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
