"""The drawn map: a PNG of the image's size that changes the image only where the map is strong."""

import io
import json

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from images.overlay import COLOUR_MAP, levels_of, overlay_png, resized_strength
from records.errors import ContractError


def opened(png):
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, size=(45, 60, 3), dtype=np.uint8)


def test_it_opens_and_has_the_images_size(image):
    png = overlay_png(image, np.random.default_rng(1).random((8, 8)).astype(np.float32))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert opened(png).shape == image.shape


def test_an_empty_map_leaves_the_image_as_it_is(image):
    assert (opened(overlay_png(image, np.zeros((7, 7)))) == image).all()
    assert (opened(overlay_png(image, np.ones((7, 7)), alpha=0.0)) == image).all()


def test_strength_shows_where_the_map_is_strong(image):
    heat_map = np.zeros((3, 4))
    heat_map[0, 0] = 5.0
    changed = np.abs(opened(overlay_png(image, heat_map, alpha=1.0)).astype(int) - image).sum(axis=2)
    assert changed[:10, :10].mean() > 50
    assert (changed[-10:, -10:] == 0).all()


def test_the_blend_is_right_within_two_grey_levels(image):
    heat_map = np.random.default_rng(3).random((6, 8))
    strength = resized_strength(heat_map, *image.shape[:2])[..., None]
    colours = np.rint(colormaps[COLOUR_MAP](np.rint(strength[..., 0] * 255).astype(int))[..., :3] * 255)
    exact = image * (1.0 - 0.6 * strength) + colours * 0.6 * strength
    assert np.abs(opened(overlay_png(image, heat_map)) - exact).max() < 2.0


def test_the_scale_of_a_map_does_not_matter_for_the_drawing(image):
    heat_map = np.random.default_rng(2).random((4, 4))
    assert overlay_png(image, heat_map) == overlay_png(image, heat_map * 2.0**-20)


def test_resizing_is_smooth_and_bounded():
    strength = resized_strength(np.array([[0.0, 1.0], [0.0, -3.0]]), 40, 40)
    assert strength.min() == 0.0
    assert strength.max() <= 1.0
    assert np.abs(np.diff(strength, axis=1)).max() < 0.1


@pytest.mark.parametrize("bad", [np.full((2, 2), np.nan), np.array([[np.inf, 0.0]]), np.zeros((2, 2, 2))])
def test_a_map_that_cannot_be_drawn_is_refused(image, bad):
    with pytest.raises(ContractError, match="finite"):
        overlay_png(image, bad)


def test_an_image_that_is_none_is_refused():
    with pytest.raises(ContractError, match="uint8"):
        overlay_png(np.zeros((4, 4), dtype=np.uint8), np.zeros((2, 2)))
    with pytest.raises(ContractError, match="alpha"):
        overlay_png(np.zeros((4, 4, 3), dtype=np.uint8), np.zeros((2, 2)), alpha=1.5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (7, 7), (5, 9), (28, 28)])
def test_a_map_kept_as_levels_is_drawn_as_the_map_itself(image, shape):
    heat_map = np.random.default_rng(4).normal(0.2, 1.0, shape)
    levels = levels_of(heat_map)
    assert np.array(levels).shape == shape
    assert json.loads(json.dumps(levels)) == levels
    drawn, exact = (opened(overlay_png(image, each)).astype(int) for each in (np.array(levels), heat_map))
    assert np.abs(drawn - exact).max() <= 3


def test_levels_of_a_map_without_a_positive_value_are_zero():
    assert levels_of(-np.ones((2, 3))) == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("bad", [np.zeros(4), np.zeros((1, 2, 3)), np.array([[np.nan]]), np.array([[np.inf, 0.0]])])
def test_a_map_that_cannot_be_kept_is_refused(bad):
    with pytest.raises(ContractError, match="finite"):
        levels_of(bad)
