"""Decode the bytes of an image: one decoder for every room.

Input: the bytes of a JPEG, PNG, WebP or DICOM file. Output: uint8 [H, W, 3], sRGB, upright: what a `Frame` takes of
the image, or all of it. Transparent pixels are blended with white, and 16 bits are scaled to 8. The result depends only
on the bytes, the frame and `DECODE_VERSION`, so training, serving, the page and annotators see the same pixels. Scaling
to floats is part of a bundle's geometry; image quality is not judged here.

    bytes -> without metadata -> work within the limits -> decoded here if it is little, else in a decoder process

DICOM files become PNG files first; see `images.dicom`.
"""

from collections.abc import Collection

from images.decoder_budget import is_cheap, measure
from images.decoder_pillow import Wanted, decode_here
from images.decoder_pool import decoder_pool
from images.dicom import as_plain_file
from images.settings import limits_in_force
from records.arrays import UInt8Array
from records.errors import ContractError
from records.frames import Frame
from records.images import is_dicom, strip_metadata

DECODE_VERSION = 1
"""Part of every cache key and bundle. Raise it with any change that alters a single pixel of any image."""


def decode_frame(data: bytes, frame: Frame) -> UInt8Array:
    """Decode what a frame takes of an image, sRGB, upright: [S, S, 3] for a network; see `decode_frames`."""
    return decode_frames(data, (frame,))[frame]


def decode_frames(data: bytes, frames: Collection[Frame]) -> dict[Frame, UInt8Array]:
    """Decode what several frames take of an image, sharing the work between them.

    Args:
        data: a JPEG, PNG, WebP or DICOM file.
        frames: each of a side of at least 1. Those that need the same JPEG scale share one decode.
    Returns:
        Frame to [H, W, 3]; each equal to the result of `decode_frame` for that frame alone.
    Raises:
        ImageError: the bytes are not such a file, are damaged, or exceed a limit of `ImagesSettings`.
        ContractError: a side is below 1.
    """
    if not frames or min(frame.side_px for frame in frames) < 1:
        raise ContractError(f"frames must hold frames with sides of at least 1 px, not {list(frames)}")
    return dict(zip(frames, _decoded(data, Wanted(tuple(frames))), strict=True))


def decode_image(data: bytes, max_side_px: int | None = None) -> UInt8Array:
    """Decode a whole image for display.

    Args:
        data: a JPEG, PNG, WebP or DICOM file.
        max_side_px: the longer side is reduced to this; None keeps the size.
    Returns:
        [H, W, 3], sRGB, upright.
    Raises:
        ImageError: the bytes are not such a file, are damaged, or exceed a limit of `ImagesSettings`.
    """
    return _decoded(data, Wanted(max_side_px=max_side_px))[0]


class CostlyError(Exception):
    """Raised by `decode_if_cheap` for an image that takes a decoder process, and perhaps seconds."""


def decode_if_cheap(data: bytes, frames: Collection[Frame]) -> dict[Frame, UInt8Array]:
    """Do the same as `decode_frames`, or raise CostlyError, so that the caller need not let others wait."""
    limits = limits_in_force()
    if is_dicom(data):
        raise CostlyError
    stripped = strip_metadata(data)
    if not is_cheap(measure(stripped, limits), limits):
        raise CostlyError
    return dict(zip(frames, decode_here(stripped, Wanted(tuple(frames))), strict=True))


def _decoded(data: bytes, wanted: Wanted) -> list[UInt8Array]:
    limits = limits_in_force()
    # Metadata is removed before, so that no parser of Pillow or libjpeg sees it, and every copy of an image, stored or
    # not, is decoded from the same bytes.
    stripped = strip_metadata(as_plain_file(data))
    work = measure(stripped, limits)
    if is_cheap(work, limits):
        return decode_here(stripped, wanted)
    return decoder_pool(limits).decode(stripped, wanted, work.pixels)
