"""From the bytes of a DICOM file to pixels and to the few tags that are kept; runs in a decoder process only.

In: an untrusted file. Out: uint8 [H, W, 3], sRGB, and the tags of `images.decoder_dicom_tags`. Grey images are shown
as DICOM says: modality LUT, then VOI LUT or window, then inverted if they are MONOCHROME1. What a file announces is
compared with the limits, and with its bytes, before any pixel is made. No text of a file becomes part of an error,
since any tag may hold a name.
"""

import io
import logging
import re
import zlib
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image as PillowImage
from pydicom._uid_dict import UID_dictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import get_expected_length
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from images.decoder_budget import measure, require_pixels
from images.decoder_dicom_tags import tags_of
from images.decoder_pillow import to_srgb
from images.dicom_head import TRANSFER_SYNTAX, file_meta
from images.settings import ImagesSettings
from records.arrays import UInt8Array
from records.errors import ImageError
from records.images import damaged, strip_metadata, too_costly

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
# Its messages quote tags.
logging.getLogger("pydicom").disabled = True

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PALETTE = "PALETTE COLOR"
_BITS = (1, 8, 16, 32)
_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_READ = "Explicit VR Little Endian, JPEG Baseline, JPEG 2000 or RLE"
_STANDARD = re.compile(r"1\.2\.840\.10008(\.[0-9]{1,5}){1,6}")
_VIDEO = re.compile(r"MPEG|HEVC|SMPTE", re.IGNORECASE)
_PACKAGES = {"pyjpegls": "pyjpegls", "gdcm": "python-gdcm", "pylibjpeg": "pylibjpeg pylibjpeg-openjpeg"}
"""Plugin of pydicom to the packages that it needs, those first that bring the fewest others."""
# Rows that are converted at once: their values take eight bytes each meanwhile.
_BAND_PX = 256
_INFLATED_SHARE = 4
_RLE_HEAD_BYTES = 1024


def decode_dicom(data: bytes, limits: ImagesSettings) -> tuple[UInt8Array, dict[str, Any]]:
    """Decode a DICOM file that holds one image.

    Args:
        data: the file.
        limits: what is allowed.
    Returns:
        [H, W, 3], and the tags that are kept.
    Raises:
        ImageError: the file holds no image, several, or one that cannot be read; it is damaged, or exceeds a limit.
    """
    try:
        dataset, syntax = _read(data, limits)
        _require_decoder(syntax)
        _require_one_image(dataset)
        _require_within(dataset, syntax, limits)
        return _decoded(dataset, syntax, limits), tags_of(dataset)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # pydicom raises errors of every kind, whose messages quote tags
        raise damaged("its parts do not fit together") from error


def _read(data: bytes, limits: ImagesSettings) -> tuple[Dataset, UID]:
    found, start = file_meta(data)
    syntax = UID(found.get(TRANSFER_SYNTAX) or ImplicitVRLittleEndian)
    if syntax != DeflatedExplicitVRLittleEndian:
        return pydicom.dcmread(io.BytesIO(data)), syntax
    # pydicom would inflate any number of bytes.
    most_bytes = limits.decoder_memory_mb * 2**20 // _INFLATED_SHARE
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(data[start:], most_bytes)
    if inflater.unconsumed_tail:
        raise too_costly(f"it inflates to more than {most_bytes / 2**20:.0f} MB")
    dataset = read_dataset(io.BytesIO(inflated), is_implicit_VR=False, is_little_endian=True)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset, ExplicitVRLittleEndian


def _require_one_image(dataset: Dataset) -> None:
    if "PixelData" not in dataset:
        kind = UID_dictionary.get(str(dataset.get("SOPClassUID", "")), ("",) * 4)[0]
        if "Image" in kind:
            raise damaged("it holds no pixels")
        raise ImageError(f"the DICOM file holds no image{f' (it is a {kind})' if kind else ''}; send one that does")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        # Which of them shows what is to be judged, nobody can know here.
        raise ImageError(f"the DICOM file holds {frames} frames and Relook reads one; export the frame that matters")
    if str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        raise ImageError("the DICOM file says that its pixels show text about the patient; send it without that text")
    photometric, bits = dataset.get("PhotometricInterpretation"), int(dataset.BitsAllocated)
    samples = int(dataset.SamplesPerPixel)
    wanted = {**dict.fromkeys((*_GREY, _PALETTE), 1), **dict.fromkeys(_COLOUR, 3)}.get(photometric)
    if wanted is None or samples != wanted or bits not in _BITS or (bits > 16 and photometric not in _GREY):
        raise ImageError(
            "the DICOM file holds pixels of a kind that Relook does not read; export it as grey, RGB or palette colour "
            "with 8 or 16 bits"
        )


def _require_within(dataset: Dataset, syntax: UID, limits: ImagesSettings) -> None:
    """Compare the announced size with the limits, and with the bytes that are there."""
    width_px, height_px = int(dataset.Columns), int(dataset.Rows)
    if width_px < 1 or height_px < 1:
        raise damaged("its header says that it has no pixels")
    require_pixels(width_px, height_px, limits)
    values = width_px * height_px * int(dataset.SamplesPerPixel)
    if values > limits.max_megasamples * 1e6:
        raise too_costly(
            f"it takes {values / 1e6:.0f} million values and {limits.max_megasamples:g} million are allowed"
        )
    if len(dataset.get("ICCProfile") or b"") > limits.max_profile_kb * 1000:
        raise too_costly(f"its colour profile is larger than the {limits.max_profile_kb} kB that are allowed")
    if not syntax.is_compressed:
        if len(dataset.PixelData) < get_expected_length(dataset):
            raise damaged("it holds fewer pixels than its header says")
        return
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if syntax in _JPEG:
        work = measure(strip_metadata(frame), limits)
        size = work.width_px, work.height_px
    elif syntax == RLELossless:
        # At its worst, this encoding adds a byte to 128.
        if len(frame) > _RLE_HEAD_BYTES + 2 * values * int(dataset.BitsAllocated) // 8:
            raise damaged("it holds more than its header says")
        return
    elif syntax in _JPEG_2000:
        size = PillowImage.open(io.BytesIO(frame), formats=["JPEG2000"]).size
    else:
        return
    if size != (width_px, height_px):
        raise damaged("its parts do not agree how large it is")


def _require_decoder(syntax: UID) -> None:
    try:
        is_there = get_decoder(syntax).is_available
    except NotImplementedError:
        is_there = False
    if not is_there:
        raise _unreadable(syntax)


def _unreadable(syntax: UID) -> ImageError:
    # A syntax of DICOM itself that is newer than the dictionary; any other text may be anything.
    number = f" ({syntax})" if _STANDARD.fullmatch(str(syntax)) else ""
    name = UID_dictionary.get(str(syntax), (f"a transfer syntax that is not known{number}",))[0]
    if _VIDEO.search(name):
        return ImageError(f"the DICOM file is a video ({name}) and Relook reads images; export the frame that matters")
    packages = _packages_for(syntax)
    more = f", or install what decodes it: pip install {packages}" if packages else ""
    return ImageError(f"Relook does not read DICOM files in {name}; save it in {_READ}{more}")


def _packages_for(syntax: UID) -> str:
    """Return the packages with which pydicom decodes a syntax; empty if there are none."""
    try:
        missing = get_decoder(syntax).missing_dependencies
    except NotImplementedError:
        return ""
    plugins = [line.partition(" ")[0] for line in missing]
    return next((packages for plugin, packages in _PACKAGES.items() if plugin in plugins), "")


def _decoded(dataset: Dataset, syntax: UID, limits: ImagesSettings) -> UInt8Array:
    try:
        values, found = get_decoder(syntax).as_array(dataset, index=0)
    except RuntimeError as error:
        if not syntax.is_compressed or isinstance(error, RecursionError):
            raise
        # What pydicom says when its decoders refuse, for example 12 bits in JPEG Extended.
        if syntax in _JPEG and int(dataset.BitsStored) > 8:
            raise _unreadable(syntax) from error
        raise damaged("its pixels cannot be decoded") from error
    if int(dataset.Rows) != values.shape[0] or int(dataset.Columns) != values.shape[1]:
        raise damaged("its parts do not agree how large it is")
    photometric = str(found["photometric_interpretation"])
    if photometric in _GREY:
        grey = _shown_grey(values, dataset)
        return np.repeat((255 - grey if photometric == "MONOCHROME1" else grey)[..., None], 3, axis=2)
    if photometric == _PALETTE:
        colours = apply_color_lut(values, dataset)[..., :3]
        eight = (colours >> 8 if colours.dtype.itemsize > 1 else colours).astype(np.uint8)
    else:
        eight = _eight_bits(values, int(found["bits_stored"]))
    profile = dataset.get("ICCProfile")
    return np.array(to_srgb(PillowImage.fromarray(np.ascontiguousarray(eight)), profile), dtype=np.uint8)


def _eight_bits(values: NDArray[Any], bits: int) -> UInt8Array:
    if bits >= 8:
        eight = values >> (bits - 8)
    else:
        eight = values.astype(np.uint16) * 255 // (2**bits - 1)
    return np.asarray(eight.clip(0, 255), dtype=np.uint8)


def _shown_grey(values: NDArray[Any], dataset: Dataset) -> UInt8Array:
    """Return grey values as they are to be shown, before MONOCHROME1 is inverted."""
    has_modality = "ModalityLUTSequence" in dataset or "RescaleSlope" in dataset
    show = _display(values, dataset, has_modality)
    if show is None:
        return _eight_bits(values, int(dataset.BitsStored))
    shown = np.empty(values.shape, np.uint8)
    for top in range(0, values.shape[0], _BAND_PX):
        band = values[top : top + _BAND_PX]
        band = apply_modality_lut(band, dataset) if has_modality else band
        shown[top : top + _BAND_PX] = np.rint(np.clip(show(band), 0.0, 255.0)).astype(np.uint8)
    return shown


def _display(values: NDArray[Any], dataset: Dataset, has_modality: bool) -> Any:
    """Return the function from a band's values to 0..255, or None to show stored values as they are."""
    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return lambda band: apply_voi(band.astype(np.int64), dataset) * (255.0 / (2**bits - 1))
    center, width = _first_number(dataset.get("WindowCenter")), _first_number(dataset.get("WindowWidth"))
    if center is not None and width is not None and width > 0:
        return _window(center, width, str(dataset.get("VOILUTFunction") or "LINEAR"))
    if int(dataset.BitsStored) <= 8 and int(dataset.get("PixelRepresentation") or 0) == 0:
        return None
    # Without a window, files differ in how much of their range they use: what is there is shown from dark to bright.
    kept = values
    padding = dataset.get("PixelPaddingValue")
    if isinstance(padding, int) and (values != padding).any():
        kept = values[values != padding]
    ends = np.array([kept.min(), kept.max()])
    low, high = np.sort((apply_modality_lut(ends, dataset) if has_modality else ends).astype(np.float64))
    return lambda band: (band.astype(np.float64) - low) * (255.0 / max(high - low, 1e-9))


def _window(center: float, width: float, function: str) -> Any:
    """Return the window of PS3.3, C.11.2.1.2 and C.11.2.1.3, scaled to 0..255."""
    if function == "SIGMOID":
        return lambda band: 255.0 / (1.0 + np.exp(np.clip(-4.0 * (band - center) / width, -700.0, 700.0)))
    if function == "LINEAR_EXACT":
        return lambda band: ((band - center) / width + 0.5) * 255.0
    if width <= 1:
        return lambda band: np.where(band > center - 0.5, 255.0, 0.0)
    return lambda band: ((band - (center - 0.5)) / (width - 1.0) + 0.5) * 255.0


def _first_number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    found = float(value if isinstance(value, int | float | str) else value[0])
    return found if np.isfinite(found) else None
