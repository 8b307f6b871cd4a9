"""What a model is worth: its answers on one side of a dataset, and the figures with their intervals.

In: a bundle and a dataset side, or arrays. Out: `SidePredictions` and `trainers.evaluation.figures.Evaluation`.
Accuracy figures are per picture; the key class at its operating point is per lesion, by the mean
probability over the lesion's pictures. Intervals are 95 %: bootstrap by group within class, and
exact (Clopper-Pearson over groups) where a bootstrap cannot vary, as for a sensitivity of 1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from records import audit
from records.bundles import Bundle, OperatingPoints
from records.datasets import DatasetVersion
from records.errors import ContractError, DataError
from records.store import Store
from records.stored import find_images
from records.taxonomy import Taxonomy
from records.types import AuditEvent, Side
from trainers.calibration.conformal import prediction_set, thresholds_in_order
from trainers.calibration.operating import answered, gather_lesions
from trainers.data.cache import PixelCache
from trainers.evaluation.bootstrap import group_strata, resample_weights, resampled_confusions
from trainers.evaluation.figures import Evaluation, class_reports, interval_of, key_class_report, undefined_reasons
from trainers.evaluation.metrics import (
    FloatArray,
    IntArray,
    balanced_accuracy,
    check_probabilities,
    confusion_matrix,
    expected_calibration_error,
    one_vs_rest_auc,
)
from trainers.inference.loaded import LoadedModel, load_model

BATCH_SIZE = 64
GUARDED_SIDES = (Side.GATE, Side.TEST)


@dataclass(frozen=True)
class SidePredictions:
    """A model's answers for labelled pictures; all sequences have length N and one order."""

    model_id: str
    image_ids: list[str]
    group_ids: list[str]
    lesion_ids: list[str | None]
    labels: IntArray
    """[N] class indices"""
    logits: NDArray[np.float32]
    """[N, C], before calibration"""
    probabilities: FloatArray
    """[N, C], calibrated"""
    dataset_id: str | None = None
    side: Side | None = None
    side_reads: int | None = None


def predict_side(
    store: Store,
    bundle: Bundle,
    dataset: DatasetVersion,
    side: Side,
    actor: str,
    *,
    model: LoadedModel | None = None,
    progress: Progress | None = None,
) -> SidePredictions:
    """Answer for every labelled picture of a side. Reading gate or test is audited before it happens.

    Args:
        store: with the pictures and the pixel cache.
        bundle: whose model answers.
        dataset: a version.
        side: of the split.
        actor: who reads it, for the audit.
        model: the bundle's model if it is loaded already.
        progress: a bar is added to it.
    Returns:
        The answers, in order of picture id.
    Raises:
        TaxonomyError: model and dataset were made with different taxonomies.
        DataError: the side is empty.
        ContractError: `model` is not this bundle's.
    """
    bundle.document.taxonomy.require_same(dataset.taxonomy_hash, f"dataset {dataset.id[:12]}")
    if model is not None and model.model_id != bundle.id:
        raise ContractError(f"model {model.model_id[:12]} is not the one of bundle {bundle.id[:12]}")
    rows = dataset.side(side)
    if rows.empty:
        raise DataError(f"side {side.value} of dataset {dataset.id[:12]} has no pictures; import more lesions")
    side_reads = _record_read(store, bundle, dataset, side, actor, len(rows)) if side in GUARDED_SIDES else None
    image_ids = [str(image_id) for image_id in rows["image_id"]]
    cache = PixelCache(store.home.cache, bundle.document.geometry.side_px)
    cache.ensure(store, image_ids, progress)
    pixels = cache.rows(image_ids)
    model = model or load_model(bundle)
    task = progress.add_task(f"Predicting {side.value}", total=len(pixels)) if progress else None
    outputs = []
    for start in range(0, len(pixels), BATCH_SIZE):
        outputs.append(model.predict(pixels.take(np.arange(start, min(start + BATCH_SIZE, len(pixels))))))
        if progress and task is not None:
            progress.update(task, completed=min(start + BATCH_SIZE, len(pixels)))
    taxonomy = bundle.document.taxonomy
    return SidePredictions(
        model_id=bundle.id,
        image_ids=image_ids,
        group_ids=[str(group_id) for group_id in rows["group_id"]],
        lesion_ids=[image.lesion_id for image in find_images(store, image_ids)],
        labels=np.array([taxonomy.index_of(str(label)) for label in rows["label"]], dtype=np.int64),
        logits=np.concatenate([output.logits for output in outputs]),
        probabilities=np.concatenate([output.probabilities for output in outputs]),
        dataset_id=dataset.id,
        side=side,
        side_reads=side_reads,
    )


def evaluate(
    predictions: SidePredictions,
    taxonomy: Taxonomy,
    operating: OperatingPoints | None,
    *,
    max_set_size: int = 2,
    seed: int = 0,
) -> Evaluation:
    """Compute all figures of an evaluation.

    Args:
        predictions: at least one picture; every row a distribution.
        taxonomy: of the predictions.
        operating: thresholds of the model; without them what needs thresholds is undefined.
        max_set_size: larger prediction sets go to an expert.
        seed: of the bootstrap.
    Returns:
        The figures; undefined ones are None with a reason.
    Raises:
        ContractError: no picture, or probabilities that are not finite or do not sum to 1 (a model
            that gives them must not be summarised as if it had answered).
    """
    num_classes = len(taxonomy.codes)
    if not predictions.image_ids:
        raise ContractError("an evaluation needs at least one picture")
    check_probabilities(predictions.probabilities, num_classes)
    labels, probabilities = predictions.labels, predictions.probabilities
    predicted = probabilities.argmax(axis=1)
    lesions = gather_lesions(predictions.image_ids, predictions.lesion_ids, labels, probabilities)
    _, group_index = np.unique(np.array(predictions.group_ids, dtype=str), return_inverse=True)
    weights = resample_weights(group_strata(labels, group_index, num_classes), seed=seed)
    num_groups = weights.shape[1]
    confusion = confusion_matrix(labels, predicted, num_classes)
    confusions = resampled_confusions(labels, predicted, group_index, weights, num_classes)
    per_class = class_reports(taxonomy, confusion, confusions, labels, predicted, group_index, lesions)
    key_class = key_class_report(taxonomy, operating, lesions, group_index[lesions.first_image_index], weights)
    accuracy = float((labels == predicted).mean())
    accuracies = np.trace(confusions, axis1=1, axis2=2) / confusions.sum(axis=(1, 2))
    balanced = float(balanced_accuracy(confusion))
    return Evaluation(
        model_id=predictions.model_id,
        dataset_id=predictions.dataset_id,
        side=predictions.side.value if predictions.side else None,
        side_reads=predictions.side_reads,
        images=len(labels),
        lesions=len(lesions),
        groups=num_groups,
        balanced_accuracy=balanced,
        balanced_accuracy_ci=interval_of(balanced, balanced_accuracy(confusions), num_groups),
        accuracy=accuracy,
        accuracy_ci=interval_of(accuracy, accuracies, num_groups),
        macro_auc=_macro_auc(labels, probabilities),
        ece=expected_calibration_error(labels, probabilities),
        per_class=per_class,
        key_class=key_class,
        confusion_matrix=confusion.tolist(),
        undefined=undefined_reasons(taxonomy, per_class, key_class, operating),
        **_triage_figures(probabilities, taxonomy, operating, max_set_size),
    )


def _macro_auc(labels: IntArray, probabilities: FloatArray) -> float | None:
    aucs = one_vs_rest_auc(labels, probabilities)
    defined = aucs[~np.isnan(aucs)]
    return float(defined.mean()) if len(defined) else None


def _triage_figures(
    probabilities: FloatArray, taxonomy: Taxonomy, operating: OperatingPoints | None, max_set_size: int
) -> dict[str, float | None]:
    if operating is None:
        return {"answered_share": None, "mean_set_size": None}
    sets = prediction_set(probabilities, thresholds_in_order(operating, taxonomy))
    is_answered = answered(probabilities, taxonomy, operating, max_set_size)
    return {"answered_share": float(is_answered.mean()), "mean_set_size": float(sets.sum(axis=1).mean())}


def _record_read(store: Store, bundle: Bundle, dataset: DatasetVersion, side: Side, actor: str, num_images: int) -> int:
    action = f"{side.value}.read"
    with store.ledger.begin() as tx:
        audit.append(
            tx, actor=actor, action=action, subject=dataset.id, details={"model_id": bundle.id, "images": num_images}
        )
        return tx.count(AuditEvent, where={"action": action})
