"""One decoder for every room: what is trained on, served, shown and labelled is the same image."""

import base64
import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from images.cache import PixelCache
from images.decode import decode_frame, decode_image
from images.intake import Intake
from labeling.settings import LabelingSettings
from labeling.tasks import data_uri
from records.arrays import UInt8Array
from records.frames import Crop, Frame
from records.images import strip_metadata
from records.settings import RecordsSettings
from records.store import open_store
from serving.bulk import _read
from serving.images import take_in
from serving.page.heat_map import draw_layers
from serving.schemas import Explanation
from tests.hostile_images import PLAIN
from trainers.evaluation.folder import read_frame

SIDE_PX = 48


def _shown(uri: str) -> UInt8Array:
    with PillowImage.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.mark.parametrize("crop", Crop)
@pytest.mark.parametrize("name", PLAIN)
def test_every_room_sees_the_same_pixels(name: str, crop: Crop, tmp_path: Path) -> None:
    frame = Frame(SIDE_PX, crop)
    data = PLAIN[name]()
    path = tmp_path / "image.png"
    path.write_bytes(data)
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    wanted = decode_frame(data, frame)
    served = take_in(store, data, 10_000).data
    (taken,) = Intake(store, (frame,), in_place=False, known_hashes={}).run([path])
    bulk = _read(path, frame, frame, 10_000)
    exact = {
        "served and explained": decode_frame(served, frame),
        "imported": PixelCache(store.home.cache, frame).pixels(taken.image_id),
        "evaluated in a folder": read_frame(path, frame),
        "predicted in bulk": getattr(bulk, "pixels", None),
    }
    for room, pixels in exact.items():
        assert np.array_equal(pixels, wanted), room
    store.close()
    # These two are sent as JPEG.
    task = _shown(data_uri(served, LabelingSettings(jpeg_quality=100)))
    assert task.shape == decode_image(data).shape
    assert np.abs(task.astype(int) - decode_image(data)).mean() < 4
    map_of_one = Explanation(
        method="gradcam",
        exact=True,
        layer="x",
        target="mel",
        shape=(2, 2),
        values=[[0, 1], [1, 0]],
        png_base64="",
        crop=crop,
    )
    page = _shown(draw_layers(served, map_of_one, SIDE_PX).image)
    assert np.abs(page.astype(int) - decode_frame(data, frame.shown(SIDE_PX))).mean() < 7


def test_what_is_hidden_stays_hidden_and_deep_images_are_not_white() -> None:
    left, right = decode_image(PLAIN["RGBA"]())[:, 8:40], decode_image(PLAIN["RGBA"]())[:, 56:]
    assert right.mean() > left.mean() + 60, "the see-through half is blended with white"
    deep = decode_image(PLAIN["16 bits"]())
    assert deep[40].mean(axis=1)[[5, 50, 90]].round(-1).tolist() == [10, 130, 240]
    turned = decode_image(PLAIN["turned by EXIF"]())
    assert turned.shape == (96, 64, 3)


# If one of these changes, raise DECODE_VERSION. Lossless files only: another JPEG library may round otherwise.
GOLDEN = {
    "png": 0x6FC6E111,
    "webp": 0x6FC6E111,
    "16 bits": 0x4FA75BA0,
    "LA": 0x48B8F8E7,
    "RGBA": 0xF3F36972,
    "RGBA in WebP": 0xF3F36972,
    "palette with a transparent colour": 0xF5800ABD,
    "turned PNG": 0x5100B172,
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_pixels_are_those_of_this_version(name: str) -> None:
    data = PLAIN[name]()
    pixels = np.concatenate([decode_image(data).ravel(), decode_frame(data, Frame(24)).ravel()])
    assert zlib.crc32(pixels.tobytes()) == GOLDEN[name]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_that_only_xmp_names_is_kept_when_metadata_is_removed(orientation: int) -> None:
    image = PillowImage.fromarray(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3))
    out = io.BytesIO()
    xmp = f'<x:xmpmeta tiff:Orientation="{orientation}"/>'.encode()
    image.save(out, "WEBP", lossless=True, xmp=xmp)
    data = out.getvalue()
    assert decode_image(data).shape[:2] == ((16, 24) if orientation < 5 else (24, 16))
    assert np.array_equal(decode_image(strip_metadata(data)), decode_image(data))
