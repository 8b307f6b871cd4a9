"""Test-time views: flips and quarter turns of an image (the group D4), whose logits are averaged.

In: images as the network takes them, [N, 3, S, S]. Out: the same image seen V ways, and maps turned back.
"""

import torch
from torch import Tensor

MAX_VIEWS = 8


def viewed(images: Tensor, number: int) -> Tensor:
    """Return a view of images or maps [..., S, S]; 0 is the image itself, 1 its mirror image, 4 to 7 are transposed."""
    turned = images.transpose(-1, -2) if number & 4 else images
    flipped = [axis for axis, bit in ((-1, 1), (-2, 2)) if number & bit]
    return turned.flip(flipped) if flipped else turned


def turned_back(maps: Tensor, number: int) -> Tensor:
    """Return maps [..., h, h] of a view as maps of the image itself."""
    flipped = [axis for axis, bit in ((-1, 1), (-2, 2)) if number & bit]
    back = maps.flip(flipped) if flipped else maps
    return back.transpose(-1, -2) if number & 4 else back


def mean_of_views(parts: list[Tensor]) -> Tensor:
    """Return the mean of one tensor per view; one view is returned as it is, to the bit."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(dim=0)
