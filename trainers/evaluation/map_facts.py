"""What a bundle says about its own heat maps, measured on a few images of the split that fitting may read.

It is cheap, and equal for equal runs: the report (`relook evaluate --report --explanations`) measures the same
on more images, with intervals and lesion masks.
"""

import numpy as np
import torch
from torch import nn

from records.arrays import FloatArray, UInt8Array
from records.bundles import Architecture, Calibration, Geometry
from trainers.evaluation.faithfulness import area_under, is_telling, replace_pixels
from trainers.evaluation.sanity import random_network, similarity, target_maps
from vision.calibration.scaling import apply_calibration
from vision.inference.loaded import reference_logits
from vision.preprocess import scale_pixels, to_tensor

NUM_IMAGES = 16
NUM_STEPS = 8
DIGITS = 4


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
        calibration: of its answers.
        pixels: [N, S, S, 3], N >= 1; the first 16 are used.
    Returns:
        `images` and `constant_maps` (left out), areas of deletion and insertion beside those of the same maps with
        shuffled cells, and the similarity to a random network's maps; null where nothing could be measured.
    """
    pixels = np.ascontiguousarray(pixels[:NUM_IMAGES])
    num_classes = len(calibration.bias)

    def answer(some: UInt8Array) -> FloatArray:
        return apply_calibration(reference_logits(network, some, geometry), calibration)

    inputs = scale_pixels(to_tensor(pixels), geometry)
    target = answer(pixels).argmax(axis=1)
    maps = target_maps(network, inputs, torch.from_numpy(target))
    random = random_network(architecture, num_classes)
    likeness = similarity(maps, target_maps(random, inputs, torch.from_numpy(target)))
    telling = np.flatnonzero(is_telling(maps))
    facts: dict[str, float | int | None] = {"images": len(telling), "constant_maps": len(maps) - len(telling)}
    names = ("deletion", "deletion_shuffled", "insertion", "insertion_shuffled")
    if len(telling):
        curves = replace_pixels(answer, pixels[telling], maps[telling], target[telling], num_steps=NUM_STEPS)
        facts |= {f"{name}_auc": round(float(area_under(getattr(curves, name)).mean()), DIGITS) for name in names}
    else:
        facts |= {f"{name}_auc": None for name in names}
    facts["randomisation_similarity"] = None if likeness is None else round(likeness, DIGITS)
    return facts
