"""Predictions of a model on one split of a dataset, and the metrics of predictions with their intervals.

In: a bundle and a dataset split, or arrays. Out: `SplitPredictions` and `trainers.evaluation.figures.Evaluation`.
Accuracy is per image; the key class at its operating point is per lesion, by the mean probability over the lesion's
images. Intervals are 95 %: bootstrap by group within class, and exact (Clopper-Pearson over groups) where a bootstrap
cannot vary, as for a sensitivity of 1.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.progress import Progress

from images.cache import PixelCache, PixelRows
from records import audit
from records.arrays import BoolArray, Float32Array, FloatArray, IntArray
from records.bundles import Bundle, DecisionRule, OperatingPoints
from records.context import Known, context_of_image
from records.datasets import DatasetVersion
from records.errors import ContractError, DataError, UnknownIdError
from records.seen import seen_by
from records.store import Store, find_images, read_image
from records.taxonomy import Taxonomy
from records.types import Annotation, AuditEvent, Image, Split
from trainers.evaluation.decisions import (
    decided,
    label_outside_set,
    point_reports,
    referral_curve,
    rule_reports,
)
from trainers.evaluation.figures import (
    Coverage,
    EqualPrevalence,
    Evaluation,
    ReliabilityBin,
    RuleReport,
    class_reports,
    interval_of,
    key_class_report,
    undefined_reasons,
)
from trainers.evaluation.images import Images, Traits, traits_of_images
from trainers.evaluation.skin import SkinTones
from vision.calibration.decision import sets_of
from vision.calibration.operating import Lesions, answered, gather_lesions
from vision.calibration.scaling import reweight
from vision.inference.loaded import LoadedModel, load_model
from vision.inference.output import BatchOutput
from vision.metrics.bootstrap import group_strata, resample_weights, resampled_counts
from vision.metrics.metrics import (
    ClassCounts,
    accuracy_of,
    balanced_accuracy,
    check_probabilities,
    confusion_matrix,
    expected_calibration_error,
    macro_f1,
    one_vs_rest_auc,
    reliability_bins,
)

BATCH_SIZE = 64
GUARDED_SPLITS = (Split.GATE, Split.TEST)


@dataclass(frozen=True)
class SplitPredictions:
    """A model's predictions for labelled images; all sequences have length N and the same order."""

    model_id: str
    image_ids: list[str]
    group_ids: list[str]
    lesion_ids: list[str | None]
    labels: IntArray
    """[N] class indices"""
    logits: Float32Array
    """[N, C], before calibration"""
    probabilities: FloatArray
    """[N, C], calibrated"""
    dataset_id: str | None = None
    split: Split | None = None
    split_reads: int | None = None
    seen: BoolArray | None = None
    """[N] true for images that the model was trained on, or on others of their group; None: nobody can tell"""
    traits: list[Traits] | None = None
    without_context: FloatArray | None = None
    """[N, C], calibrated, of the images alone; None if the model uses no context"""
    known: Sequence[Known] | None = None
    """[N] the context of each image"""
    images: Images | None = None
    """reads the image files again; None for predictions of a slice"""


def predict_split(
    store: Store,
    bundle: Bundle,
    dataset: DatasetVersion,
    split: Split,
    actor: str,
    *,
    model: LoadedModel | None = None,
    progress: Progress | None = None,
    masks: Path | None = None,
) -> SplitPredictions:
    """Predict every labelled image of a split. Reads of gate and test are audited before they happen.

    Args:
        store: with the images and the pixel cache.
        bundle: whose model predicts.
        dataset: the version with the split.
        split: which images.
        actor: name of the reader in the audit.
        model: the bundle's model if it is loaded already.
        progress: a bar is added to it.
        masks: folder of lesion masks, named after the images; skin tone is measured outside them.
    Returns:
        The predictions, in order of image id.
    Raises:
        TaxonomyError: model and dataset were made with different taxonomies.
        DataError: the split is empty.
        ContractError: `model` is not this bundle's.
    """
    bundle.document.taxonomy.require_same(dataset.taxonomy_hash, f"dataset {dataset.id[:12]}")
    if model is not None and model.model_id != bundle.id:
        raise ContractError(f"model {model.model_id[:12]} is not the one of bundle {bundle.id[:12]}")
    rows = dataset.split(split)
    if rows.empty:
        raise DataError(f"split {split.value} of dataset {dataset.id[:12]} has no images; import more lesions")
    # Before the read is recorded: a model that cannot be loaded uses up no look at gate or test.
    model = model or load_model(bundle)
    split_reads = _record_read(store, bundle, dataset, split, actor, len(rows)) if split in GUARDED_SPLITS else None
    image_ids = [str(image_id) for image_id in rows["image_id"]]
    cache = PixelCache(store.home.cache, bundle.document.geometry.frame)
    cache.ensure(store, image_ids, progress)  # shared with fitting and later evaluations
    images = find_images(store, image_ids)
    tones = SkinTones([image.source_id for image in images], masks, bundle.document.geometry.frame)
    known = [context_of_image(image) for image in images]
    outputs = _outputs(model, cache.rows(image_ids), known, tones, f"Predicting {split.value}", progress)
    return SplitPredictions(
        model_id=bundle.id,
        image_ids=image_ids,
        group_ids=[str(group_id) for group_id in rows["group_id"]],
        lesion_ids=[image.lesion_id for image in images],
        labels=np.array([bundle.document.taxonomy.index_of(str(label)) for label in rows["label"]], dtype=np.int64),
        **joined_outputs(outputs),
        dataset_id=dataset.id,
        split=split,
        seen=_seen(store, bundle, rows),
        split_reads=split_reads,
        known=known,
        traits=traits_of_images(images, [int(rank) for rank in rows["label_rank"]], tones.angles),
        images=_images(store, images, masks),
    )


def _seen(store: Store, bundle: Bundle, rows: pd.DataFrame) -> BoolArray | None:
    try:
        found = [is_seen for _, is_seen in seen_by(store, bundle, rows)]
    except UnknownIdError:
        # A model of another home can be measured, too; that nobody can tell is said.
        return None
    return np.asarray(np.any(found, axis=0), dtype=np.bool_)


def _images(store: Store, images: list[Image], masks: Path | None) -> Images:
    names = [image.source_id or image.id for image in images]
    painted = _outlines(store, [image.id for image in images])
    at = {index: painted[image.id] for index, image in enumerate(images) if image.id in painted}
    return Images(names=names, read=lambda index: read_image(store, images[index]), masks=masks, outlines=at)


def _outlines(store: Store, image_ids: list[str]) -> dict[str, bytes]:
    """Return the newest outline of each image that annotators painted and did not take back, a PNG."""
    with store.ledger.read() as tx:
        rows = tx.find(Annotation, where={"image_id": image_ids}, order_by=("created_at", "id"))
    newest = {(row.server, row.annotation_id): row for row in rows}
    kept = [row for row in newest.values() if not row.deleted and row.outline is not None]
    ordered = sorted(kept, key=lambda row: (row.annotated_at, row.id))
    return {row.image_id: base64.b64decode(row.outline or "") for row in ordered}


def joined_outputs(outputs: Sequence[BatchOutput]) -> dict[str, Any]:
    """Return the fields of `SplitPredictions` that a model's batches give."""
    without = [output.without_context for output in outputs if output.without_context is not None]
    return {
        "logits": np.concatenate([output.logits for output in outputs]),
        "probabilities": np.concatenate([output.probabilities for output in outputs]),
        "without_context": np.concatenate(without) if without else None,
    }


def _outputs(
    model: LoadedModel,
    pixels: PixelRows,
    known: Sequence[Known],
    tones: SkinTones,
    title: str,
    progress: Progress | None,
) -> list[BatchOutput]:
    """Predict batch by batch, and measure the skin tone of each batch while its pixels are in memory."""
    task = progress.add_task(title, total=len(pixels)) if progress else None
    outputs = []
    for start in range(0, len(pixels), BATCH_SIZE):
        batch = pixels.take(np.arange(start, min(start + BATCH_SIZE, len(pixels))))
        outputs.append(model.predict(batch, context=known[start : start + BATCH_SIZE]))
        # Here, because the pixels of a split may not fit in memory together.
        tones.add(batch)
        if progress and task is not None:
            progress.advance(task, len(batch))
    return outputs


def evaluate(
    predictions: SplitPredictions,
    taxonomy: Taxonomy,
    operating: OperatingPoints | None,
    *,
    prevalence: Mapping[str, float] | None = None,
    priors: Mapping[str, float] | None = None,
    max_set_size: int = 2,
    seed: int = 0,
) -> Evaluation:
    """Compute all metrics of an evaluation.

    Args:
        predictions: at least one image; every row a distribution.
        taxonomy: class order, key classes and names.
        operating: rule and thresholds of the model; None: labels are `natural`, and what needs thresholds is undefined.
        prevalence: class shares that predictions are re-weighted to; metrics with thresholds stay as served.
        priors: class shares at calibration; needed with `prevalence`, and for the figures of every rule.
        max_set_size: larger prediction sets go to an annotator.
        seed: of the bootstrap.
    Returns:
        The metrics; undefined ones are None with a reason.
    Raises:
        ContractError: no image, or probabilities that are not finite or do not sum to 1.
    """
    labels, served, num_classes = predictions.labels, predictions.probabilities, len(taxonomy.codes)
    _require_images(predictions, num_classes)
    # Triage runs on the served probabilities: thresholds and sets were fitted on them, not on re-weighted ones.
    probabilities = served if prevalence is None else reweight(served, priors or {}, prevalence)
    decision = DecisionRule() if operating is None else operating.decision
    predicted = decided(served, probabilities, decision)
    lesions = gather_lesions(predictions.image_ids, predictions.lesion_ids, labels, served)
    _, group_index = np.unique(np.array(predictions.group_ids, dtype=str), return_inverse=True)
    # One set of resamples for all metrics, so that their intervals rest on the same draws.
    weights = resample_weights(group_strata(labels, group_index, num_classes), seed=seed)
    confusion = confusion_matrix(labels, predicted, num_classes)
    resampled = resampled_counts(labels, predicted, group_index, weights, num_classes)
    aucs = one_vs_rest_auc(labels, probabilities)
    per_class = class_reports(taxonomy, confusion, resampled, labels, predicted, group_index, lesions, aucs)
    group_of_lesion = group_index[lesions.first_image_index]
    key_class = key_class_report(taxonomy, operating, lesions, group_of_lesion, weights)
    by_rule = rule_reports(labels, served, probabilities, taxonomy, priors, decision, group_index, weights)
    return Evaluation(
        **_basis(predictions, lesions, weights),
        **whole_figures(confusion, resampled, weights.shape[1]),
        macro_auc=_mean_of_finite(aucs),
        ece=expected_calibration_error(labels, probabilities),
        reliability=_reliability(labels, probabilities),
        prevalence=None if prevalence is None else dict(prevalence),
        at_equal_prevalence=_at_equal_prevalence(by_rule.get("even")),
        rule=decision.rule,
        by_rule=by_rule,
        per_class=per_class,
        key_class=key_class,
        confusion_matrix=confusion.tolist(),
        coverage=coverage_report(served, lesions, taxonomy, operating),
        undefined=undefined_reasons(taxonomy, per_class, key_class, operating),
        **_triage_figures(predictions, lesions, taxonomy, operating, group_of_lesion, weights, max_set_size),
    )


def _basis(predictions: SplitPredictions, lesions: Lesions, weights: Float32Array) -> dict[str, Any]:
    return {
        "model_id": predictions.model_id,
        "dataset_id": predictions.dataset_id,
        "split": predictions.split.value if predictions.split else None,
        "split_reads": predictions.split_reads,
        "trained_on": None if predictions.seen is None else int(predictions.seen.sum()),
        "images": len(predictions.labels),
        "lesions": len(lesions),
        "groups": weights.shape[1],
    }


def _mean_of_finite(values: FloatArray) -> float | None:
    # Checked first, because nanmean warns if there is nothing to average.
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _require_images(predictions: SplitPredictions, num_classes: int) -> None:
    if not predictions.image_ids:
        raise ContractError("an evaluation needs at least one image")
    check_probabilities(predictions.probabilities, num_classes)


def _reliability(labels: IntArray, probabilities: FloatArray) -> list[ReliabilityBin]:
    return [
        ReliabilityBin(confidence=confidence, accuracy=accuracy, images=images)
        for confidence, accuracy, images in reliability_bins(labels, probabilities)
    ]


def coverage_report(
    probabilities: FloatArray, lesions: Lesions, taxonomy: Taxonomy, operating: OperatingPoints | None
) -> Coverage | None:
    """Return how often prediction sets of probabilities [N, C] hold the true class; None without thresholds."""
    if operating is None or not operating.conformal_thresholds:
        return None
    # One image per lesion, because images of a lesion are not independent and the promise is per image.
    sets = sets_of(probabilities[lesions.first_image_index], taxonomy, operating)
    held = sets[np.arange(len(lesions)), lesions.labels]
    return Coverage(
        promise=operating.conformal_promise,
        overall=float(held.mean()),
        per_class={
            code: float(held[lesions.labels == index].mean()) if (lesions.labels == index).any() else None
            for index, code in enumerate(taxonomy.codes)
        },
        pooled_classes=operating.pooled_classes,
    )


def _at_equal_prevalence(even: RuleReport | None) -> EqualPrevalence | None:
    # The rule `even` re-weights by Bayes to equal class shares: the largest of p / share is that of the new p.
    if even is None:
        return None
    return EqualPrevalence(
        balanced_accuracy=even.balanced_accuracy,
        balanced_accuracy_ci=even.balanced_accuracy_ci,
        sensitivity=even.sensitivity,
    )


def whole_figures(confusion: IntArray, resampled: ClassCounts, num_groups: int) -> dict[str, Any]:
    """Return balanced accuracy, accuracy and macro F1 of a confusion matrix, with intervals from counts [R, C]."""
    figures: dict[str, Any] = {}
    for name, function in (("balanced_accuracy", balanced_accuracy), ("accuracy", accuracy_of), ("macro_f1", macro_f1)):
        estimate = float(function(confusion))
        figures |= {name: estimate, f"{name}_ci": interval_of(estimate, function(resampled), num_groups)}
    return figures


def _triage_figures(
    predictions: SplitPredictions,
    lesions: Lesions,
    taxonomy: Taxonomy,
    operating: OperatingPoints | None,
    group_of_lesion: IntArray,
    weights: Float32Array,
    max_set_size: int,
) -> dict[str, Any]:
    if operating is None:
        return {"answered_share": None, "mean_set_size": None}
    # Thresholds and sets only: the checks of quality and novelty that serving adds need the pixels.
    probabilities = predictions.probabilities
    sets = sets_of(probabilities, taxonomy, operating)
    is_answered = answered(probabilities, taxonomy, operating, max_set_size)
    return {
        "answered_share": float(is_answered.mean()),
        "mean_set_size": float(sets.sum(axis=1).mean()),
        "label_outside_set": label_outside_set(predictions.labels, probabilities, taxonomy, operating),
        "points": point_reports(probabilities, lesions, taxonomy, operating, group_of_lesion, weights, max_set_size),
        "referral": referral_curve(probabilities, lesions, taxonomy, operating, max_set_size),
    }


def _record_read(
    store: Store, bundle: Bundle, dataset: DatasetVersion, split: Split, actor: str, num_images: int
) -> int:
    action = f"{split.value}.read"
    # Appended and counted in one transaction, so that the count includes this read.
    with store.ledger.begin() as tx:
        audit.append(
            tx, actor=actor, action=action, subject=dataset.id, details={"model_id": bundle.id, "images": num_images}
        )
        return tx.count(AuditEvent, where={"action": action})
