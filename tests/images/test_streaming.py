"""Streaming through a real Ray Data: the pixels of the cache, in the asked order, and nothing kept on disk."""

from typing import TYPE_CHECKING

import numpy as np
import pytest

from images.cache import PixelCache
from images.decode import decode_frame
from records.datasets import build_version
from records.errors import ContractError, UnknownIdError
from records.frames import Crop, Frame
from records.store import Store, find_images, read_image
from trainers.fitting.training_data import plan_data

if TYPE_CHECKING:
    from cluster.session import RaySession

# Ray warns about its own defaults while it imports itself.
pytestmark = [pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"), pytest.mark.slow]

SIDE_PX = 19
"""No other test caches this split."""


@pytest.fixture(scope="module")
def image_ids(filled_store: Store) -> list[str]:
    return plan_data(build_version(filled_store).version, filled_store.taxonomy).image_ids


@pytest.mark.parametrize("crop", Crop)
def test_images_come_in_the_asked_order_and_are_not_kept(
    ray_session: "RaySession", filled_store: Store, image_ids: list[str], monkeypatch: pytest.MonkeyPatch, crop: Crop
) -> None:
    from images import streaming

    frame = Frame(SIDE_PX, crop)
    monkeypatch.setattr(streaming, "IMAGES_PER_TASK", 5)
    pixels = streaming.stream_pixels(filled_store, image_ids, np.array([4, 2]), frame)
    parts = [np.array([3, 3, 0]), np.array([9]), np.array([8, 7, 6, 5, 1, 12, 11])]
    batches = list(pixels.batches(parts))
    assert [len(batch) for batch in batches] == [3, 1, 7]
    wanted = find_images(filled_store, [image_ids[position] for part in parts for position in part])
    expected = np.stack([decode_frame(read_image(filled_store, image), frame) for image in wanted])
    assert np.array_equal(np.concatenate(batches), expected)
    assert all(batch.flags.writeable for batch in batches)

    cached = PixelCache(filled_store.home.cache, frame)
    assert len(pixels) == len(image_ids)
    assert len(cached) == 2
    assert np.array_equal(pixels.take([2, 4]), cached.rows([image_ids[2], image_ids[4]]).take([0, 1]))
    with pytest.raises(ContractError, match="cannot be taken at random"):
        pixels.take([4, 5])


def test_an_image_that_is_gone_ends_the_stream_with_its_name(
    ray_session: "RaySession", filled_store: Store, image_ids: list[str]
) -> None:
    from images.streaming import stream_pixels

    absent = "f" * 64
    pixels = stream_pixels(filled_store, [*image_ids, absent], np.array([0]), Frame(SIDE_PX))
    with pytest.raises(UnknownIdError, match="no image has the id ffffffffffff"):
        list(pixels.batches([np.array([1, len(image_ids)])]))
