"""How far heat maps can be believed: deletion, insertion, and energy on the lesion.

Deletion replaces pixels by the image's mean colour, insertion brings them back into a blurred image, both
in the order of the map, and watch the class's probability (Petsiuk et al. 2018, RISE). The baseline is the
same map with its cells shuffled: a random order of single pixels would be noise that breaks any network,
and every map would look good beside it. Energy on the lesion is the energy-based pointing game
(Wang et al. 2020, Score-CAM) against the share of the image that the lesion covers.

In: functions that answer for pixels uint8 [N, S, S, 3], and maps [N, h, w]. Out: figures. Nothing is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from records.arrays import BoolArray, FloatArray, IntArray, UInt8Array
from records.errors import ContractError
from trainers.evaluation.probes import ExplanationQuality, Interval, MaskEnergy, ReplacementCurve
from vision.explanations.overlay import resized_strength
from vision.metrics.bootstrap import group_strata, resample_weights

NUM_STEPS = 16
"""Equal steps from nothing replaced to everything replaced."""

BLUR_SHARE = 1 / 8
"""Deviation of the blur that insertion starts from, as a share of the image's split."""

BATCH_SIZE = 64

Answer = Callable[[UInt8Array], FloatArray]
"""pixels [N, S, S, 3] -> probabilities [N, C]"""


@dataclass(frozen=True)
class Replacement:
    """Curves of N images, each [N, K + 1]: the class's probability after 0, 1, ... K of K equal steps."""

    deletion: FloatArray
    deletion_shuffled: FloatArray
    insertion: FloatArray
    insertion_shuffled: FloatArray


def replacement_order(heat_map: NDArray[np.floating], side_px: int, generator: np.random.Generator) -> IntArray:
    """Order the pixels of an image by a map, most important first; ties are broken by chance.

    Args:
        heat_map: [h, w], finite; negative values count as zero. Resized as it is drawn.
        side_px: S.
        generator: of the chance.
    Returns:
        [S * S] indices into the image's pixels, row by row.
    """
    strength = resized_strength(heat_map, side_px, side_px).ravel()
    order: IntArray = np.lexsort((generator.random(len(strength)), -strength))
    return order


def replacement_curve(
    answer: Answer,
    start: UInt8Array,
    fill: UInt8Array,
    orders: IntArray,
    target: IntArray,
    num_steps: int = NUM_STEPS,
) -> FloatArray:
    """Follow a class's probability while pixels of one image give way to those of another.

    Args:
        answer: gives probabilities.
        start: [N, S, S, 3], what the images are at first.
        fill: [N, S, S, 3], what they are in the end.
        orders: [N, S * S] pixel indices, the first one replaced first.
        target: [N] the class that is watched.
        num_steps: K.
    Returns:
        [N, K + 1] probabilities.
    """
    num_images, num_pixels = orders.shape
    current = start.reshape(num_images, num_pixels, 3).copy()
    end = fill.reshape(num_images, num_pixels, 3)
    rows = np.arange(num_images)
    ends = np.linspace(0, num_pixels, num_steps + 1).round().astype(np.int64)
    curve = np.empty((num_images, num_steps + 1))
    for step, (begin, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        pixels = orders[:, begin:stop]
        current[rows[:, None], pixels] = end[rows[:, None], pixels]
        curve[:, step] = answer(current.reshape(start.shape))[rows, target]
    return curve


def area_under(curve: FloatArray) -> FloatArray:
    """Return the area under curves over the replaced share 0 to 1, by trapezoids: [..., K + 1] -> [...]."""
    return np.asarray((curve[..., 1:] + curve[..., :-1]).mean(axis=-1) / 2)


def replace_pixels(
    answer: Answer,
    pixels: UInt8Array,
    maps: NDArray[np.floating],
    target: IntArray,
    *,
    num_steps: int = NUM_STEPS,
    seed: int = 0,
) -> Replacement:
    """Run deletion and insertion, in the order of the maps and of the same maps with shuffled cells.

    Args:
        answer: gives probabilities.
        pixels: [N, S, S, 3].
        maps: [N, h, w], finite.
        target: [N] the class that each map is about.
        num_steps: K.
        seed: of the shuffling; equal seeds give equal curves.
    Returns:
        The four curves.
    """
    side_px = pixels.shape[1]
    generator = np.random.default_rng(seed)
    shuffled = generator.permuted(maps.reshape(len(maps), -1), axis=1).reshape(maps.shape)
    mean = pixels.mean(axis=(1, 2), keepdims=True).round().astype(np.uint8)
    flat = np.broadcast_to(mean, pixels.shape)
    blurred = np.stack([cv2.GaussianBlur(image, (0, 0), BLUR_SHARE * side_px) for image in pixels])
    curves = {}
    for name, ranked in (("", maps), ("_shuffled", shuffled)):
        orders = np.stack([replacement_order(one, side_px, generator) for one in ranked])
        curves[f"deletion{name}"] = replacement_curve(answer, pixels, flat, orders, target, num_steps)
        curves[f"insertion{name}"] = replacement_curve(answer, blurred, pixels, orders, target, num_steps)
    return Replacement(**curves)


def is_telling(maps: NDArray[np.floating]) -> BoolArray:
    """Return which maps tell anything, [N]: not those that are even, or nowhere above zero."""
    positive = np.clip(maps, 0.0, None)
    return np.asarray(np.ptp(positive, axis=(1, 2)) > 0, dtype=np.bool_)


def mask_energy(heat_map: NDArray[np.floating], mask: BoolArray) -> float | None:
    """Return the share of a map's energy that lies inside a mask.

    Args:
        heat_map: [h, w], finite; negative values count as zero. Resized as it is drawn.
        mask: [S, S].
    Returns:
        0 to 1; None if the map is zero everywhere.
    """
    strength = resized_strength(heat_map, *mask.shape).astype(np.float64)
    total = strength.sum()
    return float(strength[mask].sum() / total) if total > 0 else None


def explanation_quality(
    answer: Answer,
    pixels: UInt8Array,
    maps: NDArray[np.floating],
    target: IntArray,
    *,
    method: str,
    labels: IntArray,
    group_index: IntArray,
    num_classes: int,
    masks: list[BoolArray | None] | None = None,
    randomisation_similarity: float | None = None,
    num_steps: int = NUM_STEPS,
) -> ExplanationQuality:
    """Measure how faithful maps are, with intervals by group.

    Args:
        answer: gives probabilities [N, C] for pixels [N, S, S, 3].
        pixels: [N, S, S, 3].
        maps: [N, h, w], finite; flat ones are counted and left out.
        target: [N] the class that each map is about.
        method: how the maps were made, for the report.
        labels: [N] class indices, which the bootstrap is stratified by.
        group_index: [N] the independent unit of each image.
        num_classes: C.
        masks: per image the lesion's mask [S, S], or None; an empty mask counts as none.
        randomisation_similarity: if it was measured, see `trainers.evaluation.sanity`.
        num_steps: of deletion and insertion.
    Returns:
        The figures.
    Raises:
        ContractError: every map is flat, so there is nothing to measure.
    """
    telling = np.flatnonzero(is_telling(maps))
    if not len(telling):
        raise ContractError(f"all {len(maps)} maps of {method} are flat; they explain nothing, and cannot be measured")
    curves = replace_pixels(answer, pixels[telling], maps[telling], target[telling], num_steps=num_steps)
    units = _Units(labels[telling], group_index[telling], num_classes)
    return ExplanationQuality(
        method=method,
        images=len(telling),
        constant_maps=len(maps) - len(telling),
        deletion=_report(curves.deletion, curves.deletion_shuffled, -1.0, units),
        insertion=_report(curves.insertion, curves.insertion_shuffled, 1.0, units),
        randomisation_similarity=randomisation_similarity,
        mask_energy=None if masks is None else _mask_report(maps, masks, telling, labels, group_index, num_classes),
    )


class _Units:
    """Means over images with intervals by group within class."""

    def __init__(self, labels: IntArray, group_index: IntArray, num_classes: int) -> None:
        _, self._group_index = np.unique(group_index, return_inverse=True)
        self._weights = resample_weights(group_strata(labels, self._group_index, num_classes))

    def mean(self, values: FloatArray) -> tuple[float, Interval]:
        """Return the mean of [N] values with its interval."""
        num_groups = self._weights.shape[1]
        sums = self._weights @ np.bincount(self._group_index, weights=values, minlength=num_groups)
        counts = self._weights @ np.bincount(self._group_index, minlength=num_groups)
        samples = np.asarray(sums / counts, dtype=np.float64)
        estimate = float(values.mean())
        if np.ptp(samples) == 0:
            return estimate, (estimate, estimate)
        low, high = np.quantile(samples, [0.025, 0.975])
        return estimate, (float(low), float(high))


def _report(curves: FloatArray, shuffled: FloatArray, sign: float, units: _Units) -> ReplacementCurve:
    areas, shuffled_areas = area_under(curves), area_under(shuffled)
    gain, gain_ci = units.mean(sign * (areas - shuffled_areas))
    return ReplacementCurve(
        auc=float(areas.mean()),
        random_auc=float(shuffled_areas.mean()),
        gain=gain,
        gain_ci=gain_ci,
        curve=curves.mean(axis=0).tolist(),
        random_curve=shuffled.mean(axis=0).tolist(),
    )


def _mask_report(
    maps: NDArray[np.floating],
    masks: list[BoolArray | None],
    telling: IntArray,
    labels: IntArray,
    group_index: IntArray,
    num_classes: int,
) -> MaskEnergy | None:
    known = [(index, mask) for index in telling.tolist() if (mask := masks[index]) is not None and mask.any()]
    measured = [(index, mask_energy(maps[index], mask), float(mask.mean())) for index, mask in known]
    pairs = [(index, energy, area) for index, energy, area in measured if energy is not None]
    if not pairs:
        return None
    chosen = np.array([index for index, _, _ in pairs])
    energies, areas = (np.array([pair[column] for pair in pairs]) for column in (1, 2))
    energy, energy_ci = _Units(labels[chosen], group_index[chosen], num_classes).mean(energies)
    return MaskEnergy(
        images=len(pairs),
        energy=energy,
        energy_ci=energy_ci,
        area=float(areas.mean()),
        above_area=float((energies > areas).mean()),
    )
