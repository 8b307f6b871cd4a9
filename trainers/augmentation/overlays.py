"""Artefacts of dermatoscopic images, drawn as augmentation: the tube's dark rim, hairs, the marks of a ruler.

In: a uint8 image [S, S, 3], checked parameters, a generator. Out: a new image of the same shape. Every length
is a share of the side; thin lines are drawn four times as large and reduced, so that a hair narrower than a pixel is a
faint line and not a broken one.
"""

import random
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from records.arrays import Float32Array, FloatArray, UInt8Array
from trainers.augmentation.parameters import HairParameters, Parameters, RulerParameters, VignetteParameters

Painter = Callable[[UInt8Array, Any, np.random.Generator], UInt8Array]

_OVERSAMPLING = 4
_CURVE_POINTS = 24
_DARKEST_RIM = 30.0
_HAIR_BROWNS = np.array([[35, 25, 20], [70, 45, 30], [110, 75, 50]], dtype=np.float32)
_RULER_INKS = np.array([[25, 25, 30], [240, 240, 240]], dtype=np.float32)
_EVERY_LONGER = 5


class Painted:
    """A painter behind the interface of an albumentations transform."""

    def __init__(self, painter: Painter, parameters: Parameters, probability: float) -> None:
        self._painter = painter
        self._parameters = parameters
        self._probability = probability
        self._generator = np.random.default_rng(0)

    def set_random_state(self, generator: np.random.Generator, python_random: random.Random) -> None:
        """Take random numbers from here from now on; the second one is not used."""
        self._generator = generator

    def __call__(self, *, image: UInt8Array) -> dict[str, UInt8Array]:
        """Return the image under `image`, painted over or as it was."""
        if self._generator.random() >= self._probability:
            return {"image": image}
        return {"image": self._painter(image, self._parameters, self._generator)}


def paint_vignette(image: UInt8Array, parameters: VignetteParameters, generator: np.random.Generator) -> UInt8Array:
    """Darken what lies outside a circle near the centre.

    Args:
        image: [S, S, 3].
        parameters: radius and edge of the circle.
        generator: of the random numbers.
    Returns:
        [S, S, 3].
    """
    half_px = len(image) / 2
    centre = half_px + generator.uniform(-1, 1, 2) * parameters.shift * len(image)
    radius_px = generator.uniform(*parameters.radius) * half_px
    soft_px = generator.uniform(*parameters.softness) * half_px
    rim = generator.uniform(0, _DARKEST_RIM)
    places = np.arange(len(image)) + 0.5
    distance_px = np.hypot(places[:, None] - centre[0], places[None, :] - centre[1])
    covered = np.clip((distance_px - radius_px) / soft_px + 0.5, 0.0, 1.0).astype(np.float32)
    return _blend(image, covered, np.full(3, rim, dtype=np.float32))


def paint_hair(image: UInt8Array, parameters: HairParameters, generator: np.random.Generator) -> UInt8Array:
    """Paint bent hairs that cross the image or end in it.

    Args:
        image: [S, S, 3].
        parameters: number, width and opacity.
        generator: of the random numbers.
    Returns:
        [S, S, 3].
    """
    side_px = len(image)
    covered = np.zeros((side_px, side_px), dtype=np.float32)
    for _ in range(int(generator.integers(*parameters.count, endpoint=True))):
        curve = _bent_line(generator)
        width = generator.uniform(*parameters.width)
        # Maximum and not sum: where two hairs cross, the skin is hidden once.
        mask = _stroke(side_px, [curve], width) * np.float32(generator.uniform(*parameters.opacity))
        np.maximum(covered, mask, out=covered)
    return _blend(image, covered, _HAIR_BROWNS[generator.integers(len(_HAIR_BROWNS))])


def paint_ruler(image: UInt8Array, parameters: RulerParameters, generator: np.random.Generator) -> UInt8Array:
    """Paint the marks of a ruler along one edge, a little askew.

    Args:
        image: [S, S, 3].
        parameters: spacing, length and opacity of the marks.
        generator: of the random numbers.
    Returns:
        [S, S, 3].
    """
    spacing, length = generator.uniform(*parameters.spacing), generator.uniform(*parameters.length)
    opacity = np.float32(generator.uniform(*parameters.opacity))
    offset, tilt = generator.uniform(0, 0.1), generator.uniform(-0.1, 0.1)
    first = int(generator.integers(_EVERY_LONGER))
    marks = []
    for number, along in enumerate(np.arange(-0.1, 1.1, spacing)):
        reach = length * (1.8 if (number + first) % _EVERY_LONGER == 0 else 1.0)
        start = offset + tilt * (along - 0.5)
        marks.append(np.array([[along, start], [along - tilt * reach, start + reach]]))
    covered = _stroke(len(image), marks, 0.15 * spacing) * opacity
    # Painted along the top edge and rotated, so that one code path serves all four edges.
    covered = np.ascontiguousarray(np.rot90(covered, int(generator.integers(4))))
    return _blend(image, covered, _RULER_INKS[generator.integers(len(_RULER_INKS))])


def _bent_line(generator: np.random.Generator) -> FloatArray:
    """Return [24, 2] points of a quadratic Bezier curve; coordinates are shares of the side, some outside 0 to 1."""
    middle = generator.uniform(0.05, 0.95, 2)
    angle, length = generator.uniform(0, np.pi), generator.uniform(0.4, 1.2)
    reach = length / 2 * np.array([np.cos(angle), np.sin(angle)])
    start, end = middle - reach, middle + reach
    bend = middle + generator.normal(0, 0.12 * length, 2)
    t = np.linspace(0.0, 1.0, _CURVE_POINTS)[:, None]
    return np.asarray((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end)


def _stroke(side_px: int, lines: list[FloatArray], width: float) -> Float32Array:
    """Return [S, S] how much of each pixel lines of a width cover; coordinates and width are shares of the side."""
    large_px = side_px * _OVERSAMPLING
    canvas = np.zeros((large_px, large_px), dtype=np.uint8)
    points = [np.round(line * large_px).astype(np.int32).reshape(-1, 1, 2) for line in lines]
    cv2.polylines(canvas, points, isClosed=False, color=255, thickness=max(1, round(width * large_px)))
    # INTER_AREA averages the oversampled pixels: an anti-aliased line whose opacity is its coverage.
    reduced = cv2.resize(canvas, (side_px, side_px), interpolation=cv2.INTER_AREA)
    return reduced.astype(np.float32) / np.float32(255.0)


def _blend(image: UInt8Array, covered: Float32Array, colour: Float32Array) -> UInt8Array:
    mixed = image + covered[:, :, None] * (colour - image)
    return np.rint(mixed).clip(0, 255).astype(np.uint8)
