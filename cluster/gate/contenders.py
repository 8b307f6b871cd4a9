"""A model as the gate sees it, and its lesions: one row per group, by the mean over the group's images."""

from dataclasses import dataclass

import numpy as np

from cluster.settings import GateSettings
from records.arrays import BoolArray, Float32Array, FloatArray, IntArray
from records.taxonomy import Taxonomy
from trainers.evaluation.evaluate import SplitPredictions
from vision.metrics.bootstrap import group_strata, resample_weights
from vision.metrics.metrics import (
    balanced_accuracy,
    confusion_matrix,
    mean_by_unit,
)


@dataclass(frozen=True)
class Contender:
    """A model as the gate sees it.

    Args:
        model_id: of the bundle.
        predictions: on the gate split; all contenders answer the same images in the same order.
        key_threshold: refer threshold of the key class, None if the taxonomy has none.
    """

    model_id: str
    predictions: SplitPredictions
    key_threshold: float | None


@dataclass(frozen=True)
class Slice:
    """A part of the gate split that must not be left behind.

    Args:
        name: such as `sex: female`.
        members: [N] true for the images in it.
    """

    name: str
    members: BoolArray


@dataclass(frozen=True)
class Lesions:
    """Lesion-level view of one contender, [G] each."""

    is_key: BoolArray
    key_probability: FloatArray


def lesions_of(predictions: SplitPredictions, groups: IntArray, key_index: int) -> Lesions:
    """Average the key-class probability over the images of each group.

    Args:
        predictions: of one contender.
        groups: [N] group index of each image, 0 to G - 1.
        key_index: of the key class.
    Returns:
        One row per group.
    """
    is_key = mean_by_unit((predictions.labels == key_index).astype(np.float64), groups) >= 0.5
    return Lesions(is_key=is_key, key_probability=mean_by_unit(predictions.probabilities[:, key_index], groups))


def gate_weights(
    predictions: SplitPredictions, groups: IntArray, taxonomy: Taxonomy, settings: GateSettings
) -> Float32Array:
    """Draw the resamples that all contenders are compared on, [R, G]."""
    strata = group_strata(predictions.labels, groups, len(taxonomy.codes))
    return resample_weights(strata, num_resamples=settings.bootstrap_resamples, seed=settings.seed)


def accuracy_of(predictions: SplitPredictions, num_classes: int) -> float:
    """Return the balanced accuracy of a contender, per image."""
    predicted = predictions.probabilities.argmax(axis=1)
    return float(balanced_accuracy(confusion_matrix(predictions.labels, predicted, num_classes)))
