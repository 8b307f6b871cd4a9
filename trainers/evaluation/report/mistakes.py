"""The costliest misclassifications of an evaluation, by the ids of their images or each with its heat map.

Cost is the miss cost of the true class times the probability that the model did not give it.
"""

import base64
from dataclasses import dataclass, replace

import numpy as np

from images.decode import decode_frame
from images.overlay import overlay_png
from records.arrays import IntArray
from records.bundles import OperatingPoints
from records.taxonomy import Taxonomy
from trainers.evaluation.evaluate import SplitPredictions
from vision.calibration.decision import labels_of
from vision.calibration.operating import answered
from vision.inference.loaded import LoadedModel

NUM_MISTAKES = 12
SIDE_PX = 160


@dataclass(frozen=True)
class Mistake:
    """One misclassified image."""

    name: str
    """id of the image, or its name in a report that embeds images"""
    truth: str
    predicted: str
    truth_probability: float
    predicted_probability: float
    is_answered: bool
    """whether the rules would have left it to the model alone"""
    image: str | None = None
    """data URI; None in a report that embeds no images"""
    overlay: str | None = None
    """data URI of the image with the heat map of the predicted class"""


def worst_mistakes(
    predictions: SplitPredictions, taxonomy: Taxonomy, operating: OperatingPoints, count: int = NUM_MISTAKES
) -> IntArray:
    """Return the indices of at most `count` misclassified images, one per lesion, the costliest first."""
    labels, probabilities = predictions.labels, predictions.probabilities
    wrong = np.flatnonzero(labels_of(probabilities, operating.decision) != labels)
    costs = np.array([one.miss_cost for one in taxonomy.classes])
    loss = costs[labels[wrong]] * (1.0 - probabilities[wrong, labels[wrong]])
    chosen: list[int] = []
    seen: set[str] = set()
    # A stable sort: equal costs keep the order of images, so equal evaluations show equal mistakes.
    for index in wrong[np.argsort(-loss, kind="stable")].tolist():
        # An image without a lesion id is a lesion of its own.
        lesion = predictions.lesion_ids[index] or predictions.image_ids[index]
        if lesion not in seen and len(chosen) < count:
            chosen.append(index)
            seen.add(lesion)
    return np.array(chosen, dtype=np.int64)


def described_mistakes(predictions: SplitPredictions, taxonomy: Taxonomy, operating: OperatingPoints) -> list[Mistake]:
    """Describe the costliest mistakes without their images.

    Images of a dataset are named by their ids, rows of a folder's table by their numbers: file names may name people.
    """
    chosen = worst_mistakes(predictions, taxonomy, operating)
    predicted = labels_of(predictions.probabilities[chosen], operating.decision)
    is_answered = answered(predictions.probabilities[chosen], taxonomy, operating)
    return [
        Mistake(
            name=predictions.image_ids[index][:12] if predictions.dataset_id else f"row {index + 1}",
            truth=taxonomy.classes[int(predictions.labels[index])].name,
            predicted=taxonomy.classes[label].name,
            truth_probability=float(predictions.probabilities[index, predictions.labels[index]]),
            predicted_probability=float(predictions.probabilities[index, label]),
            is_answered=bool(alone),
        )
        for index, label, alone in zip(chosen.tolist(), predicted.tolist(), is_answered, strict=True)
    ]


def drawn_mistakes(predictions: SplitPredictions, model: LoadedModel, operating: OperatingPoints) -> list[Mistake]:
    """Draw the costliest mistakes, with names; without images if the predictions have none."""
    described = described_mistakes(predictions, model.taxonomy, operating)
    images, chosen = predictions.images, worst_mistakes(predictions, model.taxonomy, operating)
    if images is None or not described:
        return described
    predicted = labels_of(predictions.probabilities[chosen], operating.decision)
    maps = model.gradcam(images.seen(chosen, model.geometry.frame), predicted)
    drawn = []
    for mistake, index, heat_map in zip(described, chosen.tolist(), maps, strict=True):
        image = decode_frame(images.read(index), model.geometry.frame.shown(SIDE_PX))
        # An empty map changes no pixel; this only encodes the image as PNG.
        plain, overlay = _uri(overlay_png(image, np.zeros((1, 1)))), _uri(overlay_png(image, heat_map))
        drawn.append(replace(mistake, name=images.names[index], image=plain, overlay=overlay))
    return drawn


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
