"""What is known about the images of a training, fitted beside the network: see `vision.calibration.context`."""

import numpy as np
from numpy.typing import NDArray

from records.arrays import FloatArray, IntArray
from records.bundles import Calibration
from records.context import ContextHead, Known, context_of_image
from records.errors import ConfigError
from records.store import Store, find_images
from records.taxonomy import Taxonomy
from trainers.fitting.training_data import DataPlan
from vision.calibration.context import fit_calibration_in_context, fit_context, predict_in_context
from vision.calibration.scaling import apply_calibration, fit_calibration


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


def probabilities_of(
    logits: NDArray[np.floating], calibration: Calibration, head: ContextHead | None, known: list[Known]
) -> FloatArray:
    """Return calibrated probabilities [N, C], with what is known about the images if there is a head."""
    if head is None:
        return apply_calibration(logits, calibration)
    return predict_in_context(logits, calibration, head, known).probabilities
