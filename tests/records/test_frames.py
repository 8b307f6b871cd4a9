"""Frames: which part of an image a model sees, for portrait, landscape and square images, and back."""

import numpy as np
import pytest
from pydantic import ValidationError

from records.bundles import Geometry
from records.frames import Crop, Frame

SIZES = [(200, 150), (150, 200), (120, 120), (7, 300), (300, 7), (1, 1)]
CENTER, WHOLE = Frame(64), Frame(64, Crop.WHOLE)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_whole_image_counts_and_of_it_the_centre_square(width: int, height: int) -> None:
    assert WHOLE.box(width, height) == (0.0, 0.0, width, height)
    left, top, right, bottom = CENTER.box(width, height)
    assert right - left == bottom - top == min(width, height)
    assert (left, top) == (width - right, height - bottom), "as much is cut on one side as on the other"
    assert CENTER.size(width, height) == WHOLE.size(width, height) == (64, 64)


def test_a_square_image_is_the_same_in_both() -> None:
    assert CENTER.box(120, 120) == WHOLE.box(120, 120)
    assert WHOLE.shown(90).size(120, 120) == CENTER.shown(90).size(120, 120) == (90, 90)


@pytest.mark.parametrize("frame", [CENTER, WHOLE, CENTER.shown(100), WHOLE.shown(100)])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_place_comes_back_from_what_the_model_sees(frame: Frame, width: int, height: int) -> None:
    box, size = np.array(frame.box(width, height)), np.array(frame.size(width, height))
    origin, scale = box[:2], size / (box[2:] - box[:2])
    places = np.random.default_rng(0).uniform(box[:2], box[2:], (20, 2))
    seen = (places - origin) * scale
    assert (seen >= 0).all()
    assert (seen <= size).all()
    assert seen / scale + origin == pytest.approx(places)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_people_see_an_image_in_its_proportions(width: int, height: int) -> None:
    across, down = WHOLE.shown(100).size(width, height)
    assert max(across, down) == 100
    assert across / down == pytest.approx(width / height, rel=0.02) or min(across, down) <= 2
    assert CENTER.shown(100) == Frame(100), "which is decoded once where both are wanted"


def test_two_frames_never_share_a_name() -> None:
    assert [CENTER.name, WHOLE.name, Frame(32).name] == ["64px", "64px-whole", "32px"]


def test_bundles_of_today_load_and_another_word_is_refused() -> None:
    assert Geometry.model_validate({"side_px": 64}).frame == CENTER
    old = {"side_px": 64, "crop": "center", "scaling": "mean_std"}
    assert Geometry.model_validate(old).model_dump(mode="json")["crop"] == "center"
    assert Geometry.model_validate({"side_px": 64, "crop": "whole"}).frame == WHOLE
    with pytest.raises(ValidationError, match="'center' or 'whole'"):
        Geometry.model_validate({"side_px": 64, "crop": "padded"})
