"""Images as callers from Python have them: a path, the bytes of a file, a Pillow image or an array.

In: any of these. Out: the bytes of an image file, so that what was given as an array passes the same decoder, limits
and resizing as a file. Arrays and Pillow images are written as PNG, which loses nothing.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageOps

from images.dicom import as_plain_file, png_bytes
from images.files import shown
from records.errors import DataError, ImageError

GivenImage = str | os.PathLike[str] | bytes | PillowImage.Image | NDArray[np.uint8]
"""A path, the bytes of an image file, a Pillow image, or an array uint8 [H, W, 3], red first."""

_IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def image_bytes(image: GivenImage) -> bytes:
    """Return the bytes of an image file that shows a given image.

    Args:
        image: a path, bytes, a Pillow image, or an array uint8 [H, W, 3].
    Returns:
        The file's bytes as they are, or a PNG of a DICOM file, a Pillow image or an array.
    Raises:
        DataError: the file cannot be read.
        ImageError: it is none of these, or an array of another type or shape.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return as_plain_file(bytes(image))
    if isinstance(image, str | os.PathLike):
        return as_plain_file(_file_bytes(Path(image)))
    if isinstance(image, np.ndarray):
        return png_bytes(PillowImage.fromarray(_pixels(image)))
    if isinstance(image, PillowImage.Image):
        # Turned first: a PNG would lose the orientation that a camera's metadata has.
        upright = ImageOps.exif_transpose(image)
        return png_bytes(upright if upright.mode in _IN_PNG else upright.convert("RGB"))
    raise ImageError(
        f"a {type(image).__name__} is not an image; give a path, the bytes of a file, a Pillow image or an array "
        "uint8 [H, W, 3]"
    )


def given_list(images: Any) -> list[Any]:
    """Return one given image, or several in any iterable or in an array [N, H, W, 3], as a list."""
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | PillowImage.Image):
        return [images]
    if isinstance(images, np.ndarray) and images.ndim == 3 and images.dtype != np.object_:
        return [images]
    if not isinstance(images, Iterable):
        raise ImageError(f"a {type(images).__name__} is not a list of images; give paths, bytes, images or arrays")
    return list(images)


def given_name(image: GivenImage, number: int) -> str:
    """Return the path of a given image, else `image N`, for tables and messages."""
    return shown(os.fspath(image)) if isinstance(image, str | os.PathLike) else f"image {number}"


def _file_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{shown(path)!r} is a folder; give its files, for example sorted(Path(folder).rglob('*.jpg'))")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the image {shown(path)!r} cannot be read ({error.strerror})") from error


def _pixels(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ImageError(
            f"an array is {array.dtype} {list(array.shape)}, and an image is uint8 [H, W, 3] with red, green and blue "
            "from 0 to 255"
        )
    return np.ascontiguousarray(array)
