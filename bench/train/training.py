"""Training throughput against the bare network, measured within one run so that ratios are comparable.

The bare rate is forward, backward and optimizer step of the same network on one batch in memory, with the same
precision, threads and optimizer. The pipeline is what `relook train` runs: pixel cache, augmentation, loop,
checkpoints, reports. Its rate is over the wall time from one report to the next, without the forward passes of batch
norm statistics and of validation, which the bare steps do not have. The first epoch warms up and is not counted. What
a bare step loses to augmentation on the same cores is measured with batches that one thread augments while the step
before computes.

A shared host changes its speed within seconds, so what is compared is measured in turn, in rounds: bare steps before
and after each run of the default plan, the other plans, and each plan beside a neighbour. A ratio is the mean of the
rounds' ratios, which are given one by one, too.
"""

import os
import statistics
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from rich.progress import Progress, TaskID

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

EPOCHS = 3
VAL_IMAGES = 64
LESIONS = 350
WIDTH_PX = 600
RAW_S = 6.0
STARTS = 3
FEEDINGS = 3
"""Bursts of one and of two feeder processes, in turn: six seconds are short where the host changes its speed."""
SHARE_BESIDE = 0.4
"""Of the images that are trained on alone, those beside a neighbour."""
Figures = dict[str, Any]
Measured = TypeVar("Measured")


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


@dataclass(frozen=True)
class Round:
    """What was measured in turn; images per second.

    Args:
        raw: bare steps, before and after the default plan.
        augmented: bare steps beside the augmentation of their batches.
        plain: the plain script; None if it cannot run.
        lightning: Lightning; None if it cannot run.
        alone: the pipeline under each plan, by the plan's name, the default's first.
        beside: the same beside a neighbour.
    """

    raw: float
    augmented: float
    plain: float | None
    lightning: float | None
    alone: dict[str, float]
    beside: dict[str, float]

    @property
    def pipeline(self) -> float:
        """The pipeline under the default plan."""
        return next(iter(self.alone.values()))


@dataclass
class Bench:
    """One run of the measurements.

    Args:
        store: with the images.
        settings: of the trainers; what is measured is what they train.
        plan: the images.
        folder: for runs and tables.
        epoch_s: seconds that an epoch of one worker shall take.
        rounds: how often everything that is compared is measured.
        peers: folder of the peers' environments, for Lightning; None leaves it out.
        bar: progress is shown on it.
    """

    store: Store
    settings: TrainersSettings
    plan: DataPlan
    folder: Path
    epoch_s: float
    rounds: int
    peers: Path | None
    bar: Progress
    _reasons: dict[str, str] = field(default_factory=dict)
    _task: TaskID = field(init=False)

    def run(self) -> Figures:
        """Measure everything; what cannot be measured is None, with its reason under `reasons`."""
        cores = len(os.sched_getaffinity(0))
        self._task = self.bar.add_task("starting a fit", total=self.rounds * (2 * len(plans(self.settings, cores)) + 5))
        alone = self._under({"count": 1, "threads": cores})
        load = os.getloadavg()[0]
        first_start = self._start_s(self.plan, "first start")
        raw = self._raw(alone)
        plan = self._cut(raw)
        peers = Peers(self.store, self.settings, plan, self.folder, raw)
        watch = MemoryWatch()
        with watch:
            rounds = [self._round(number, alone, plan, peers) for number in range(1, self.rounds + 1)]
        starts = statistics.median(self._start_s(plan, f"start {number}") for number in range(STARTS))
        feeding = [[feeder_rate(self.store, alone, plan, count) for count in (1, 2)] for _ in range(FEEDINGS)]
        rates = {name: round(statistics.mean(each.alone[name] for each in rounds), 1) for name in rounds[0].alone}
        beside = {name: round(statistics.mean(each.beside[name] for each in rounds), 1) for name in rates}
        default = next(iter(rates))
        return {
            **_of_rounds(rounds),
            "ddp2_over_single": self._of_two_workers(rates, cores),
            "default_over_best_plan": round(rates[default] / max(rates.values()), 3),
            "beside_a_neighbour": _mean([each.beside[default] / each.pipeline for each in rounds], 3),
            "feeder_scaling_2": _mean([two / one for one, two in feeding], 3),
            "fit_start_s": round(starts, 1),
            "fit_first_start_s": round(first_start, 1),
            "peak_memory_mb": round(watch.peak_mb),
            "feeder_images_s": _mean([one for one, _ in feeding]),
            "pipeline_images_s": rates[default],
            "plans_images_s": rates,
            "plans_beside_a_neighbour_images_s": beside,
            "model": alone.model.name,
            "side_px": alone.model.side_px,
            "batch_size": alone.images_per_step,
            "precision": precision_of(alone),
            "threads": cores,
            "train_images": plan.num_train,
            "load_average_before": round(load, 1),
            "reasons": {**self._reasons, **peers.reasons},
        }

    def _round(self, number: int, alone: TrainersSettings, plan: DataPlan, peers: Peers) -> Round:
        """Measure everything once that is compared; what is divided by one another follows on one another."""
        first, *others = plans(self.settings, alone.workers.threads or 1).items()
        before = self._shown(number, "bare steps", lambda: self._raw(alone))
        rates = {first[0]: self._plan_rate(number, first, plan, "alone")}
        after = self._shown(number, "bare steps", lambda: self._raw(alone))
        augmented = self._shown(number, "bare steps beside augmentation", lambda: self._augmented(alone, plan))
        rates |= {name: self._plan_rate(number, (name, workers), plan, "alone") for name, workers in others}
        plain = self._shown(number, "a plain script", peers.plain_rate)
        lightning = self._shown(number, "Lightning", lambda: peers.lightning_rate(self.peers))
        # A neighbour takes more than half of the cores, so with fewer images the epochs last as long as before.
        fewer = self._cut(before * SHARE_BESIDE)
        with busy_neighbour(alone.workers.threads or 1):
            beside = {
                name: self._plan_rate(number, (name, workers), fewer, "beside a neighbour")
                for name, workers in (first, *others)
            }
        return Round((before + after) / 2, augmented, plain, lightning, rates, beside)

    def _shown(self, number: int, what: str, measure: Callable[[], Measured]) -> Measured:
        """Measure while the progress shows what is measured."""
        self.bar.update(self._task, description=f"round {number} of {self.rounds}: {what}")
        measured = measure()
        self.bar.advance(self._task)
        return measured

    def _plan_rate(self, number: int, chosen: tuple[str, Plan], plan: DataPlan, where: str) -> float:
        name, workers = chosen
        folder = f"{name} {where} {number}"
        return self._shown(number, f"{name} {where}", lambda: self._pipeline_rate(self._under(workers), plan, folder))

    def _raw(self, alone: TrainersSettings) -> float:
        return raw_rate(alone, len(self.store.taxonomy.codes))

    def _augmented(self, alone: TrainersSettings, plan: DataPlan) -> float:
        with closing(augmented_batches(self.store, alone, plan)) as batches:
            return raw_rate(alone, len(self.store.taxonomy.codes), batches=batches)

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

    def _under(self, workers: Plan) -> TrainersSettings:
        return _like(self.settings, {f"workers.{name}": value for name, value in workers.items()})

    def _of_two_workers(self, rates: dict[str, float], cores: int) -> float | None:
        if two_share(self.settings, cores):
            alone, *_, shared = rates.values()
            return round(shared / alone, 3)
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


def _of_rounds(rounds: list[Round]) -> Figures:
    """Return the rates that the pipeline's is divided by, and the means of the ratios."""
    over_raw = [round(each.pipeline / each.raw, 3) for each in rounds]
    return {
        "raw_images_s": _mean([each.raw for each in rounds]),
        "raw_with_augmentation_on_the_same_cores_images_s": _mean([each.augmented for each in rounds]),
        "plain_fp32_images_s": _mean([each.plain for each in rounds]),
        "lightning_images_s": _mean([each.lightning for each in rounds]),
        "pipeline_over_raw": _mean(over_raw, 3),
        "pipeline_over_raw_by_round": over_raw,
        "pipeline_over_raw_with_augmentation": _over(rounds, lambda each: each.augmented),
        "pipeline_over_plain_fp32": _over(rounds, lambda each: each.plain),
        "pipeline_over_lightning": _over(rounds, lambda each: each.lightning),
    }


def _over(rounds: list[Round], peer: Callable[[Round], float | None]) -> float | None:
    """Return the mean over the rounds of the pipeline's rate over a peer's; None if the peer could not run."""
    rates = [(each.pipeline, peer(each)) for each in rounds]
    return _mean([None if theirs is None else ours / theirs for ours, theirs in rates], 3)


def _mean(values: Sequence[float | None], digits: int = 1) -> float | None:
    """Return the rounded mean; None if a value is missing."""
    known = [value for value in values if value is not None]
    return round(statistics.mean(known), digits) if len(known) == len(values) else None
