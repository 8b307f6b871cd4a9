"""Decoded pixels to network input, for training, inference and explanations.

In: uint8 [N, S, S, 3]. Out: float32 [N, 3, S, S] in channels-last memory, scaled by the geometry. Decoding and
cropping are in `images.decode`.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from records.arrays import UInt8Array
from records.bundles import Geometry
from records.errors import ContractError


def check_pixels(pixels: UInt8Array, side_px: int) -> None:
    """Check that pixels have the shape and type that a network takes.

    Args:
        pixels: [N, S, S, 3].
        side_px: S.
    Raises:
        ContractError: another shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (side_px, side_px, 3):
        raise ContractError(
            f"pixels must be uint8 [N, {side_px}, {side_px}, 3], got {pixels.dtype} {list(pixels.shape)}"
        )


def to_tensor(pixels: NDArray[Any]) -> Tensor:
    """Return pixels, or other rows, as a tensor; a read-only array (a memory map) is copied, others share memory."""
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())


def scale_pixels(pixels: Tensor, geometry: Geometry) -> Tensor:
    """Scale pixels to network input.

    `mean_std`: (value / 255 - mean) / std per channel. `min_max`: each image's own range to 0..1;
    an image of one colour becomes 0.

    Args:
        pixels: uint8 [N, S, S, 3], on any device.
        geometry: which scaling, with which mean and standard deviation.
    Returns:
        float32 [N, 3, S, S], channels-last.
    """
    # The memory order of [N, S, S, 3] is channels-last of [N, 3, S, S], and the conversion to float keeps it.
    planes = pixels.permute(0, 3, 1, 2).float()
    if geometry.scaling == "min_max":
        low = planes.amin(dim=(1, 2, 3), keepdim=True)
        high = planes.amax(dim=(1, 2, 3), keepdim=True)
        return (planes - low) / (high - low).clamp(min=1.0)
    # Not made on the device, and not waited for: `torch.tensor(..., device="cuda")` waits for all that the GPU does.
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1).to(pixels.device, non_blocking=True)
        for values in (geometry.mean, geometry.std)
    )
    # In place: the conversion made a copy, and this runs for every batch of training and serving.
    return planes.mul_(1.0 / (255.0 * std)).sub_(mean / std)
