"""Images that are none of skin lesions: generated ones of eight kinds, and pieces of two images."""

import cv2
import numpy as np
from sklearn.datasets import load_sample_images

from records.arrays import UInt8Array


def foreign_images(side_px: int, count: int, seed: int = 0) -> tuple[UInt8Array, list[str]]:
    """Return [count, S, S, 3] images and the kind of each, all kinds equally often."""
    random = np.random.default_rng(seed)
    kinds = [list(KINDS)[row % len(KINDS)] for row in range(count)]
    return np.stack([KINDS[kind](random, side_px) for kind in kinds]), kinds


def _text(random: np.random.Generator, side: int) -> UInt8Array:
    page = np.full((side, side, 3), 255, np.uint8)
    for line in range(5):
        words = "".join(chr(97 + letter) for letter in random.integers(0, 26, 14))
        cv2.putText(page, words, (2, int((line + 1) * side / 6)), cv2.FONT_HERSHEY_SIMPLEX, side / 300, (0, 0, 0), 1)
    return page


def _noise(random: np.random.Generator, side: int) -> UInt8Array:
    return random.integers(0, 256, (side, side, 3)).astype(np.uint8)


def _blobs(random: np.random.Generator, side: int) -> UInt8Array:
    return cv2.resize(_noise(random, 8), (side, side), interpolation=cv2.INTER_CUBIC)


def _plain_skin(random: np.random.Generator, side: int) -> UInt8Array:
    tone = random.uniform([150, 100, 80], [240, 200, 180])
    return np.clip(tone + random.normal(0, 4, (side, side, 3)), 0, 255).astype(np.uint8)


def _shapes(random: np.random.Generator, side: int) -> UInt8Array:
    image = np.full((side, side, 3), random.integers(0, 256, 3), np.uint8)
    for _ in range(6):
        corners = random.integers(0, side, (2, 2)).tolist()
        cv2.rectangle(image, corners[0], corners[1], random.integers(0, 256, 3).tolist(), -1)
    return image


def _stripes(random: np.random.Generator, side: int) -> UInt8Array:
    y, x = np.mgrid[0:side, 0:side] / side
    angle = random.uniform(0, 2 * np.pi)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * random.uniform(10, 60)) * 0.5 + 0.5
    return (wave[..., None] * random.integers(100, 256, 3)).astype(np.uint8)


def _face(random: np.random.Generator, side: int) -> UInt8Array:
    image = np.full((side, side, 3), random.integers(120, 220, 3), np.uint8)
    middle, skin = side // 2, random.uniform([180, 120, 90], [240, 200, 170]).tolist()
    cv2.ellipse(image, (middle, middle), (side // 3, side // 2 - 5), 0, 0, 360, skin, -1)
    for eye in (-side // 8, side // 8):
        cv2.circle(image, (middle + eye, middle - side // 8), side // 20, (30, 30, 30), -1)
    cv2.ellipse(image, (middle, middle + side // 5), (side // 8, side // 16), 0, 0, 180, (150, 50, 50), -1)
    return image


def _landscape(random: np.random.Generator, side: int) -> UInt8Array:
    light = 1.0 - np.mgrid[0:side, 0:side][0] / side
    image = np.stack([200 * light + 40, 180 * light + 60, 255 * light], axis=-1)
    image[int(side * 0.6) :] = random.integers([20, 80, 20], [80, 160, 60], 3)
    return np.clip(image + random.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def _piece(image: int, random: np.random.Generator, side: int) -> UInt8Array:
    whole = load_sample_images().images[image]
    size = int(random.integers(120, 400))
    top, left = (int(random.integers(0, length - size)) for length in whole.shape[:2])
    return cv2.resize(whole[top : top + size, left : left + size], (side, side), interpolation=cv2.INTER_AREA)


KINDS = {
    "text": _text,
    "noise": _noise,
    "blobs": _blobs,
    "plain skin": _plain_skin,
    "shapes": _shapes,
    "stripes": _stripes,
    "face": _face,
    "landscape": _landscape,
    "temple": lambda random, side: _piece(0, random, side),
    "flower": lambda random, side: _piece(1, random, side),
}
