"""One trial: the training loop with the trial's overrides, budget and resources.

A `TrialJob` is what all trials of a search share; it is sent to worker processes without pixels, and a trial maps
those that its node has decoded already. It holds rows of train and val only. After the last epoch a trial reports
`TrialFigures`: validation figures of its best epoch, with intervals resampled by group. That epoch was chosen on the
same images, so the figures are optimistic by that much.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from images.cache import PixelCache
from records.errors import IntegrityError
from records.frames import Frame
from records.home import open_home
from records.settings import RecordsSettings
from records.store import open_store
from records.taxonomy import Taxonomy
from trainers.augmentation import Policy, load_policy
from trainers.fitting.epoch_report import EpochReport, OnEpoch
from trainers.fitting.training_data import DataPlan, TrainingData
from trainers.settings import TrainersSettings
from tuning.space import with_overrides
from tuning.trials import GenerationStep, TrialFigures, TrialPlan, shortened, trial_budget


@dataclass(frozen=True)
class TrialJob:
    """What all trials of a search share.

    Args:
        base: the given settings.
        trial_epochs: the budget of a trial.
        taxonomy: gives class order and the key class.
        policies: documents of augmentation policies that are files, by the name that settings give.
        images: which are trained on and validated with.
        records: lead to the store on every node; home and taxonomy are absolute.
        num_threads: CPU threads of a trial.
        use_gpu: whether a trial has (a part of) a GPU.
        niceness: added to the priority of the process, 0 to 19.
        workers: that train a trial together; more than one are a group under Ray Train.
        run_dir: of the search; a trial keeps a checkpoint there, so that its death costs an epoch. None keeps none.
    """

    base: TrainersSettings
    trial_epochs: int
    taxonomy: Taxonomy
    policies: Mapping[str, Policy]
    images: DataPlan
    records: RecordsSettings
    num_threads: int
    use_gpu: bool
    niceness: int = 0
    workers: int = 1
    run_dir: Path | None = None


def run_trial(plan: TrialPlan, job: TrialJob, report: Callable[[dict[str, Any]], None]) -> None:
    """Train one configuration within the budget."""
    # Imported here: planning and reporting a search need no torch.
    from trainers.fitting.loop import train
    from trainers.fitting.workers import CHECKPOINT_FILE, SingleWorker

    # Only upwards: without root a process may not raise its priority again, and Ray reuses it for later trials.
    os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), job.niceness))
    settings = trial_settings(plan, job)
    folder = None if job.run_dir is None else _folder(plan, job.run_dir)
    images = job.images.limited(settings.max_train_images)
    policy = trial_policy(plan, job)
    if job.workers > 1:
        _train_in_group(settings, job, images, folder, policy, lambda epoch: report(epoch.model_dump(mode="json")))
        return
    data = _open_images(job, images, settings.model.frame)

    def on_epoch(epoch: EpochReport) -> None:
        reported = epoch.model_dump(mode="json")
        if folder is not None and epoch.epoch == settings.epochs:
            val_groups = images.group_ids[images.num_train :]
            figures = figures_of(folder / CHECKPOINT_FILE, settings, job.taxonomy, data, val_groups)
            reported["figures"] = figures.model_dump(mode="json")
        report(reported)

    if folder is not None:
        if plan.generation_step is not None and job.run_dir is not None:
            _take_over(plan, plan.generation_step, job, folder, job.run_dir)
        # The process may have died between a checkpoint and its report.
        for epoch in _kept_epochs(folder):
            # Epochs up to the exploited checkpoint were reported in the generation before.
            if plan.generation_step is None or epoch.epoch > plan.generation_step.epoch:
                on_epoch(epoch)
    train(
        settings,
        data,
        job.taxonomy,
        on_epoch=on_epoch,
        workers=SingleWorker(folder, settings.workers.use_gpu),
        policy=policy,
        pause_after=plan.until_epoch,
    )


def trial_folder(run_dir: Path, number: int) -> Path:
    """Return where a trial keeps its checkpoint while it runs."""
    return run_dir / "trials" / f"{number:04d}"


def parts_folder(run_dir: Path, until_epoch: int) -> Path:
    """Return where the members of a population keep their checkpoints up to an epoch; nobody changes them later."""
    return run_dir / "population" / f"{until_epoch:04d}"


def trial_policy(plan: TrialPlan, job: TrialJob) -> Policy:
    """Return the policy that a trial trains with: its phases shortened as everything else is."""
    whole = with_overrides(job.base, plan.overrides)
    policy = job.policies.get(whole.augmentation) or load_policy(whole.augmentation)
    return policy.shortened(trial_budget(whole, job.trial_epochs) / whole.epochs)


def trial_settings(plan: TrialPlan, job: TrialJob) -> TrainersSettings:
    """Return the settings that a trial trains with: overridden, shortened, on the trial's resources."""
    whole = with_overrides(job.base, plan.overrides)
    machinery = {"workers.count": job.workers, "workers.threads": job.num_threads, "workers.use_gpu": job.use_gpu}
    return with_overrides(shortened(whole, job.trial_epochs), machinery)


def _folder(plan: TrialPlan, run_dir: Path) -> Path:
    if plan.until_epoch is None:
        return trial_folder(run_dir, plan.number)
    return parts_folder(run_dir, plan.until_epoch) / f"{plan.number:04d}"


def _take_over(plan: TrialPlan, step: GenerationStep, job: TrialJob, folder: Path, run_dir: Path) -> None:
    """Begin a part of a training with the parent's checkpoint, unless it is begun already.

    Where that checkpoint is gone or damaged the training starts over: its settings say what the epochs before
    were trained with, so it comes to the same, later.
    """
    from trainers.fitting.checkpoints import Recipe, handed_on, load_checkpoint, save_checkpoint
    from trainers.fitting.workers import CHECKPOINT_FILE

    source = parts_folder(run_dir, step.epoch) / f"{step.parent:04d}" / CHECKPOINT_FILE
    target = folder / CHECKPOINT_FILE
    # An existing target is a member that was restarted within its generation and resumes its own checkpoint.
    if target.is_file() or not source.is_file():
        return

    def recipe(overrides: dict[str, Any]) -> Recipe:
        made = plan.model_copy(update={"overrides": overrides})
        return Recipe(trial_settings(made, job).recipe_hash(), trial_policy(made, job).content_hash())

    with suppress(IntegrityError):
        found = load_checkpoint(source)
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(handed_on(found, step.epoch, recipe(step.parent_overrides), recipe(plan.overrides)), target)


def _kept_epochs(folder: Path) -> list[EpochReport]:
    """Return the epochs of the checkpoint in a folder; a damaged one is dropped, and the trial starts over."""
    from trainers.fitting.checkpoints import load_checkpoint
    from trainers.fitting.workers import CHECKPOINT_FILE

    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return []
    try:
        return load_checkpoint(path).epoch_reports()
    except IntegrityError:
        path.unlink()
        return []


def _train_in_group(
    settings: TrainersSettings,
    job: TrialJob,
    images: DataPlan,
    folder: Path | None,
    policy: Policy,
    on_epoch: OnEpoch,
) -> None:
    """Train under Ray Train, whose own folder lets a group that lost a worker go on."""
    from trainers.fitting.distributed import fit_distributed
    from trainers.fitting.job import job_of

    with closing(open_store(job.records)) as store:
        images.open(store, settings.model.frame)
        fitted = job_of(store, settings, images, folder or store.home.runs / "trial", policy)
        fit_distributed(fitted, on_epoch=on_epoch)


def _open_images(job: TrialJob, images: DataPlan, frame: Frame) -> TrainingData:
    """Map the pixels; only a node that has not decoded them yet opens the store, which takes a second."""
    cache = PixelCache(open_home(job.records.home).cache, frame)
    if cache.missing(images.image_ids):
        with closing(open_store(job.records)) as store:
            return images.open(store, frame)
    return images.mapped(cache)


BATCH = 256


def figures_of(
    checkpoint: Path, settings: TrainersSettings, taxonomy: Taxonomy, data: TrainingData, val_groups: list[str]
) -> TrialFigures:
    """Score the best epoch of a checkpoint.

    Args:
        checkpoint: of the run.
        settings: of the run.
        taxonomy: gives class order.
        data: whose val rows are read.
        val_groups: [m] the group of each val row.
    Returns:
        The figures, by the most probable class, before calibration.
    """
    from trainers.evaluation.evaluate import whole_figures
    from trainers.fitting.checkpoints import load_checkpoint
    from trainers.fitting.loop import trained_model
    from trainers.fitting.workers import compute_threads
    from vision.inference.loaded import reference_logits
    from vision.metrics.bootstrap import group_strata, resample_weights, resampled_counts
    from vision.metrics.metrics import confusion_matrix

    trained = trained_model(load_checkpoint(checkpoint), settings, taxonomy)
    rows, num_classes = data.val_index, len(taxonomy.codes)
    with compute_threads(trained.num_threads):
        logits = [
            reference_logits(trained.network, data.pixels.take(rows[start : start + BATCH]), trained.geometry)
            for start in range(0, len(rows), BATCH)
        ]
    labels, predicted = data.labels[rows], np.concatenate(logits).argmax(axis=1)
    _, groups = np.unique(np.array(val_groups, dtype=str), return_inverse=True)
    weights = resample_weights(group_strata(labels, groups, num_classes), seed=0)
    resampled = resampled_counts(labels, predicted, groups, weights, num_classes)
    figures = whole_figures(confusion_matrix(labels, predicted, num_classes), resampled, weights.shape[1])
    return TrialFigures(epoch=trained.best_epoch, groups=weights.shape[1], **figures)
