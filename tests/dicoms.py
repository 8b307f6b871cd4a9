"""DICOM files made for a test: an image, and tags by their keywords."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image as PillowImage
from pydicom.config import disable_value_validation
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

DERMOSCOPIC = "1.2.840.10008.5.1.4.1.1.77.1.7"
Pixels = NDArray[np.generic]


def dataset_of(pixels: Pixels, photometric: str = "", **tags: Any) -> Dataset:
    """Return a dataset whose image is [H, W] or [H, W, 3]; a tag None is left out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = DERMOSCOPIC
    dataset.SOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric or ("RGB" if pixels.ndim == 3 else "MONOCHROME2")
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() + b"\x00" * (pixels.nbytes % 2)
    # Files of real devices break the rules, too.
    with disable_value_validation():
        for keyword, value in tags.items():
            setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def file_of(dataset: Dataset) -> bytes:
    """Return a dataset as a file."""
    file = io.BytesIO()
    with disable_value_validation():
        pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def dicom(pixels: Pixels, photometric: str = "", **tags: Any) -> bytes:
    """Return a DICOM file; see `dataset_of`."""
    return file_of(dataset_of(pixels, photometric, **tags))


def with_jpeg(pixels: Pixels, jpeg: bytes, **tags: Any) -> bytes:
    """Return a DICOM file that announces the size of `pixels`, and whose image is a JPEG file."""
    dataset = dataset_of(pixels, "YBR_FULL_422", **tags)
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([jpeg])
    dataset["PixelData"].is_undefined_length = True
    return file_of(dataset)


def jpeg_of(pixels: Pixels, **options: Any) -> bytes:
    """Return an image as JPEG."""
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, format="JPEG", quality=95, **options)  # type: ignore[arg-type]
    return file.getvalue()


def item(**tags: Any) -> Sequence:
    """Return a sequence of one item."""
    one = Dataset()
    with disable_value_validation():
        for keyword, value in tags.items():
            setattr(one, keyword, value)
    return Sequence([one])


def shipped(name: str) -> bytes:
    """Return a file of pydicom's package."""
    path = get_testdata_file(name, download=False)
    assert path is not None, name
    return Path(str(path)).read_bytes()


def disk(colour: tuple[int, int, int], seed: int, side_px: int = 48) -> NDArray[np.uint8]:
    """Return a disk of a colour on skin, [S, S, 3]."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side_px, :side_px]
    row, column, radius = random.uniform(0.3, 0.7, 3) * side_px
    pixels = random.normal(200, 8, (side_px, side_px, 3))
    pixels[np.hypot(rows - row, columns - column) < radius / 2 + 4] = colour
    return np.asarray((pixels + random.normal(0, 4, pixels.shape)).clip(0, 255), dtype=np.uint8)
