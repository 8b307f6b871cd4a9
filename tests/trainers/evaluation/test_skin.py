"""Skin tone: hand-made images with a known angle, with and without a mask."""

import numpy as np
import pytest
from PIL import Image

from records.errors import DataError
from records.frames import Frame
from trainers.evaluation.images import age_band
from trainers.evaluation.skin import SkinTones, find_mask, read_mask, tone_of, typology_angle

# sRGB of CIE L* 70, a* 10, b* 20: ITA = arctan(20 / 20) = 45 degrees.
SKIN, LESION, HAIR = (199, 163, 135), (90, 50, 40), (20, 15, 15)


def image(lesion=slice(24, 40)):
    made = np.full((64, 64, 3), SKIN, dtype=np.uint8)
    made[lesion, lesion] = LESION
    return made


def test_the_angle_of_known_skin():
    assert typology_angle(image()) == pytest.approx(45.0, abs=1.0)
    assert tone_of(45.0) == "light"


def test_hair_on_the_border_is_left_out():
    hairy = image()
    hairy[:, 2:4] = HAIR
    assert typology_angle(hairy) == pytest.approx(typology_angle(image()), abs=0.5)


def test_a_mask_finds_skin_where_the_ring_is_lesion():
    large = np.full((64, 64, 3), LESION, dtype=np.uint8)
    large[20:44, 20:44] = SKIN
    mask = np.ones((64, 64), dtype=np.bool_)
    mask[18:46, 18:46] = False
    assert typology_angle(large, mask) == pytest.approx(45.0, abs=1.0)
    assert typology_angle(large) < 0
    assert typology_angle(large, np.ones((64, 64), dtype=np.bool_)) is None


def test_tones_and_bands_have_names():
    assert [tone_of(angle) for angle in (60, 50, 30, 20, 0, -40, None)] == [
        "very light", "light", "intermediate", "tan", "brown", "dark", None,
    ]  # fmt: skip
    assert [age_band(age) for age in (None, 5.0, 20.0, 59.0, 80.0, 85.0)] == [
        None, "under 20", "20 to 39", "40 to 59", "80 and older", "80 and older",
    ]  # fmt: skip


def test_masks_are_found_by_name_and_cut_as_images_are(tmp_path):
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "ISIC_1_segmentation.png")
    found = find_mask(tmp_path, "ISIC_1")
    assert find_mask(tmp_path, "ISIC_2") is None
    square = read_mask(found, Frame(30))
    assert square[:, :15].sum() == 0
    assert square[:, 15:].all()
    (tmp_path / "ISIC_3.png").write_text("no image")
    with pytest.raises(DataError, match="cannot be read"):
        read_mask(tmp_path / "ISIC_3.png", Frame(30))
    # A mask comes from outside as images do, and has the same limits.
    Image.new("1", (12_000, 12_000)).save(tmp_path / "ISIC_4.png")
    with pytest.raises(DataError, match=r"ISIC_4.*cannot be read .* million are allowed"):
        read_mask(tmp_path / "ISIC_4.png", Frame(30))
    tones = SkinTones(["ISIC_1", None], tmp_path, Frame(len(image())))
    tones.add(np.stack([image(), image()]))
    assert len(tones.angles) == 2
