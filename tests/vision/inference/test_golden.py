"""Golden images: the same for ever, generated, and in a network's usual range."""

import numpy as np

from records.bundles import Geometry
from records.ids import sha256_hex
from vision.inference.golden import NUM_IMAGES, golden_images

GEOMETRY = Geometry(side_px=48, mean=(0.7, 0.55, 0.5), std=(0.15, 0.15, 0.2))


def test_equal_geometries_give_equal_images() -> None:
    images = golden_images(GEOMETRY)
    assert images.shape == (NUM_IMAGES, 48, 48, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images, golden_images(GEOMETRY))
    assert not np.array_equal(images, golden_images(GEOMETRY.model_copy(update={"mean": (0.6, 0.55, 0.5)})))


def test_they_differ_from_each_other_and_look_like_the_training_images() -> None:
    images = golden_images(GEOMETRY)
    assert len({sha256_hex(image.tobytes()) for image in images}) == NUM_IMAGES
    standardised = (images / 255.0 - np.array(GEOMETRY.mean)) / np.array(GEOMETRY.std)
    assert np.abs(standardised.mean()) < 1.0
    assert 0.3 < standardised.std() < 2.0
