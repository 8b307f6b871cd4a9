"""A heat map drawn over its image, as PNG bytes; and as the few numbers from which it is drawn later.

Colour and opacity both show strength: where the map is zero the image is unchanged, so the lesion stays visible. The
map is scaled by its own maximum for display only.
"""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from records.arrays import Float32Array, UInt8Array
from records.errors import ContractError

COLOUR_MAP = "viridis"
"""Perceptually uniform, readable in all common colour vision, and unlike any skin tone."""

_PNG_OPTIONS = (
    cv2.IMWRITE_PNG_COMPRESSION, 1,
    cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY,
    cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_SUB,
)  # fmt: skip


def overlay_png(image: UInt8Array, heat_map: NDArray[np.floating], alpha: float = 0.6) -> bytes:
    """Draw a map over an image as `overlay` does, and return PNG bytes."""
    return image_png(overlay(image, heat_map, alpha))


def image_png(image: UInt8Array) -> bytes:
    """Return an image [H, W, 3] as PNG bytes."""
    # Twice as fast as Pillow's writer, which tries every filter on every row; photographs have no runs to find.
    _, png = cv2.imencode(".png", image[..., ::-1], _PNG_OPTIONS)
    return png.tobytes()


def levels_of(heat_map: NDArray[np.floating]) -> list[list[int]]:
    """Return a map as numbers from 0 to 255 of its maximum, by rows: what a review item keeps until it is shown.

    Args:
        heat_map: [h, w], finite; negative values count as zero.
    Returns:
        [h][w]; `overlay` draws it as the map itself, but for rounding.
    Raises:
        ContractError: not two-dimensional, or not finite.
    """
    rows: list[list[int]] = _levels(_strength(heat_map)).tolist()
    return rows


def overlay(image: UInt8Array, heat_map: NDArray[np.floating], alpha: float = 0.6) -> UInt8Array:
    """Draw a map over an image.

    Args:
        image: [H, W, 3].
        heat_map: [h, w], finite; negative values count as zero. Resized smoothly to the image.
        alpha: opacity where the map is largest, 0 to 1.
    Returns:
        RGB, [H, W, 3].
    Raises:
        ContractError: wrong shape, alpha outside 0 to 1, or a map that is not finite.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ContractError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if not 0.0 <= alpha <= 1.0:
        raise ContractError(f"alpha must be 0 to 1, got {alpha}")
    height_px, width_px, _ = image.shape
    strength = resized_strength(heat_map, height_px, width_px)
    colours = Image.fromarray(_levels(strength))
    colours.putpalette(_palette())
    opacity = Image.fromarray(_levels(alpha * strength))
    return np.asarray(Image.composite(colours.convert("RGB"), Image.fromarray(image), opacity))


def resized_strength(heat_map: NDArray[np.floating], height_px: int, width_px: int) -> Float32Array:
    """Scale a map to 0..1 by its maximum and resize it smoothly.

    Args:
        heat_map: [h, w], finite.
        height_px: height of the result.
        width_px: width of the result.
    Returns:
        [height_px, width_px] in [0, 1]; all zero if no value is positive.
    Raises:
        ContractError: not two-dimensional, or not finite.
    """
    small = Image.fromarray(_strength(heat_map), mode="F")
    resized = small.resize((width_px, height_px), Image.Resampling.BICUBIC)
    # Bicubic interpolation overshoots at edges.
    return np.clip(np.asarray(resized), 0.0, 1.0)


def _strength(heat_map: NDArray[np.floating]) -> Float32Array:
    """Scale a map to 0..1 by its maximum."""
    if heat_map.ndim != 2 or not np.isfinite(heat_map).all():
        raise ContractError("a map to draw must be [h, w] and finite; a prediction that is not finite has no map")
    positive = np.clip(heat_map, 0.0, None).astype(np.float32)
    peak = np.float32(positive.max())
    # Without a positive value there is nothing to scale by: the overlay is the image itself.
    return positive if peak == 0.0 else positive / peak


def _levels(strength: NDArray[np.floating]) -> UInt8Array:
    """Return 0..1 as 0..255."""
    levels: UInt8Array = np.rint(strength * 255).astype(np.uint8)
    return levels


@lru_cache(maxsize=1)
def _palette() -> bytes:
    # Here, since processes that predict load this module and draw nothing.
    from matplotlib import colormaps

    colours = colormaps[COLOUR_MAP](np.arange(256))[:, :3]
    palette: bytes = np.rint(colours * 255).astype(np.uint8).tobytes()
    return palette
