"""Golden inputs: generated images whose logits a bundle stores, to check that a loaded model still computes them.

They are made from a fixed seed and the bundle's own mean and deviation, never from real images, and look enough like
skin to keep activations in their usual range: half smooth blobs, half gradients with a disc, each with some noise.
"""

import numpy as np

from records.arrays import FloatArray, UInt8Array
from records.bundles import Geometry
from vision.seeding import derive_seed

NUM_IMAGES = 8
CONTRAST = 1.5


def golden_images(geometry: Geometry) -> UInt8Array:
    """Return the golden inputs of a geometry, [8, S, S, 3]; equal geometries give equal images."""
    random = np.random.default_rng(derive_seed("golden", geometry.side_px))
    fields = [
        _blobs(random, geometry.side_px) if number % 2 == 0 else _disc(random, geometry.side_px)
        for number in range(NUM_IMAGES)
    ]
    tints = random.uniform(0.5, 1.5, (NUM_IMAGES, 1, 1, 3))
    noise = random.normal(0.0, 0.1, (NUM_IMAGES, geometry.side_px, geometry.side_px, 3))
    standardised = np.stack(fields)[..., None] * tints * CONTRAST + noise
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
