"""One trial: the training loop on the trial's share of settings, pictures and resources.

A `TrialJob` is everything a trial needs, the same for all trials of a search. It travels to other
processes without pixels; a trial maps what its node has decoded already. It holds rows of train and
val and no others.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from records.home import open_home
from records.settings import RecordsSettings
from records.store import open_store
from records.taxonomy import Taxonomy
from trainers.augmentation import Policy
from trainers.data.cache import PixelCache
from trainers.fitting.epoch_report import EpochReport
from trainers.fitting.training_data import DataPlan, TrainingData
from trainers.settings import TrainersSettings
from tuning.budget import squeeze
from tuning.space import with_overrides
from tuning.trials import TrialPlan


@dataclass(frozen=True)
class TrialJob:
    """What all trials of a search share.

    Args:
        base: the given settings.
        trial_epochs: the budget of a trial.
        taxonomy: gives class order and the key class.
        policies: documents of augmentation policies that are files, by the name that settings give.
        pictures: which are trained on and validated with.
        records: lead to the store on every node; home and taxonomy are absolute.
        num_threads: CPU threads of a trial.
        use_gpu: whether a trial has (a part of) a GPU.
        niceness: added to the priority of the process, 0 to 19.
    """

    base: TrainersSettings
    trial_epochs: int
    taxonomy: Taxonomy
    policies: Mapping[str, Policy]
    pictures: DataPlan
    records: RecordsSettings
    num_threads: int
    use_gpu: bool
    niceness: int = 0


def run_trial(plan: TrialPlan, job: TrialJob, report: Callable[[dict[str, Any]], None]) -> None:
    """Train one configuration within the budget.

    Args:
        plan: the configuration.
        job: what it is trained on.
        report: told the fields of EpochReport after each epoch; it may end the trial by raising.
    """
    # Here and not above: whoever only plans or reports a search needs no torch.
    from trainers.fitting.loop import train

    os.setpriority(os.PRIO_PROCESS, 0, job.niceness)
    settings = trial_settings(plan, job)

    def on_epoch(epoch: EpochReport) -> bool:
        report(epoch.model_dump(mode="json"))
        return False

    train(
        settings,
        _open_pictures(job, settings.side_px),
        job.taxonomy,
        on_epoch=on_epoch,
        policy=job.policies.get(settings.augmentation),
    )


def trial_settings(plan: TrialPlan, job: TrialJob) -> TrainersSettings:
    """Return the settings that a trial trains with: overridden, squeezed, on the trial's resources."""
    whole = with_overrides(job.base, plan.overrides)
    machinery = {"num_workers": 1, "threads_per_worker": job.num_threads, "use_gpu": job.use_gpu}
    return with_overrides(squeeze(whole, job.trial_epochs), machinery)


def _open_pictures(job: TrialJob, side_px: int) -> TrainingData:
    """Map the pixels; only a node that has not decoded them yet opens the store, which takes a second."""
    image_ids = job.pictures.image_ids
    cache = PixelCache(open_home(job.records.home).cache, side_px)
    if cache.missing(image_ids):
        with closing(open_store(job.records)) as store:
            return job.pictures.open(store, side_px)
    rows = np.arange(len(image_ids), dtype=np.int64)
    return TrainingData(
        pixels=cache.rows(image_ids),
        image_ids=image_ids,
        labels=job.pictures.labels,
        train_index=rows[: job.pictures.num_train],
        val_index=rows[job.pictures.num_train :],
    )
