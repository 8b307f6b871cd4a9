"""What is fitted on a network's logits: its calibration, and with it what is known about the images.

See `vision.calibration.scaling` and `vision.calibration.context`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from records.arrays import FloatArray, IntArray
from records.bundles import Calibration
from records.context import ContextHead, Known, context_of_image
from records.errors import ConfigError, DataError
from records.store import Store, find_images
from records.taxonomy import Taxonomy
from trainers.fitting.training_data import DataPlan
from vision.calibration.context import fit_calibration_in_context, fit_context, predict_in_context
from vision.calibration.scaling import apply_calibration, fit_calibration

FOLDS = 5
"""Parts of the calibration split of which each is calibrated by the others."""


def fitted_context(store: Store, plan: DataPlan, wanted: bool) -> ContextHead | None:
    """Fit the context of the training images.

    Args:
        store: with the images; its taxonomy names the columns.
        plan: which of them are trained on.
        wanted: setting `trainers.context`.
    Returns:
        The head, its weight not fitted yet; None if it is not wanted.
    Raises:
        ConfigError: the taxonomy names no columns.
        DataError: no training image has any of them.
    """
    if not wanted:
        return None
    columns = store.taxonomy.context
    if not columns:
        raise ConfigError(
            f"trainers.context is true, and taxonomy {store.taxonomy.name} names no context; name columns there, such "
            "as `context: [{name: age, kind: numeric}, {name: sex}]`, or set trainers.context=false"
        )
    images = find_images(store, plan.image_ids[: plan.num_train])
    return fit_context(columns, [context_of_image(i) for i in images], plan.labels[: plan.num_train], store.taxonomy)


def calibrated(
    logits: NDArray[np.floating], labels: IntArray, taxonomy: Taxonomy, head: ContextHead | None, known: list[Known]
) -> tuple[Calibration, ContextHead | None]:
    """Fit the calibration on val, and with it the weight of the context if there is a head."""
    if head is None:
        return fit_calibration(logits, labels, taxonomy), None
    return fit_calibration_in_context(logits, labels, taxonomy, head, known)


def cross_fitted(
    logits: NDArray[np.floating],
    labels: IntArray,
    group_ids: Sequence[str],
    taxonomy: Taxonomy,
    head: ContextHead | None,
    known: Sequence[Known],
) -> FloatArray:
    """Return probabilities of the images that fit a calibration, each by one that was fitted without its group.

    Thresholds and prediction sets of a model that was trained on val are fitted on these: with probabilities that have
    seen the very labels they would promise too much.

    Args:
        logits: [N, C].
        labels: [N] class indices.
        group_ids: [N].
        taxonomy: gives class order.
        head: of the context, its weight not fitted yet; None without one.
        known: [N] the context of each image.
    Returns:
        [N, C], calibrated.
    Raises:
        DataError: all images belong to one group.
    """
    groups, first, group_index = np.unique(np.asarray(group_ids, dtype=str), return_index=True, return_inverse=True)
    if len(groups) < 2:
        raise DataError("the calibration split has one group of images, and a refit needs two or more; import more")
    folds = np.empty(len(groups), dtype=np.int64)
    # Dealt out class by class, so that every fold has its share of the rare ones.
    folds[np.lexsort((groups, labels[first]))] = np.arange(len(groups)) % FOLDS
    fold_of, probabilities = folds[group_index], np.empty(logits.shape, dtype=np.float64)
    for fold in np.unique(folds):
        held, rest = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
        calibration, fitted = calibrated(logits[rest], labels[rest], taxonomy, head, [known[row] for row in rest])
        probabilities[held] = probabilities_of(logits[held], calibration, fitted, [known[row] for row in held])
    return probabilities


def probabilities_of(
    logits: NDArray[np.floating], calibration: Calibration, head: ContextHead | None, known: list[Known]
) -> FloatArray:
    """Return calibrated probabilities [N, C], with what is known about the images if there is a head."""
    if head is None:
        return apply_calibration(logits, calibration)
    return predict_in_context(logits, calibration, head, known).probabilities
