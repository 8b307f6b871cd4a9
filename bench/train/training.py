"""Training throughput against the bare network, measured within one run so that ratios are comparable.

The bare rate is forward, backward and optimizer step of the same network on one batch in memory, with the same
precision, threads and optimizer; it is measured before and after the pipeline. The pipeline is what `relook train`
runs under Ray Train: pixel cache, augmentation, loop, checkpoints, reports. Its rate is over the wall time from one
report to the next, without the forward passes of batch norm statistics and of validation, which the bare steps do not
have. The first epoch warms up and is not counted. What a bare step loses to augmentation on the same cores is measured
with batches that one thread augments while the step before computes.
"""

import os
import statistics
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.progress import Progress

from bench.train.peers import Peers
from bench.train.plans import Plan, busy_neighbour, plans, two_share
from bench.train.raw import precision_of, raw_rate
from images.importer import import_folder
from images.synth import synthesize
from records.arrays import UInt8Array
from records.datasets import DatasetVersion, load_dataset
from records.errors import ConfigError
from records.frames import Frame
from records.store import Store
from trainers.augmentation import Augmenter, load_policy
from trainers.augmentation.operations import Canvas
from trainers.fitting.distributed import fit_distributed
from trainers.fitting.epoch_report import EpochReport
from trainers.fitting.feeding import Feeder
from trainers.fitting.job import job_of
from trainers.fitting.one_worker import TASK_NAME
from trainers.fitting.training_data import DataPlan, plan_data
from trainers.settings import TrainersSettings
from vision.seeding import image_keys, image_seeds

EPOCHS = 4
VAL_IMAGES = 64
LESIONS = 350
WIDTH_PX = 600
RAW_S = 6.0
STARTS = 3
WARM_UP_STEPS = 3
Figures = dict[str, Any]


def prepare(store: Store, data: Path | None, frame: Frame, folder: Path, bar: Progress) -> DataPlan:
    """Import what is trained on.

    Args:
        store: an empty one.
        data: folder of images; None generates some of HAM10000's size.
        frame: of the network.
        folder: for generated images.
        bar: progress is shown on it.
    Returns:
        Train and val images, decoded.
    """
    return plan_data(import_images(store, data, frame, folder, bar), store.taxonomy)


def import_images(store: Store, data: Path | None, frame: Frame, folder: Path, bar: Progress) -> DatasetVersion:
    """Import images to measure with.

    Args:
        store: an empty one.
        data: folder of images; None generates some of HAM10000's size.
        frame: for which they are decoded.
        folder: for generated images.
        bar: progress is shown on it.
    Returns:
        The dataset version of them.
    """
    if data is None:
        data = folder / "images"
        synthesize(data, lesions=LESIONS, seed=0, width_px=WIDTH_PX, progress=bar)
    report = import_folder(store, data, in_place=True, frames=(frame,), progress=bar)
    return load_dataset(store, report.dataset_id)


@dataclass
class Bench:
    """One run of the measurements.

    Args:
        store: with the images.
        settings: of the trainers; what is measured is what they train.
        plan: the images.
        folder: for runs and tables.
        epoch_s: seconds that an epoch of one worker shall take.
        peers: folder of the peers' environments, for Lightning; None leaves it out.
    """

    store: Store
    settings: TrainersSettings
    plan: DataPlan
    folder: Path
    epoch_s: float
    peers: Path | None
    _reasons: dict[str, str] = field(default_factory=dict)

    def run(self) -> Figures:
        """Measure everything; what cannot be measured is None, with its reason under `reasons`."""
        cores = len(os.sched_getaffinity(0))
        alone = self._under({"count": 1, "threads": cores})
        load = os.getloadavg()[0]
        first_start = self._start_s(self.plan, "first start")
        before = raw_rate(alone, len(self.store.taxonomy.codes))
        plan = self._cut(before)
        watch = MemoryWatch()
        with watch:
            rates = self._rates(plan, cores, "alone")
        default, pipeline = next(iter(rates.items()))
        raw = (before + raw_rate(alone, len(self.store.taxonomy.codes))) / 2
        with closing(augmented_batches(self.store, alone, plan)) as batches:
            augmented = raw_rate(alone, len(self.store.taxonomy.codes), batches=batches)
        shared = self._of_two_workers(rates, cores)
        with busy_neighbour(cores):
            beside = self._rates(plan, cores, "beside a neighbour")
        starts = statistics.median(self._start_s(plan, f"start {number}") for number in range(STARTS))
        one, two = (feeder_rate(self.store, alone, plan, feeders) for feeders in (1, 2))
        peers = Peers(self.store, self.settings, plan, self.folder, raw)
        plain, lightning = peers.plain_rate(), peers.lightning_rate(self.peers)
        return {
            "raw_images_s": _round(raw),
            "raw_with_augmentation_on_the_same_cores_images_s": _round(augmented),
            "pipeline_over_raw": _ratio(pipeline, raw),
            "pipeline_over_raw_with_augmentation": _ratio(pipeline, augmented),
            "pipeline_over_plain_fp32": _ratio(pipeline, plain),
            "pipeline_over_lightning": _ratio(pipeline, lightning),
            "ddp2_over_single": _ratio(shared, pipeline),
            "default_over_best_plan": _ratio(pipeline, max(rates.values())),
            "beside_a_neighbour": _ratio(beside[default], pipeline),
            "feeder_scaling_2": _ratio(two, one),
            "fit_start_s": round(starts, 1),
            "fit_first_start_s": round(first_start, 1),
            "peak_memory_mb": round(watch.peak_mb),
            "feeder_images_s": _round(one),
            "pipeline_images_s": _round(pipeline),
            "plain_fp32_images_s": _round(plain),
            "lightning_images_s": _round(lightning),
            "plans_images_s": rates,
            "plans_beside_a_neighbour_images_s": beside,
            "model": alone.model.name,
            "side_px": alone.model.side_px,
            "batch_size": alone.images_per_step,
            "precision": precision_of(alone),
            "threads": cores,
            "train_images": plan.num_train,
            "load_average_before": _round(load),
            "reasons": {**self._reasons, **peers.reasons},
        }

    def _cut(self, rate: float) -> DataPlan:
        """Choose as many training images as an epoch of the requested length needs, and a few for validation."""
        batch = self.settings.images_per_step
        wanted = max(2, round(rate * self.epoch_s / batch)) * batch
        num_train = min(wanted, max(batch, self.plan.num_train // batch * batch))
        if self.plan.num_train < batch:
            raise ConfigError(
                f"{self.plan.num_train} training images are fewer than one batch of {batch}; "
                f"take a folder with more, or --set trainers.batch_size={max(2, self.plan.num_train // 2 * 2)}"
            )
        rows = np.r_[0:num_train, self.plan.num_train : min(self.plan.num_train + VAL_IMAGES, len(self.plan.labels))]
        return DataPlan([self.plan.image_ids[row] for row in rows], self.plan.labels[rows], num_train)

    def _rates(self, plan: DataPlan, cores: int, where: str) -> dict[str, float]:
        """Return the rate of the pipeline under each plan, by its name, the default's first."""
        return {
            name: round(self._pipeline_rate(self._under(workers), plan, f"{name} {where}"), 1)
            for name, workers in plans(self.settings, cores).items()
        }

    def _under(self, workers: Plan) -> TrainersSettings:
        return _like(self.settings, {f"workers.{name}": value for name, value in workers.items()})

    def _of_two_workers(self, rates: dict[str, float], cores: int) -> float | None:
        if two_share(self.settings, cores):
            return list(rates.values())[-1]
        reason = "two workers cannot share this batch_size evenly" if cores > 1 else "this machine has one core"
        self._reasons["ddp2_over_single"] = reason
        return None

    def _start_s(self, plan: DataPlan, name: str) -> float:
        """Return the seconds from the call of a fit by one worker to its first step."""
        run_dir = self.folder / name
        run_dir.mkdir()
        settings = _like(self.settings, {"workers.count": 1, "epochs": 1})
        began = time.perf_counter()
        told: list[float] = []

        def note(report: EpochReport) -> bool:
            told.append(time.perf_counter() - began - report.seconds)
            return False

        # One batch, so that little but the start is measured.
        rows = np.r_[0 : self.settings.images_per_step, plan.num_train : len(plan.labels)]
        few = DataPlan([plan.image_ids[row] for row in rows], plan.labels[rows], self.settings.images_per_step)
        job = job_of(self.store, settings, few, run_dir, load_policy(settings.augmentation))
        fit_distributed(job, on_epoch=note)
        return told[0]

    def _pipeline_rate(self, settings: TrainersSettings, plan: DataPlan, name: str) -> float:
        run_dir = self.folder / name
        run_dir.mkdir()
        told: list[tuple[float, EpochReport]] = []

        def note(report: EpochReport) -> bool:
            told.append((time.perf_counter(), report))
            return False

        job = job_of(self.store, settings, plan, run_dir, load_policy(settings.augmentation))
        fit_distributed(job, on_epoch=note)
        spans = [after - before - report.validation_seconds for (before, _), (after, report) in pairwise(told)]
        steps = -(-plan.num_train // settings.images_per_step)
        return steps * settings.images_per_step / (sum(spans) / len(spans))


def augmented_batches(store: Store, settings: TrainersSettings, plan: DataPlan) -> Generator[UInt8Array]:
    """Yield augmented training batches, [B, S, S, 3], without end; a thread prepares one while the one before is used.

    Args:
        store: with the images.
        settings: policy, side, batch and seed.
        plan: whose training images are taken in their order, again and again.
    Yields:
        Batches.
    """
    data, size = plan.open(store, settings.model.frame), settings.images_per_step
    augmenter = Augmenter(load_policy(settings.augmentation), Canvas(settings.model.side_px, (180.0, 140.0, 140.0)))
    keys = image_keys(data.image_ids)

    def batch(step: int) -> UInt8Array:
        rows = data.train_index[np.arange(step * size, (step + 1) * size) % len(data.train_index)]
        seeds = image_seeds(settings.seed, step, keys[rows], np.zeros_like(rows))
        return augmenter.apply(data.pixels.take(rows), seeds)

    with ThreadPoolExecutor(max_workers=1) as ahead:
        waiting = ahead.submit(batch, 0)
        for step in count(1):
            ready, waiting = waiting.result(), ahead.submit(batch, step)
            yield ready


def feeder_rate(store: Store, settings: TrainersSettings, plan: DataPlan, feeders: int) -> float:
    """Measure how fast processes augment, without a network.

    Args:
        store: with the images.
        settings: policy, side and batch.
        plan: whose training images are taken, again and again.
        feeders: number of processes.
    Returns:
        Images per second.
    """
    data, side_px = plan.open(store, settings.model.frame), settings.model.side_px
    augmenter = Augmenter(load_policy(settings.augmentation), Canvas(side_px, (180.0, 140.0, 140.0)))
    source = Feeder(data.pixels, data.labels, data.image_ids, data.train_index, augmenter, settings, feeders=feeders)
    with closing(source):
        # The first epoch starts the processes and reads the pixels from the disk.
        images = sum(len(batch.rows) for batch in source.epoch(0))
        epoch, began = 0, time.perf_counter()
        while time.perf_counter() - began < RAW_S:
            epoch += 1
            for _ in source.epoch(epoch):
                pass
        return epoch * images / (time.perf_counter() - began)


class MemoryWatch:
    """Watches the workers of a fit below this process; `peak_mb` is the most that one of them held.

    Memory is the proportional set size: pages that several processes share count in parts.
    """

    EVERY_S = 0.5

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory watch", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self.EVERY_S):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if any(name in " ".join(process.cmdline()) for name in ("RayTrainWorker", TASK_NAME)):
                        self.peak_mb = max(self.peak_mb, process.memory_full_info().pss / 1e6)


def _like(settings: TrainersSettings, changes: dict[str, object]) -> TrainersSettings:
    shared = {
        "epochs": EPOCHS,
        "early_stop_patience_epochs": None,
        "workers.strategy": "auto",
        "workers.max_failures": 0,
    }
    return settings.with_values(shared | changes)


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else round(ours / theirs, 3)


def _round(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 1)
