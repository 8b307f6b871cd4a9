"""Image a painted lesion: turn and shift it, add hairs, light, vignette, noise.

Each call is one image of the lesion; several images of one lesion differ as visits do.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from images.synth_paint import Lesion
from records.arrays import Float32Array, FloatArray, UInt8Array


@dataclass(frozen=True)
class Habits:
    """What stays the same in all images of a lesion.

    Args:
        hairs: mean number of hairs.
        hair_tone: grey value of the hairs, 0 to 255.
        vignette: whether the dermatoscope's rim is seen.
        cast: [3] gain of the camera's channels.
    """

    hairs: float
    hair_tone: float
    vignette: bool
    cast: tuple[float, float, float]


def draw_habits(rng: np.random.Generator) -> Habits:
    """Draw a lesion's surroundings and camera.

    Args:
        rng: the lesion's own generator.
    Returns:
        The habits; about a third of the lesions have hairs, a quarter a vignette.
    """
    hairs = float(rng.gamma(1.5, 6.0)) if rng.random() < 0.35 else 0.0
    exposure, warmth, tint = rng.normal(0, 0.03), rng.normal(0, 0.035), rng.normal(0, 0.012)
    return Habits(
        hairs=hairs,
        hair_tone=float(rng.choice([32.0, 52.0, 84.0, 170.0], p=[0.4, 0.3, 0.2, 0.1])),
        vignette=bool(rng.random() < 0.25),
        cast=(1.0 + exposure + warmth, 1.0 + exposure - abs(tint), 1.0 + exposure - warmth),
    )


def draw_view(
    lesion: Lesion, habits: Habits, width_px: int, height_px: int, rng: np.random.Generator
) -> tuple[UInt8Array, UInt8Array]:
    """Take one image of a lesion.

    Args:
        lesion: painted.
        habits: of the lesion.
        width_px: W.
        height_px: H.
        rng: the image's own generator.
    Returns:
        The image, uint8 [H, W, 3], and the lesion's mask, uint8 [H, W], 0 or 255.
    """
    matrix = _pose(lesion.rgb.shape[0], width_px, height_px, rng)
    size = (width_px, height_px)
    image = cv2.warpAffine(lesion.rgb, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    mask = cv2.warpAffine(lesion.mask, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    unit_px = height_px / 150.0
    if rng.random() < 0.2:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.5, 1.1)) * unit_px)
    planes: list[Float32Array] = [np.asarray(plane) for plane in cv2.split(image)]
    if habits.hairs:
        _draw_hairs(planes, int(rng.poisson(habits.hairs)), habits.hair_tone, unit_px, rng)
    _light(planes, habits, rng)
    grain = rng.standard_normal((height_px, width_px), dtype=np.float32) * np.float32(rng.uniform(1.2, 4.0))
    finished = cv2.merge([np.clip(plane + grain, 0, 255).astype(np.uint8) for plane in planes])
    return np.asarray(finished, dtype=np.uint8), np.where(mask > 0.5, 255, 0).astype(np.uint8)


def _pose(side_px: int, width_px: int, height_px: int, rng: np.random.Generator) -> FloatArray:
    """Return the 2 x 3 matrix from the painting to the image: any turn, some shift and zoom."""
    angle, zoom = float(rng.uniform(0, 360)), float(np.exp(rng.normal(0, 0.09)))
    middle = (side_px - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), angle, zoom)
    matrix[0, 2] += (width_px - 1) / 2 - middle + rng.normal(0, 0.04) * width_px
    matrix[1, 2] += (height_px - 1) / 2 - middle + rng.normal(0, 0.035) * height_px
    return np.asarray(matrix)


def _draw_hairs(planes: list[Float32Array], count: int, tone: float, unit_px: float, rng: np.random.Generator) -> None:
    """Draw bent hairs that mostly run the same way."""
    height_px, width_px = planes[0].shape
    drawn = np.zeros((height_px, width_px), dtype=np.uint8)
    direction = rng.uniform(0, np.pi)
    t = np.linspace(0.0, 1.0, 12)[:, None]
    for _ in range(count):
        angle = direction + rng.normal(0, 0.45)
        along = np.array([np.cos(angle), np.sin(angle)])
        start = rng.uniform(-0.1, 1.0, 2) * (width_px, height_px)
        length = rng.uniform(30, 130) * unit_px
        bow = np.array([-along[1], along[0]]) * rng.normal(0, 0.16) * length
        path = start + along * length * t + bow * 4 * t * (1 - t)
        fixed = np.round(path * 16).astype(np.int32)
        cv2.polylines(drawn, [fixed], False, int(rng.integers(70, 220)), max(1, round(0.8 * unit_px)), cv2.LINE_AA, 4)
    weight = drawn.astype(np.float32) / np.float32(255.0)
    for plane, warmth in zip(planes, (1.1, 0.92, 0.84), strict=True):
        plane += (np.float32(tone * warmth) - plane) * weight


def _light(planes: list[Float32Array], habits: Habits, rng: np.random.Generator) -> None:
    """Apply exposure, the camera's colour cast, uneven light and the rim, in place."""
    height_px, width_px = planes[0].shape
    x = np.linspace(-1, 1, width_px, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height_px, dtype=np.float32)[:, None]
    slope_x, slope_y = rng.normal(0, 0.045, 2)
    gain = np.float32(np.exp(rng.normal(0, 0.06))) * (1 + np.float32(slope_x) * x + np.float32(slope_y) * y)
    distance = np.hypot(x * np.float32(width_px / height_px), y)
    gain = gain * (1 - np.float32(0.07) * distance * distance)
    if habits.vignette:
        rim = np.float32(rng.uniform(1.15, 1.5))
        gain = gain * np.clip((rim - distance) / np.float32(0.16) + 0.5, 0.07, 1.0)
    shades = 1.0 + rng.normal(0, 0.012, 3)
    for plane, cast, shade in zip(planes, habits.cast, shades, strict=True):
        plane *= gain * np.float32(cast * shade)
