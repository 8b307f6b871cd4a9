"""The drawn map: a PNG of the picture's size that changes the picture only where the map is strong."""

import io

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from records.errors import ContractError
from vision.explanations.overlay import COLOUR_MAP, overlay_png, resized_strength


def opened(png):
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, size=(45, 60, 3), dtype=np.uint8)


def test_it_opens_and_has_the_pictures_size(picture):
    png = overlay_png(picture, np.random.default_rng(1).random((8, 8)).astype(np.float32))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert opened(png).shape == picture.shape


def test_an_empty_map_leaves_the_picture_as_it_is(picture):
    assert (opened(overlay_png(picture, np.zeros((7, 7)))) == picture).all()
    assert (opened(overlay_png(picture, np.ones((7, 7)), alpha=0.0)) == picture).all()


def test_strength_shows_where_the_map_is_strong(picture):
    heat_map = np.zeros((3, 4))
    heat_map[0, 0] = 5.0
    changed = np.abs(opened(overlay_png(picture, heat_map, alpha=1.0)).astype(int) - picture).sum(axis=2)
    assert changed[:10, :10].mean() > 50
    assert (changed[-10:, -10:] == 0).all()


def test_the_blend_is_right_within_two_grey_levels(picture):
    heat_map = np.random.default_rng(3).random((6, 8))
    strength = resized_strength(heat_map, *picture.shape[:2])[..., None]
    colours = np.rint(colormaps[COLOUR_MAP](np.rint(strength[..., 0] * 255).astype(int))[..., :3] * 255)
    exact = picture * (1.0 - 0.6 * strength) + colours * 0.6 * strength
    assert np.abs(opened(overlay_png(picture, heat_map)) - exact).max() < 2.0


def test_the_scale_of_a_map_does_not_matter_for_the_drawing(picture):
    heat_map = np.random.default_rng(2).random((4, 4))
    assert overlay_png(picture, heat_map) == overlay_png(picture, heat_map * 2.0**-20)


def test_resizing_is_smooth_and_bounded():
    strength = resized_strength(np.array([[0.0, 1.0], [0.0, -3.0]]), 40, 40)
    assert strength.min() == 0.0
    assert strength.max() <= 1.0
    assert np.abs(np.diff(strength, axis=1)).max() < 0.1


@pytest.mark.parametrize("bad", [np.full((2, 2), np.nan), np.array([[np.inf, 0.0]]), np.zeros((2, 2, 2))])
def test_a_map_that_cannot_be_drawn_is_refused(picture, bad):
    with pytest.raises(ContractError, match="finite"):
        overlay_png(picture, bad)


def test_a_picture_that_is_none_is_refused():
    with pytest.raises(ContractError, match="uint8"):
        overlay_png(np.zeros((4, 4), dtype=np.uint8), np.zeros((2, 2)))
    with pytest.raises(ContractError, match="alpha"):
        overlay_png(np.zeros((4, 4, 3), dtype=np.uint8), np.zeros((2, 2)), alpha=1.5)
