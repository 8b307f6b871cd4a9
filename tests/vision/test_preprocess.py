"""Scaling of pixels, by hand."""

import numpy as np
import pytest
import torch

from records.bundles import Geometry
from records.errors import ContractError
from vision.preprocess import check_pixels, scale_pixels, to_tensor

PIXELS = np.array([[[[0, 51, 255], [102, 51, 0]], [[204, 153, 0], [0, 0, 102]]]], dtype=np.uint8)


def test_mean_std_by_hand():
    geometry = Geometry(side_px=2, mean=(0.5, 0.2, 0.0), std=(0.5, 0.1, 2.0))
    scaled = scale_pixels(to_tensor(PIXELS), geometry)
    assert scaled.shape == (1, 3, 2, 2)
    assert scaled.is_contiguous(memory_format=torch.channels_last)
    assert scaled[0, 0].flatten().tolist() == pytest.approx([-1.0, -0.2, 0.6, -1.0], abs=1e-6)
    assert scaled[0, 1].flatten().tolist() == pytest.approx([0.0, 0.0, 4.0, -2.0], abs=1e-6)
    assert scaled[0, 2].flatten().tolist() == pytest.approx([0.5, 0.0, 0.0, 0.2], abs=1e-6)


def test_min_max_uses_each_images_own_range():
    two = np.concatenate([PIXELS, PIXELS // 2 + 10])
    scaled = scale_pixels(to_tensor(two), Geometry(side_px=2, scaling="min_max"))
    assert scaled.amin(dim=(1, 2, 3)).tolist() == [0.0, 0.0]
    assert scaled.amax(dim=(1, 2, 3)).tolist() == [1.0, 1.0]
    assert scaled[0, 0, 1, 0].item() == pytest.approx(204 / 255)


def test_min_max_of_one_colour_is_zero_and_finite():
    scaled = scale_pixels(torch.full((1, 2, 2, 3), 77, dtype=torch.uint8), Geometry(side_px=2, scaling="min_max"))
    assert (scaled == 0).all()


def test_the_pixels_handed_in_stay_as_they_are():
    pixels = PIXELS.copy()
    scale_pixels(to_tensor(pixels), Geometry(side_px=2))
    assert (pixels == PIXELS).all()


def test_read_only_memory_is_accepted():
    pixels = PIXELS.copy()
    pixels.flags.writeable = False
    assert torch.equal(to_tensor(pixels), torch.tensor(PIXELS))


@pytest.mark.parametrize(
    "pixels", [PIXELS.astype(np.float32), PIXELS[0], PIXELS.transpose(0, 3, 1, 2)], ids=["type", "rank", "order"]
)
def test_pixels_of_another_shape_are_refused(pixels):
    with pytest.raises(ContractError, match=r"uint8 \[N, 2, 2, 3\]"):
        check_pixels(pixels, 2)
