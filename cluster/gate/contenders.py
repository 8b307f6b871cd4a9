"""The models that the gate compares, and their predictions per lesion: the mean over the images of a group."""

from dataclasses import dataclass, field

import numpy as np

from cluster.settings import GateSettings
from records.arrays import BoolArray, Float32Array, FloatArray, IntArray
from records.bundles import DecisionRule
from records.taxonomy import Taxonomy
from trainers.evaluation.evaluate import SplitPredictions
from vision.calibration.decision import labels_of
from vision.metrics.bootstrap import group_strata, resample_weights
from vision.metrics.metrics import (
    balanced_accuracy,
    confusion_matrix,
    mean_by_unit,
)


@dataclass(frozen=True)
class Contender:
    """A model that the gate compares: the challenger or a rival.

    Args:
        model_id: of the bundle.
        predictions: on the gate split; the same images in the same order for all contenders.
        key_threshold: refer threshold of the key class, None if the taxonomy has none.
        decision: the model's rule: each contender is compared by the labels that it would serve.
    """

    model_id: str
    predictions: SplitPredictions
    key_threshold: float | None
    decision: DecisionRule = field(default_factory=DecisionRule)

    @property
    def labels(self) -> IntArray:
        """[N] predicted class indices."""
        return labels_of(self.predictions.probabilities, self.decision)


@dataclass(frozen=True)
class Slice:
    """A part of the gate split in which the challenger must not be worse.

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
    """Return the mean key-class probability of each group, given [N] group indices of the images, 0 to G - 1."""
    # Images of one group may carry different labels; the lesion is of the key class if at least half are of it.
    is_key = mean_by_unit((predictions.labels == key_index).astype(np.float64), groups) >= 0.5
    return Lesions(is_key=is_key, key_probability=mean_by_unit(predictions.probabilities[:, key_index], groups))


def gate_weights(
    predictions: SplitPredictions, groups: IntArray, taxonomy: Taxonomy, settings: GateSettings
) -> Float32Array:
    """Draw the resamples that all contenders share, [R, G] counts, stratified by class."""
    strata = group_strata(predictions.labels, groups, len(taxonomy.codes))
    return resample_weights(strata, num_resamples=settings.bootstrap_resamples, seed=settings.seed)


def accuracy_of(contender: Contender, num_classes: int) -> float:
    """Return the balanced accuracy over images."""
    return float(balanced_accuracy(confusion_matrix(contender.predictions.labels, contender.labels, num_classes)))
