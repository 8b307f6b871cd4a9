"""Decoding: orientation, colour profiles, modes, centre crop, damage, and one result for all ways to ask."""

import io

import numpy as np
import pytest
from PIL import Image as PillowImage
from PIL import ImageCms

from images.decode import DECODE_VERSION, decode_frame, decode_frames, decode_image
from records.arrays import UInt8Array
from records.errors import ContractError, ImageError
from records.frames import Crop, Frame
from records.images import strip_metadata

# What the first row and the first column of the stored image are when it is seen upright.
EXIF_ORIENTATIONS = {
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip


def encode(image: UInt8Array, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    PillowImage.fromarray(image).save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def quadrants(height: int = 32, width: int = 32) -> UInt8Array:
    """Upright image: red, green above blue, white."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[: height // 2, : width // 2] = (255, 0, 0)
    image[: height // 2, width // 2 :] = (0, 255, 0)
    image[height // 2 :, : width // 2] = (0, 0, 255)
    image[height // 2 :, width // 2 :] = (255, 255, 255)
    return image


def stored_as(upright: UInt8Array, orientation: int) -> UInt8Array:
    """Lay an upright image down as a camera with this orientation stores it, straight from the EXIF table."""
    first_row, first_column = EXIF_ORIENTATIONS[orientation]
    if first_row in ("left", "right"):
        upright = upright.transpose(1, 0, 2)
    if first_row in ("bottom", "right"):
        upright = upright[::-1]
    if first_column in ("bottom", "right"):
        upright = upright[:, ::-1]
    return np.ascontiguousarray(upright)


def exif(orientation: int) -> PillowImage.Exif:
    block = PillowImage.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_all_orientations_are_upright(orientation: int, kind: str) -> None:
    upright = quadrants(48, 32)
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[kind]
    data = encode(stored_as(upright, orientation), kind, exif=exif(orientation), **options)
    square = decode_frame(data, Frame(24)).astype(int)
    assert np.abs(square - decode_frame(encode(upright), Frame(24))).max() <= 6
    assert np.abs(decode_image(data).astype(int) - upright).max() <= 6
    # What is stored is stripped first; it must still be upright.
    assert np.array_equal(decode_frame(strip_metadata(data), Frame(24)), square)


def test_centre_crop_keeps_the_middle_of_the_shorter_side() -> None:
    image = np.zeros((20, 60, 3), dtype=np.uint8)
    image[:, 20:40] = 200
    assert (decode_frame(encode(image), Frame(10))[:, 2:-2] == 200).all()
    assert (decode_frame(encode(np.ascontiguousarray(image.transpose(1, 0, 2))), Frame(10))[2:-2] == 200).all()


def test_a_flat_image_stays_flat_at_any_size() -> None:
    for size in ((1, 1), (3, 200), (200, 3), (64, 64), (65, 63), (600, 450)):
        square = decode_frame(encode(np.full((size[1], size[0], 3), 77, dtype=np.uint8), "JPEG", quality=95), Frame(64))
        assert square.shape == (64, 64, 3)
        assert np.abs(square.astype(int) - 77).max() <= 1


def test_modes_become_rgb() -> None:
    grey = PillowImage.new("L", (8, 8), 100)
    half_red = PillowImage.new("RGBA", (8, 8), (255, 0, 0, 128))
    palette = PillowImage.new("RGB", (8, 8), (10, 200, 30)).quantize(4)
    deep = PillowImage.fromarray(np.full((8, 8), 0x64FF, dtype=np.uint16))
    black_white = PillowImage.new("1", (8, 8), 1)
    expected: list[tuple[PillowImage.Image, tuple[int, int, int]]] = [
        (grey, (100, 100, 100)),
        (grey.convert("LA"), (100, 100, 100)),
        (half_red, (255, 127, 127)),
        (palette, (10, 200, 30)),
        (deep, (100, 100, 100)),
        (black_white, (255, 255, 255)),
    ]
    for image, colour in expected:
        out = io.BytesIO()
        image.save(out, "PNG")
        assert np.abs(decode_frame(out.getvalue(), Frame(4)).astype(int) - colour).max() <= 1, image.mode


def test_cmyk_jpeg_becomes_rgb() -> None:
    out = io.BytesIO()
    PillowImage.new("CMYK", (16, 16), (0, 255, 255, 0)).save(out, "JPEG", quality=95)
    red, green, blue = decode_frame(out.getvalue(), Frame(4))[2, 2].tolist()
    assert red > 240
    assert max(green, blue) < 15


def test_colour_profile_is_applied() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The same profile with the primaries of red and blue exchanged: its red is what sRGB calls blue.
    swapped = srgb.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    red = np.zeros((16, 16, 3), dtype=np.uint8)
    red[..., 0] = 255
    assert np.abs(decode_frame(encode(red, icc_profile=srgb), Frame(4)).astype(int) - (255, 0, 0)).max() <= 1
    assert np.abs(decode_frame(encode(red, icc_profile=swapped), Frame(4)).astype(int) - (0, 0, 255)).max() <= 3
    assert np.abs(decode_image(encode(red, icc_profile=swapped)).astype(int) - (0, 0, 255)).max() <= 3


def test_a_damaged_profile_changes_nothing() -> None:
    image = quadrants()
    assert np.array_equal(
        decode_frame(encode(image, icc_profile=b"rubbish" * 40), Frame(8)), decode_frame(encode(image), Frame(8))
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_turns_nothing() -> None:
    data = encode(quadrants(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(decode_frame(data, Frame(8)), decode_frame(encode(quadrants(), "JPEG"), Frame(8)))


def test_the_whole_image_is_squeezed_and_shown_in_its_proportions() -> None:
    image = quadrants(150, 200)
    image[:, :20] = 0
    image[:, -20:] = 0
    data, whole = encode(image), Frame(60, Crop.WHOLE)
    seen, shown = decode_frame(data, whole), decode_frame(data, whole.shown(100))
    assert (seen.shape, shown.shape) == ((60, 60, 3), (75, 100, 3))
    # The outer tenths, which the centre square does not hold.
    assert max(seen[:, :5].max(), seen[:, -5:].max(), shown[:, :9].max(), shown[:, -9:].max()) == 0
    assert decode_frame(data, Frame(60))[10, 1].tolist() == [255, 0, 0]
    wanted = PillowImage.fromarray(image).resize((60, 60), PillowImage.Resampling.BICUBIC)
    assert np.array_equal(seen, np.asarray(wanted))
    square = encode(quadrants())
    assert np.array_equal(decode_frame(square, Frame(24, Crop.WHOLE)), decode_frame(square, Frame(24)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_whole_image_is_upright(orientation: int) -> None:
    upright = quadrants(48, 32)
    data = encode(stored_as(upright, orientation), "PNG", exif=exif(orientation))
    for frame in (Frame(24, Crop.WHOLE), Frame(24, Crop.WHOLE).shown(30)):
        seen = decode_frame(data, frame).astype(int)
        assert np.abs(seen - decode_frame(encode(upright), frame)).max() <= 6


@pytest.mark.parametrize("size", [(200, 150), (600, 450), (1000, 900), (203, 151), (64, 64)])
def test_several_sides_equal_single_ones(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    small = PillowImage.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    data = encode(np.asarray(small.resize(size, PillowImage.Resampling.BICUBIC)), "JPEG", quality=90)
    frames = [Frame(side_px, crop) for crop in Crop for side_px in (64, 112, 224)]
    frames.append(Frame(64, Crop.WHOLE).shown(100))
    several = decode_frames(data, frames)
    assert list(several) == frames
    for frame, pixels in several.items():
        assert pixels.shape == (*reversed(frame.size(*size)), 3)
        assert np.array_equal(pixels, decode_frame(data, frame))


def test_reduced_decoding_is_close_to_whole_decoding() -> None:
    rng = np.random.default_rng(1)
    small = PillowImage.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    image = np.asarray(small.resize((801, 603), PillowImage.Resampling.BICUBIC))
    reduced = decode_frame(encode(image, "JPEG", quality=98, subsampling=0), Frame(64)).astype(int)
    assert np.abs(reduced - decode_frame(encode(image), Frame(64))).mean() < 1.5


def test_a_whole_image_is_reduced_to_its_longer_side() -> None:
    assert decode_image(encode(quadrants(90, 120), "JPEG"), max_side_px=40).shape == (30, 40, 3)
    assert decode_image(encode(quadrants(30, 40)), max_side_px=400).shape == (30, 40, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_cut_off_images_are_refused(kind: str) -> None:
    rng = np.random.default_rng(2)
    data = encode(rng.integers(0, 255, (150, 200, 3), dtype=np.uint8), kind)
    for keep in (0.9, 0.5, 0.1):
        for decode in (lambda cut: decode_frame(cut, Frame(64)), decode_image):
            with pytest.raises(ImageError, match=r"is damaged.*cut off|damaged or cut off") as caught:
                decode(data[: int(len(data) * keep)])
            assert caught.value.code == "damaged"


@pytest.mark.parametrize(
    ("data", "code"), [(b"", "empty"), (b"GIF89a...", "not_an_image"), (b"\xff\xd8\xff", "damaged")]
)
def test_what_is_no_image_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_frame(data, Frame(64))
    assert caught.value.code == code


def test_too_many_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError) as caught:
        decode_frame(encode(quadrants()), Frame(8))
    assert caught.value.code == "too_many_pixels"


def test_sides_must_be_positive() -> None:
    with pytest.raises(ContractError, match="at least 1 px"):
        decode_frame(encode(quadrants()), Frame(0))
    with pytest.raises(ContractError, match="at least 1 px"):
        decode_frames(encode(quadrants()), ())


def test_the_version_is_that_of_these_pixels() -> None:
    """If one of these numbers changes, raise DECODE_VERSION: caches and bundles depend on it."""
    x = np.linspace(0, 255, 160)
    image = np.stack(np.broadcast_arrays(x[None, :], x[:120, None], np.float64(90)), axis=2).astype(np.uint8)
    square = decode_frame(encode(image), Frame(4))
    assert DECODE_VERSION == 1
    assert square[:, :, 0].tolist() == [[52, 103, 151, 202]] * 4
    assert square[:, :, 1].T.tolist() == [[24, 70, 120, 166]] * 4
