"""What a run ends with: the network after its best epoch, and how it got there."""

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from images.decode import DECODE_VERSION
from records.bundles import Geometry
from records.taxonomy import Taxonomy
from trainers.fitting.checkpoints import Checkpoint
from trainers.fitting.epoch_report import EpochReport
from trainers.fitting.workers import threads_of
from trainers.settings import TrainersSettings
from vision.networks import build_model


@dataclass(frozen=True)
class TrainedModel:
    """What a run ends with.

    Args:
        network: in evaluation mode, on the CPU, with the weights of the best epoch.
        geometry: how images become its input.
        reports: of all epochs.
        best_epoch: 1-based; the highest validation balanced accuracy, among equals the lowest loss.
        num_threads: that each worker computed with.
    """

    network: nn.Module
    geometry: Geometry
    reports: list[EpochReport]
    best_epoch: int
    num_threads: int

    @property
    def best(self) -> EpochReport:
        """The report of the best epoch."""
        return self.reports[self.best_epoch - 1]

    def weights(self) -> dict[str, NDArray[Any]]:
        """Return parameters and buffers by name, as arrays of their own."""
        return {name: value.numpy().copy() for name, value in self.network.state_dict().items()}


def trained_model(checkpoint: Checkpoint, settings: TrainersSettings, taxonomy: Taxonomy) -> TrainedModel:
    """Rebuild what a run ended with from its last checkpoint.

    Args:
        checkpoint: after at least one epoch.
        settings: of the run.
        taxonomy: of the run.
    Returns:
        The model after its best epoch.
    """
    with torch.random.fork_rng(devices=[]):
        network = build_model(settings.model.name, len(taxonomy.codes), **settings.model.options)
    network.load_state_dict(checkpoint.best)
    network.eval().requires_grad_(False)
    reports = checkpoint.epoch_reports()
    geometry = Geometry(
        side_px=settings.model.side_px,
        scaling=settings.model.scaling,
        mean=checkpoint.mean,
        std=checkpoint.std,
        decode_version=DECODE_VERSION,
    )
    return TrainedModel(network, geometry, reports, best_epoch_of(reports), threads_of(settings.workers))


def best_epoch_of(reports: list[EpochReport]) -> int:
    """Return the epoch that validated best, 1-based; among equal balanced accuracies the lowest loss."""
    return max(reports, key=lambda report: (report.val_balanced_accuracy, -report.val_loss, -report.epoch)).epoch
