"""What a trial that had its whole budget is worth on validation, with intervals resampled by group.

In: the checkpoint that the trial has just kept. Out: `TrialFigures`, of the epoch that validated best. That
epoch was chosen on the same images, so the figures flatter by that much.
"""

from pathlib import Path

import numpy as np

from records.taxonomy import Taxonomy
from trainers.fitting.training_data import TrainingData
from trainers.settings import TrainersSettings
from tuning.trials import TrialFigures

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
    from trainers.fitting.trained import trained_model
    from trainers.fitting.workers import compute_threads
    from vision.inference.loaded import reference_logits
    from vision.metrics.bootstrap import group_strata, resample_weights, resampled_confusions
    from vision.metrics.metrics import confusion_matrix

    trained = trained_model(load_checkpoint(checkpoint), settings, taxonomy)
    rows, num_classes = data.val_index, len(taxonomy.codes)
    with compute_threads(trained.num_threads):
        answers = [
            reference_logits(trained.network, data.pixels.take(rows[start : start + BATCH]), trained.geometry)
            for start in range(0, len(rows), BATCH)
        ]
    labels, predicted = data.labels[rows], np.concatenate(answers).argmax(axis=1)
    _, groups = np.unique(np.array(val_groups, dtype=str), return_inverse=True)
    weights = resample_weights(group_strata(labels, groups, num_classes), seed=0)
    confusions = resampled_confusions(labels, predicted, groups, weights, num_classes)
    figures = whole_figures(confusion_matrix(labels, predicted, num_classes), confusions, weights.shape[1])
    return TrialFigures(epoch=trained.best_epoch, groups=weights.shape[1], **figures)
