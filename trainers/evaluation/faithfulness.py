"""Faithfulness of heat maps: deletion, insertion, energy on the lesion, and comparison with a random network.

Deletion replaces pixels by the image's mean colour, insertion brings them back into a blurred image, both in the order
of the map, and follow the class's probability (Petsiuk et al. 2018, RISE). The baseline is the same map with its cells
shuffled: a random order of single pixels would be noise that breaks any network, and every map would look good beside
it. Energy on the lesion is the energy-based pointing game (Wang et al. 2020, Score-CAM) against the share of the image
that the lesion covers. The model parameter randomisation test (Adebayo et al. 2018, Sanity Checks for Saliency Maps,
section 3) compares the maps with those of random weights: maps that stay alike show edges of the image.

In: functions or networks that predict for pixels uint8 [N, S, S, 3], and maps [N, h, w]. Out: metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from images.overlay import resized_strength
from records.arrays import BoolArray, Float32Array, FloatArray, IntArray, UInt8Array
from records.bundles import Architecture, Bundle, Calibration, Geometry
from records.errors import ContractError
from trainers.evaluation.figures import ExplanationQuality, Interval, MaskEnergy, ReplacementCurve
from vision.calibration.scaling import apply_calibration
from vision.explanations.closed_form import closed_form_of
from vision.explanations.gradients import head_gradcam
from vision.inference.loaded import plain_network, reference_logits
from vision.metrics.bootstrap import group_strata, percentile_interval, resample_weights
from vision.networks import build_model
from vision.preprocess import scale_pixels, to_tensor

NUM_STEPS = 16
"""Equal steps from nothing replaced to everything replaced."""

BLUR_SHARE = 1 / 8
"""Deviation of the blur that insertion starts from, as a share of the image's side."""

FACTS_IMAGES, FACTS_STEPS, FACTS_DIGITS = 16, 8, 4
"""Sample, steps and rounding of what a bundle stores about its own maps; a report measures more."""

Predict = Callable[[UInt8Array], FloatArray]
"""pixels [N, S, S, 3] -> probabilities [N, C]"""


@dataclass(frozen=True)
class Replacement:
    """Curves of N images, each [N, K + 1]: the class's probability after 0, 1, ... K of K equal steps."""

    deletion: FloatArray
    deletion_shuffled: FloatArray
    insertion: FloatArray
    insertion_shuffled: FloatArray


def replacement_order(heat_map: NDArray[np.floating], side_px: int, generator: np.random.Generator) -> IntArray:
    """Order the pixels of an image by a map, most important first; ties are broken at random.

    Args:
        heat_map: [h, w], finite; negative values count as zero. Resized as it is drawn.
        side_px: S.
        generator: breaks ties.
    Returns:
        [S * S] indices into the image's pixels, row by row.
    """
    strength = resized_strength(heat_map, side_px, side_px).ravel()
    # Large areas of a resized map are equal, mostly zero: in row order they would favour the top of the image.
    # lexsort takes its last key first.
    order: IntArray = np.lexsort((generator.random(len(strength)), -strength))
    return order


def replacement_curve(
    predict: Predict,
    start: UInt8Array,
    fill: UInt8Array,
    orders: IntArray,
    target: IntArray,
    num_steps: int = NUM_STEPS,
) -> FloatArray:
    """Follow a class's probability while pixels of one image give way to those of another.

    Args:
        predict: pixels [N, S, S, 3] -> probabilities [N, C].
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
    # The first step replaces nothing, since ends[0] is 0. Replaced pixels stay, so each step adds its own slice only.
    for step, (begin, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        pixels = orders[:, begin:stop]
        current[rows[:, None], pixels] = end[rows[:, None], pixels]
        curve[:, step] = predict(current.reshape(start.shape))[rows, target]
    return curve


def area_under(curve: FloatArray) -> FloatArray:
    """Return the area under curves over the replaced share 0 to 1, by trapezoids: [..., K + 1] -> [...]."""
    return np.asarray((curve[..., 1:] + curve[..., :-1]).mean(axis=-1) / 2)


def replace_pixels(
    predict: Predict,
    pixels: UInt8Array,
    maps: NDArray[np.floating],
    target: IntArray,
    *,
    num_steps: int = NUM_STEPS,
    seed: int = 0,
) -> Replacement:
    """Run deletion and insertion, in the order of the maps and of the same maps with shuffled cells.

    Args:
        predict: pixels [N, S, S, 3] -> probabilities [N, C].
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
    # As in RISE, insertion starts from a blurred image: a flat one would gain sharp edges that the network reacts to.
    blurred = np.stack([cv2.GaussianBlur(image, (0, 0), BLUR_SHARE * side_px) for image in pixels])
    curves = {}
    for name, ranked in (("", maps), ("_shuffled", shuffled)):
        orders = np.stack([replacement_order(one, side_px, generator) for one in ranked])
        curves[f"deletion{name}"] = replacement_curve(predict, pixels, flat, orders, target, num_steps)
        curves[f"insertion{name}"] = replacement_curve(predict, blurred, pixels, orders, target, num_steps)
    return Replacement(**curves)


def is_informative(maps: NDArray[np.floating]) -> BoolArray:
    """Return which maps rank pixels at all, [N]: not those that are constant or nowhere above zero."""
    # Clipped first: a map that varies below zero only orders no pixel, since negative values count as zero.
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
    predict: Predict,
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
        predict: pixels [N, S, S, 3] -> probabilities [N, C].
        pixels: [N, S, S, 3].
        maps: [N, h, w], finite; flat ones are counted and left out.
        target: [N] the class that each map is about.
        method: how the maps were made, for the report.
        labels: [N] class indices, which the bootstrap is stratified by.
        group_index: [N] the independent unit of each image.
        num_classes: C.
        masks: per image the lesion's mask [S, S], or None; an empty mask counts as none.
        randomisation_similarity: if it was measured, see `randomisation_similarity`.
        num_steps: of deletion and insertion.
    Returns:
        The figures.
    Raises:
        ContractError: every map is flat, so there is nothing to measure.
    """
    informative = np.flatnonzero(is_informative(maps))
    if not len(informative):
        raise ContractError(f"all {len(maps)} maps of {method} are flat; they explain nothing and cannot be measured")
    curves = replace_pixels(predict, pixels[informative], maps[informative], target[informative], num_steps=num_steps)
    units = _Units(labels[informative], group_index[informative], num_classes)
    return ExplanationQuality(
        method=method,
        images=len(informative),
        constant_maps=len(maps) - len(informative),
        deletion=_report(curves.deletion, curves.deletion_shuffled, -1.0, units),
        insertion=_report(curves.insertion, curves.insertion_shuffled, 1.0, units),
        randomisation_similarity=randomisation_similarity,
        mask_energy=None if masks is None else _mask_report(maps, masks, informative, labels, group_index, num_classes),
    )


def randomisation_similarity(bundle: Bundle, pixels: UInt8Array, *, seed: int = 0) -> float | None:
    """Compare Grad-CAM of the trained network with that of a random one.

    Args:
        bundle: of the trained model.
        pixels: uint8 [N, S, S, 3], real images of the model's geometry, N >= 1.
        seed: of the random weights.
    Returns:
        Mean over the images of the absolute Spearman correlation between both maps of the predicted class, 0 to 1;
        images whose trained map is constant are left out. None if all are.
    """
    document = bundle.document
    num_classes = len(document.taxonomy.codes)
    trained = plain_network(bundle)
    inputs = scale_pixels(to_tensor(pixels), document.geometry)
    with torch.inference_mode():
        target = trained(inputs).argmax(dim=1)
    random = random_network(document.architecture, num_classes, seed=seed)
    return similarity(target_maps(trained, inputs, target), target_maps(random, inputs, target))


def random_network(architecture: Architecture, num_classes: int, *, seed: int = 0) -> nn.Module:
    """Build a network with random weights, in evaluation mode; torch's global generator is restored."""
    # `build_model` draws from torch's global generator, which a training in this process draws from as well.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(architecture.name, num_classes, **architecture.options).eval()


def similarity(ours: Float32Array, theirs: Float32Array) -> float | None:
    """Compare the maps of two networks.

    Args:
        ours: [N, h, w] of the trained network.
        theirs: [N, h, w] of the random one; a constant map has nothing in common with ours.
    Returns:
        Mean absolute Spearman correlation, 0 to 1, where ours are not constant; None if all are.
    """
    # Imported here: it takes most of a second, which every training would spend for the maps that it only shows.
    from scipy.stats import spearmanr

    likeness = [
        # The correlation with a constant map is undefined; such a map ranks nothing, so it counts as 0.
        abs(float(spearmanr(mine.ravel(), other.ravel()).statistic)) if np.ptp(other) > 0 else 0.0
        for mine, other in zip(ours, theirs, strict=True)
        if np.ptp(mine) > 0
    ]
    return float(np.mean(likeness)) if likeness else None


def target_maps(network: nn.Module, inputs: Tensor, target: Tensor) -> Float32Array:
    """Compute Grad-CAM of one class per image.

    Args:
        network: in evaluation mode, with the parts `features` and `head`.
        inputs: [N, 3, S, S], scaled.
        target: [N] class indices.
    Returns:
        [N, h, w], not negative.
    """
    with torch.inference_mode():
        features: Tensor = network.get_submodule("features")(inputs)
        head = network.get_submodule("head")
        closed_form = closed_form_of(head)
        if closed_form is None:
            return head_gradcam(head, features, target).numpy()
        return closed_form.maps(features)[torch.arange(len(target)), target].numpy()


def faithfulness_facts(
    network: nn.Module,
    architecture: Architecture,
    geometry: Geometry,
    calibration: Calibration,
    pixels: UInt8Array,
) -> dict[str, float | int | None]:
    """Measure how faithful the Grad-CAM maps of a network are.

    Args:
        network: trained, in evaluation mode, on the CPU; it has the parts `features` and `head`.
        architecture: what it is, to build the random network of the sanity check.
        geometry: of the network.
        calibration: of its logits.
        pixels: [N, S, S, 3], N >= 1; the first 16 are used.
    Returns:
        `images` and `constant_maps` (left out), areas of deletion and insertion beside those of the same maps with
        shuffled cells, and the similarity to a random network's maps; null where nothing could be measured.
    """
    pixels = np.ascontiguousarray(pixels[:FACTS_IMAGES])
    num_classes = len(calibration.bias)

    def predict(some: UInt8Array) -> FloatArray:
        return apply_calibration(reference_logits(network, some, geometry), calibration)

    # Not a `LoadedModel`: the bundle that these facts are written into does not exist yet.
    inputs = scale_pixels(to_tensor(pixels), geometry)
    target = predict(pixels).argmax(axis=1)
    maps = target_maps(network, inputs, torch.from_numpy(target))
    random = random_network(architecture, num_classes)
    likeness = similarity(maps, target_maps(random, inputs, torch.from_numpy(target)))
    informative = np.flatnonzero(is_informative(maps))
    facts: dict[str, float | int | None] = {"images": len(informative), "constant_maps": len(maps) - len(informative)}
    names = ("deletion", "deletion_shuffled", "insertion", "insertion_shuffled")
    if len(informative):
        curves = replace_pixels(
            predict, pixels[informative], maps[informative], target[informative], num_steps=FACTS_STEPS
        )
        facts |= {f"{name}_auc": round(float(area_under(getattr(curves, name)).mean()), FACTS_DIGITS) for name in names}
    else:
        facts |= {f"{name}_auc": None for name in names}
    # Rounded, because these facts are content of the bundle: noise in the last digits would change its id.
    facts["randomisation_similarity"] = None if likeness is None else round(likeness, FACTS_DIGITS)
    return facts


class _Units:
    """Means over images with intervals by group within class."""

    def __init__(self, labels: IntArray, group_index: IntArray, num_classes: int) -> None:
        # Renumbered, because groups whose maps are all constant are gone, and resampling needs 0 to G - 1.
        _, self._group_index = np.unique(group_index, return_inverse=True)
        self._weights = resample_weights(group_strata(labels, self._group_index, num_classes))

    def mean(self, values: FloatArray) -> tuple[float, Interval]:
        """Return the mean of [N] values with its interval."""
        num_groups = self._weights.shape[1]
        sums = self._weights @ np.bincount(self._group_index, weights=values, minlength=num_groups)
        counts = self._weights @ np.bincount(self._group_index, minlength=num_groups)
        samples = np.asarray(sums / counts, dtype=np.float64)
        estimate = float(values.mean())
        # Without variation the percentiles would differ from the estimate by rounding only.
        low, high = percentile_interval(samples) if np.ptp(samples) > 0 else (estimate, estimate)
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
    informative: IntArray,
    labels: IntArray,
    group_index: IntArray,
    num_classes: int,
) -> MaskEnergy | None:
    # An empty mask covers nothing, so that no map could have energy in it.
    known = [(index, mask) for index in informative.tolist() if (mask := masks[index]) is not None and mask.any()]
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
