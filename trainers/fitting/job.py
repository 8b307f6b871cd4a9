"""What one training is, wherever it runs: in this process, in a task of Ray, or on every worker of a group.

A job is sent to processes without pixels: images are ids, which are decoded or mapped on the node that trains.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from records.erasure import EVENT_IMAGES
from records.settings import RecordsSettings
from records.store import Store
from records.taxonomy import Taxonomy
from trainers.augmentation import Policy
from trainers.fitting.epoch_report import OnEpoch, OnStep
from trainers.fitting.loop import TrainedModel, train
from trainers.fitting.training_data import DataPlan, TrainingData
from trainers.fitting.workers import WorkerGroup
from trainers.settings import TrainersSettings


@dataclass(frozen=True)
class Job:
    """A training.

    Args:
        settings: the recipe, and how the workers execute it.
        plan: which images.
        records: lead to the store on every node.
        taxonomy: of the store.
        policy: of augmentation.
        initial_weights: parameters and buffers to start from, by name; None: as `settings.model.weights` says.
        run_dir: of the run, absolute.
    """

    settings: TrainersSettings
    plan: DataPlan
    records: RecordsSettings
    taxonomy: Taxonomy
    policy: Policy
    initial_weights: Mapping[str, NDArray[Any]] | None = field(repr=False)
    run_dir: Path

    def train(
        self, data: TrainingData, group: WorkerGroup, on_epoch: OnEpoch | None, on_step: OnStep | None
    ) -> TrainedModel:
        """Train with the group that the calling process belongs to, see `loop.train`."""
        return train(
            self.settings,
            data,
            self.taxonomy,
            on_epoch=on_epoch,
            on_step=on_step,
            workers=group,
            policy=self.policy,
            initial_weights=self.initial_weights,
            images_dir=self.run_dir / EVENT_IMAGES,
        )


def job_of(
    store: Store,
    settings: TrainersSettings,
    plan: DataPlan,
    run_dir: Path,
    policy: Policy,
    initial_weights: Mapping[str, NDArray[Any]] | None = None,
) -> Job:
    """Return the job of training on a store's images; of several nodes, all have to see the run's folder."""
    records, folder = store.portable_settings(), run_dir.absolute()
    return Job(settings, plan, records, store.taxonomy, policy, initial_weights, folder)
