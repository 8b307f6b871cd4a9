"""Robustness and explanation quality of a bundle, measured on a sample of evaluated images."""

from collections.abc import Callable

import numpy as np

from records.arrays import IntArray
from records.bundles import Bundle
from records.errors import ContractError
from trainers.evaluation.evaluate import SplitPredictions
from trainers.evaluation.faithfulness import explanation_quality, is_informative, randomisation_similarity
from trainers.evaluation.figures import ExplanationQuality, RobustnessReport
from trainers.evaluation.images import Images
from trainers.evaluation.robustness import PER_CLASS, PixelNetwork, Sample, robustness_curves
from vision.calibration.decision import labels_of
from vision.inference.loaded import load_model, plain_network
from vision.metrics.bootstrap import stratified_sample


def sample_of(predictions: SplitPredictions, per_class: int = PER_CLASS) -> IntArray:
    """Choose the images to measure on, ascending: at most `per_class` of a class, from as many groups as possible."""
    return stratified_sample(predictions.labels, _groups(predictions), per_class)


def measure_robustness(
    bundle: Bundle, predictions: SplitPredictions, on_batch: Callable[[int], None] | None = None
) -> RobustnessReport:
    """Attack a sample of the evaluated images with FGSM and PGD, in fp32; `on_batch` gets the images processed."""
    document, chosen = bundle.document, sample_of(predictions)
    refer = document.operating.refer
    key = document.taxonomy.key_class
    # Shares of the whole split: the sample is balanced, and its accuracy would be that of another population.
    counts = np.bincount(predictions.labels, minlength=len(document.taxonomy.codes))
    return robustness_curves(
        PixelNetwork(plain_network(bundle), document.geometry, document.calibration),
        _images(predictions).seen(chosen, document.geometry.frame),
        Sample(
            labels=predictions.labels[chosen],
            group_index=_groups(predictions)[chosen],
            class_shares=counts / counts.sum(),
            taxonomy=document.taxonomy,
            refer_threshold=refer[key.code].threshold if key is not None and key.code in refer else None,
            decision=document.operating.decision,
        ),
        on_batch=on_batch,
    )


def measure_explanations(bundle: Bundle, predictions: SplitPredictions) -> ExplanationQuality | None:
    """Measure the faithfulness of Grad-CAM on a sample of the evaluated images; None if every map is constant."""
    frame = bundle.document.geometry.frame
    chosen, images = sample_of(predictions), _images(predictions)
    pixels = images.seen(chosen, frame)
    # `auto` would take bf16 where the hardware has it, and reports of one bundle would differ by machine.
    model = load_model(bundle, precision="fp32")
    target = labels_of(model.predict(pixels).probabilities, bundle.document.operating.decision)
    maps = model.gradcam(pixels, target)
    if not is_informative(maps).any():
        return None
    has_masks = images.masks is not None or bool(images.outlines)
    masks = [images.mask(int(index), frame) for index in chosen] if has_masks else None
    return explanation_quality(
        lambda some: model.predict(some).probabilities,
        pixels,
        maps,
        target,
        method="gradcam",
        labels=predictions.labels[chosen],
        group_index=_groups(predictions)[chosen],
        num_classes=len(bundle.document.taxonomy.codes),
        masks=masks,
        randomisation_similarity=randomisation_similarity(bundle, pixels),
    )


def _groups(predictions: SplitPredictions) -> IntArray:
    _, group_index = np.unique(np.array(predictions.group_ids, dtype=str), return_inverse=True)
    return np.asarray(group_index, dtype=np.int64)


def _images(predictions: SplitPredictions) -> Images:
    if predictions.images is None:
        raise ContractError("these predictions have no images to read; predict the whole split or folder again")
    return predictions.images
