import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from records.errors import ImageError
from records.images import FORMATS, image_size, sniff, strip_metadata
from tests import hostile_images as made

SECRET = b"Erika Mustermann"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><creator>" + SECRET + b"</creator></x:xmpmeta>"
ORIENTATION, ARTIST, GPS = 0x0112, 0x013B, 0x8825


def _pixels(mode: str = "RGB") -> Image.Image:
    rows, columns = np.mgrid[0:45, 0:60]
    if mode == "I;16":
        return Image.fromarray((rows * 1200 + columns * 7).astype(np.uint16))
    colour = Image.fromarray(np.stack([rows * 5, columns * 4, rows + columns], axis=-1).astype(np.uint8))
    return colour.convert(mode)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ARTIST] = SECRET.decode()
    exif[ORIENTATION] = orientation
    exif[GPS] = {1: "N", 2: (52.0, 31.0, 0.0)}
    return exif


def _save(mode: str = "RGB", orientation: int = 6, **options: Any) -> bytes:
    kind, file = options.pop("format"), io.BytesIO()
    tags: dict[str, Any] = {"exif": _exif(orientation), "icc_profile": PROFILE}
    if kind == "PNG":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("Author", SECRET.decode())
        texts.add_text("Compressed", SECRET.decode() * 9, zip=True)
        texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
        tags["pnginfo"] = texts
    else:
        tags["xmp"] = XMP
    if kind == "JPEG":
        tags["comment"] = SECRET
    _pixels(mode).save(file, kind, **(tags | options))
    return file.getvalue()


IMAGES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: _save(format="JPEG", quality=90),
    "jpeg progressive": lambda: _save(format="JPEG", progressive=True),
    "jpeg grey": lambda: _save("L", format="JPEG"),
    "jpeg cmyk": lambda: _save("CMYK", format="JPEG", icc_profile=None),
    "jpeg restart markers": lambda: _save(format="JPEG", restart_marker_blocks=1),
    "jpeg upright": lambda: _save(orientation=1, format="JPEG"),
    "png": lambda: _save(format="PNG"),
    "png alpha": lambda: _save("RGBA", format="PNG"),
    "png palette": lambda: _save("P", format="PNG", transparency=3),
    "png 16 bit": lambda: _save("I;16", format="PNG", icc_profile=None),
    "webp lossy": lambda: _save(format="WEBP", quality=80),
    "webp lossless": lambda: _save(format="WEBP", lossless=True),
    "webp alpha": lambda: _save("RGBA", format="WEBP", quality=80),
    "webp simple": lambda: _save(format="WEBP", exif=b"", xmp=b"", icc_profile=None, lossless=True),
}


def _decoded(data: bytes) -> tuple[str, np.ndarray[Any, Any], int, bytes | None]:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, np.asarray(image), image.getexif().get(ORIENTATION, 1), image.info.get("icc_profile")


@pytest.mark.parametrize("name", IMAGES)
def test_metadata_goes_and_pixels_orientation_and_profile_stay(name: str) -> None:
    data = IMAGES[name]()
    stripped = strip_metadata(data)
    assert SECRET not in stripped
    assert zlib.compress(SECRET * 9)[2:12] not in stripped
    before, after = _decoded(data), _decoded(stripped)
    assert after[0] == before[0]
    np.testing.assert_array_equal(after[1], before[1])
    assert after[2:] == before[2:]
    with Image.open(io.BytesIO(stripped)) as image:
        assert set(image.getexif()) <= {ORIENTATION}
        assert not {"comment", "xmp", "XML:com.adobe.xmp", "Author", "Compressed"} & set(image.info)


@pytest.mark.parametrize("name", IMAGES)
def test_stripping_again_changes_nothing(name: str) -> None:
    stripped = strip_metadata(IMAGES[name]())
    assert strip_metadata(stripped) == stripped


@pytest.mark.parametrize("name", IMAGES)
def test_format_and_size_come_from_the_content(name: str) -> None:
    data = IMAGES[name]()
    assert sniff(data) == name.split()[0]
    assert image_size(data) == image_size(strip_metadata(data)) == (60, 45)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_orientation_survives(kind: str, orientation: int) -> None:
    assert _decoded(strip_metadata(_save(format=kind, orientation=orientation)))[2] == orientation


def test_what_is_hidden_behind_or_between_goes_too() -> None:
    jpeg = IMAGES["jpeg progressive"]()
    second_scan = jpeg.index(b"\xff\xda", jpeg.index(b"\xff\xda") + 2)
    comment = b"\xff\xfe" + struct.pack(">H", len(SECRET) + 2) + SECRET
    # Phones put a second JPEG with its own GPS behind the first one.
    hidden = jpeg[:second_scan] + comment + jpeg[second_scan:] + IMAGES["jpeg"]()
    assert strip_metadata(hidden) == strip_metadata(jpeg)
    png = IMAGES["png"]()
    private = struct.pack(">I", len(SECRET)) + b"prVt" + SECRET + struct.pack(">I", zlib.crc32(b"prVt" + SECRET))
    assert strip_metadata(png[:33] + private + png[33:] + SECRET) == strip_metadata(png)
    webp = IMAGES["webp lossy"]()
    unknown = b"NOTE" + struct.pack("<I", len(SECRET)) + SECRET
    inside = webp[8:] + unknown
    larger = b"RIFF" + struct.pack("<I", len(inside)) + inside
    assert strip_metadata(larger + unknown) == strip_metadata(webp)


def test_a_preview_in_the_jpeg_header_goes() -> None:
    jpeg = strip_metadata(IMAGES["jpeg upright"]())
    at = jpeg.index(b"\xff\xe0")
    header = jpeg[at + 4 : at + 16] + bytes([2, 2]) + SECRET[:12]
    with_preview = jpeg[:at] + b"\xff\xe0" + struct.pack(">H", len(header) + 2) + header + jpeg[at + 18 :]
    assert strip_metadata(with_preview) == jpeg


def test_frames_of_an_animation_keep_no_metadata() -> None:
    file = io.BytesIO()
    _pixels().save(file, "WEBP", save_all=True, append_images=[_pixels("L").convert("RGB")], duration=100, xmp=XMP)
    stripped = strip_metadata(file.getvalue())
    assert SECRET not in stripped
    with Image.open(io.BytesIO(stripped)) as image:
        assert image.n_frames == 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_make_a_broken_image(kind: str) -> None:
    for exif in (
        b"Exif\x00\x00",
        b"Exif\x00\x00II*\x00\xff\xff\xff\x7f",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x09",
    ):
        stripped = strip_metadata(_save(format=kind, exif=exif))
        assert _decoded(stripped)[2] == 1


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"just a text", "not_an_image"),
        (b"GIF89a" + bytes(50), "not_an_image"),
        (b"BMP is a word of a text as well", "not_an_image"),
        (b"\xff\xd8\xff", "damaged"),
        (b"\xff\xd8\xff\xe0\x00\x00", "damaged"),
        (b"\xff\xd8\xff\xd9", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(12), "damaged"),
        (b"RIFF\x04\x00\x00\x00WEBP", "damaged"),
        (b"RIFF\xff\xff\xff\xffWEBPVP8 ", "damaged"),
    ],
)
def test_what_is_no_image_has_a_code(data: bytes, code: str) -> None:
    for read in (image_size, strip_metadata):
        with pytest.raises(ImageError) as caught:
            read(data)
        assert caught.value.code == code
        assert "send" in str(caught.value)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_was_cut_off_is_damaged(name: str) -> None:
    data = strip_metadata(IMAGES[name]())
    for length in (len(data) - 1, len(data) - 2, len(data) // 2, 40):
        with pytest.raises(ImageError) as caught:
            strip_metadata(data[:length])
        assert caught.value.code == "damaged"


def test_a_wrong_checksum_is_refused() -> None:
    data = bytearray(strip_metadata(IMAGES["png"]()))
    data[data.index(b"IDAT") + 10] ^= 1
    with pytest.raises(ImageError, match="checksum"):
        strip_metadata(bytes(data))


def test_an_image_without_area_is_damaged() -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 0, 45, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    with pytest.raises(ImageError, match="no pixels"):
        image_size(data)


@pytest.mark.parametrize(
    "data",
    [
        IMAGES["jpeg"]().partition(b"\xff\xda")[0] + b"\xff\xd9",
        made.PNG_HEAD + made.chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)) + made.chunk(b"IEND", b""),
        made.webp(made.webp_canvas(8, 8)),
        made.webp(made.webp_canvas(8, 8, 2), made.webp_frame(0, 0, 8, 8, made.riff_chunk(b"JUNK", b""))),
    ],
    ids=["JPEG", "PNG", "WebP", "frame of a WebP"],
)
def test_a_whole_file_without_pixels_is_damaged(data: bytes) -> None:
    with pytest.raises(ImageError, match="holds no pixels") as caught:
        strip_metadata(data)
    assert caught.value.code == "damaged"


def test_a_jpeg_that_begins_its_scan_before_its_header_has_no_size() -> None:
    with pytest.raises(ImageError, match="does not say how large it is"):
        image_size(b"\xff\xd8" + made.segment(0xDA, bytes(6)) + b"\xff\xd9")


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt"])
def test_a_png_is_turned_as_its_exif_text_says(name: bytes) -> None:
    said = b"\nexif\n 26\n" + b"49492a0008000000010012010300010000000600" + b"0000"
    body = b"Raw profile type exif\x00" + (said if name == b"tEXt" else b"\x00" + zlib.compress(said))
    stripped = strip_metadata(made.png_of(made.pattern(), made.chunk(name, body)))
    assert _decoded(stripped)[2] == 6


def test_a_frame_of_a_webp_may_have_as_many_chunks_as_are_allowed() -> None:
    for junk in (15, 16):
        still = made.riff_chunk(b"JUNK", b"") * junk + made.webp_still(8, 8)
        data = made.webp(made.webp_canvas(8, 8, 2), made.webp_frame(0, 0, 8, 8, still))
        if junk == 15:
            assert len(strip_metadata(data)) < len(data)
        else:
            with pytest.raises(ImageError, match="more than 16 chunks"):
                strip_metadata(data)


def test_formats_are_the_three_that_sniff_returns() -> None:
    assert set(FORMATS) == {sniff(make()) for make in IMAGES.values()}


SMALL = [strip_metadata(IMAGES[name]()) for name in ("jpeg", "jpeg progressive", "png", "webp lossy", "webp alpha")]
SMALL += [IMAGES[name]() for name in ("jpeg", "png", "webp lossless")]


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(
    which=st.integers(0, len(SMALL) - 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=6),
    in_header=st.booleans(),
    cut=st.floats(0, 1),
)
def test_damaged_bytes_never_raise_anything_else(
    which: int, changes: list[tuple[float, bytes]], in_header: bool, cut: float
) -> None:
    data = bytearray(SMALL[which])
    for place, value in changes:
        at = int(place * (60 if in_header else len(data)))
        data[at : at + len(value)] = value
    damaged = bytes(data[: int(len(data) * cut)] if cut < 0.5 else data)
    try:
        size_px, stripped = image_size(damaged), strip_metadata(damaged)
    except ImageError as error:
        code = error.code
    else:
        code = "fine"
        assert min(size_px) >= 1
        assert strip_metadata(stripped) == stripped
        assert image_size(stripped) == size_px
    assert code in {"empty", "not_an_image", "damaged", "fine"}


def test_real_images_keep_their_pixels(ham10000: Path) -> None:
    files = sorted(ham10000.glob("HAM10000_images_part_*/*.jpg"))[::500]
    assert len(files) > 10
    for file in files:
        data = file.read_bytes()
        before, after = _decoded(data), _decoded(strip_metadata(data))
        np.testing.assert_array_equal(after[1], before[1])
