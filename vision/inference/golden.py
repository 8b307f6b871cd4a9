"""Golden inputs: generated images whose logits a bundle stores, to check that a loaded model still computes them.

They are made from a fixed seed and the bundle's own mean and deviation, never from real images, and look enough like
skin to keep activations in their usual range: half smooth blobs, half gradients with a disc, each with some noise.

Few steps on images that are much alike leave batch norm with variances near zero. Such a network computes its own
images well, but its activations explode on images of another contrast, until rounding decides the logits. Golden
images are then given less contrast: what rounding decides cannot show whether a model computes what it should.
"""

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from records.arrays import FloatArray, UInt8Array
from records.bundles import Geometry
from vision.inference.loaded import reference_logits
from vision.preprocess import scale_pixels, to_tensor
from vision.seeding import derive_seed
from vision.views import mean_of_views, viewed

NUM_IMAGES = 8
CONTRASTS = (1.5, 0.75, 0.375, 0.1875)
MAX_ROUNDING = 1e-5
"""Largest difference of a golden logit in fp32 and fp64, as a share of the largest of them (or of 1, if larger).

A hundredth of what a model in fp32 may differ by when it is loaded. Trained networks reach a tenth of it.
"""


def golden_arrays(network: nn.Module, geometry: Geometry, views: int = 1) -> dict[str, NDArray[Any]]:
    """Return the golden inputs of a network and its logits for them, as a bundle stores them.

    Args:
        network: in evaluation mode, fp32, on the CPU.
        geometry: of the network.
        views: over which the logits are averaged.
    Returns:
        `inputs` (uint8 [8, S, S, 3]), of the highest contrast at which rounding does not matter, or of the highest
        of all if it matters at each; and `logits` (float32 [8, C]).
    """
    exact = copy.deepcopy(network).double()
    found: list[dict[str, NDArray[Any]]] = []
    for contrast in CONTRASTS:
        inputs = golden_images(geometry, contrast)
        logits = reference_logits(network, inputs, geometry, views)
        found.append({"inputs": inputs, "logits": logits})
        with torch.inference_mode():
            scaled = scale_pixels(to_tensor(inputs), geometry).double()
            expected = mean_of_views([exact(viewed(scaled, view)) for view in range(views)]).numpy()
        if np.abs(logits - expected).max() <= MAX_ROUNDING * max(1.0, np.abs(expected).max()):
            return found[-1]
    return found[0]


def golden_images(geometry: Geometry, contrast: float = CONTRASTS[0]) -> UInt8Array:
    """Return the golden inputs of a geometry, [8, S, S, 3]; equal geometries give equal images."""
    random = np.random.default_rng(derive_seed("golden", geometry.side_px))
    fields = [
        _blobs(random, geometry.side_px) if number % 2 == 0 else _disc(random, geometry.side_px)
        for number in range(NUM_IMAGES)
    ]
    tints = random.uniform(0.5, 1.5, (NUM_IMAGES, 1, 1, 3))
    noise = random.normal(0.0, 0.1, (NUM_IMAGES, geometry.side_px, geometry.side_px, 3))
    standardised = np.stack(fields)[..., None] * tints * contrast + noise
    values = np.asarray(geometry.mean) + np.asarray(geometry.std) * standardised
    return np.clip(np.rint(255.0 * values), 0, 255).astype(np.uint8)


def _blobs(random: np.random.Generator, side_px: int) -> FloatArray:
    """A few random waves, [S, S], deviation about 1."""
    # Coordinates run from 0 to 1, so that the structure does not depend on the side.
    rows, columns = _coordinates(side_px)
    field = np.zeros((side_px, side_px))
    for _ in range(4):
        angle, cycles, phase = random.uniform(0, 2 * np.pi), random.uniform(0.5, 4.0), random.uniform(0, 2 * np.pi)
        field += np.sin(2 * np.pi * cycles * (np.cos(angle) * rows + np.sin(angle) * columns) + phase)
    return np.asarray(field / np.sqrt(2.0), dtype=np.float64)


def _disc(random: np.random.Generator, side_px: int) -> FloatArray:
    """A dark disc on a gradient, [S, S], between -1.5 and 1."""
    rows, columns = _coordinates(side_px)
    angle = random.uniform(0, 2 * np.pi)
    gradient = np.cos(angle) * (rows - 0.5) + np.sin(angle) * (columns - 0.5)
    row, column, radius = random.uniform(0.35, 0.65), random.uniform(0.35, 0.65), random.uniform(0.1, 0.35)
    inside = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
    field: FloatArray = np.where(inside, gradient - 1.0, gradient + 0.3)
    return field


def _coordinates(side_px: int) -> tuple[FloatArray, FloatArray]:
    steps = (np.arange(side_px) + 0.5) / side_px
    square = np.ones((side_px, side_px))
    return square * steps[:, None], square * steps[None, :]
