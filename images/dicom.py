"""DICOM files become PNG files at the entrance: what is stored, hashed and shown afterwards knows nothing of DICOM.

In: a file whose bytes 129 to 132 are `DICM`. Out: its image as a PNG, which loses nothing of the 8 bits that are shown,
and the few tags that an import uses. Parsing and decoding happen in a decoder process.
"""

import importlib.util
import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image as PillowImage
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from images.decoder_pool import decoder_pool
from images.settings import limits_in_force
from records.errors import ImageError, UnavailableError
from records.images import is_dicom


class DicomTags(BaseModel):
    """Tags of a DICOM file that an import uses.

    The first five identify a person or a visit. They are only hashed and compared, and never stored or shown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    patient_id: str = Field(default="", max_length=64, repr=False)
    patient_name: str = Field(default="", max_length=64, repr=False)
    study_uid: str = Field(default="", max_length=64, repr=False)
    sop_uid: str = Field(default="", max_length=64, repr=False)
    lesion_id: str = Field(default="", max_length=64, repr=False)
    age_years: float | None = Field(default=None, ge=0, le=130)
    sex: Literal["male", "female", "other"] | None = None
    localization: str | None = Field(default=None, max_length=100, pattern=r"^[a-z0-9 ,./()'-]+$")
    unknown_site: bool = False


@dataclass(frozen=True)
class DicomImage:
    """The image of a DICOM file."""

    png: bytes
    tags: DicomTags


def read_dicom(data: bytes) -> DicomImage:
    """Read a DICOM file that holds one image.

    Args:
        data: the file.
    Returns:
        Its image as PNG, grey or RGB, and its tags.
    Raises:
        ImageError: it holds no image, several, or one that cannot be read; it is damaged, exceeds a limit of
            `ImagesSettings`, or the extra `dicom` is not installed.
        UnavailableError: no decoder process starts.
    """
    if importlib.util.find_spec("pydicom") is None:
        raise ImageError("reading DICOM files needs a further package: pip install 'relook[dicom]'")
    pixels, tags = decoder_pool(limits_in_force()).decode_dicom(data)
    is_grey = bool((pixels[..., :1] == pixels).all())
    try:
        return DicomImage(
            png_bytes(PillowImage.fromarray(np.ascontiguousarray(pixels[..., 0]) if is_grey else pixels)),
            DicomTags.model_validate(tags),
        )
    except ValidationError as error:
        raise UnavailableError("a decoder process sent tags of another form than asked for") from error


def as_plain_file(data: bytes) -> bytes:
    """Return the image of a DICOM file as PNG, and any other bytes as they are; see `read_dicom`."""
    return read_dicom(data).png if is_dicom(data) else data


def png_bytes(image: PillowImage.Image) -> bytes:
    """Return an image as PNG, written fast rather than small."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()
