"""Intake of images that were sent, and heat maps drawn over them.

In: untrusted bytes. Out: a `StoredImage` without metadata, or an `ImageError`. Limits are checked on the header,
before any pixel is decoded.
"""

import numpy as np
import sqlalchemy as sa

from images.decode import decode_square
from records.arrays import Float32Array
from records.errors import ImageError
from records.ids import sha256_hex
from records.images import image_size, sniff, strip_metadata
from records.ledger.tables import TABLES
from records.store import Store
from records.types import Image
from serving.messages import HeatMap
from serving.outbox import StoredImage
from vision.explanations.overlay import overlay_png
from vision.inference.attribution import Attribution
from vision.inference.loaded import LoadedModel


def take_in(store: Store, data: bytes, max_pixels: int) -> StoredImage:
    """Check an image and return it in the form that is stored.

    Args:
        store: its ledger may know the image from an import.
        data: as sent.
        max_pixels: larger images are refused before decoding.
    Returns:
        The image without metadata, except orientation and colour profile.
    Raises:
        ImageError: not a JPEG, PNG or WebP file, damaged, or too many pixels.
    """
    kind = sniff(data)
    width_px, height_px = image_size(data)
    # A small file can declare a huge image, so the size is taken from the header before memory is allocated.
    if width_px * height_px > max_pixels:
        raise ImageError(
            f"the image has {width_px} x {height_px} pixels and {max_pixels / 1e6:g} million are allowed; "
            "send a smaller one",
            "too_many_pixels",
        )
    stored = strip_metadata(data)
    if stored != data and _is_known(store, data):
        # Imported in place, where the file stays unchanged: its id is the hash of the file with metadata.
        stored = data
    return StoredImage(sha256_hex(stored), stored, kind, width_px, height_px)


def draw_map(image: bytes, values: Float32Array, side_px: int, alpha: float) -> bytes:
    """Draw a heat map over the centre square of an image.

    Args:
        image: as stored.
        values: [h, w], finite.
        side_px: side of the result, pixels.
        alpha: opacity where the map is largest, 0 to 1.
    Returns:
        PNG bytes.
    """
    return overlay_png(decode_square(image, side_px), values, alpha)


def gradcam_map(
    loaded: LoadedModel, image: bytes, values: Float32Array, target: str, side_px: int, alpha: float
) -> HeatMap:
    """Return a Grad-CAM map with its overlay; see `draw_map` for the arguments."""
    png = draw_map(image, values, side_px, alpha)
    return HeatMap(
        "gradcam", loaded.gradcam_is_exact, loaded.target_layer, target, values, png,
        faithfulness=loaded.faithfulness,
    )  # fmt: skip


def attribution_map(
    loaded: LoadedModel,
    found: Attribution,
    image: bytes,
    method: str,
    target: str,
    versus: str | None,
    side_px: int,
    alpha: float,
) -> HeatMap:
    """Return an attribution with its overlay; see `draw_map`. Negative values are not drawn."""
    png = draw_map(image, np.clip(found.values, 0.0, None), side_px, alpha)
    return HeatMap(
        method=method,
        exact=found.exact,
        layer=found.layer,
        target=target,
        values=found.values,
        png=png,
        versus=versus,
        steps=found.steps,
        completeness_error=found.completeness_error,
        # Faithfulness is measured for Grad-CAM of one class, so it says nothing about other maps.
        faithfulness=loaded.faithfulness if method == "gradcam" and versus is None else None,
    )


def was_erased(store: Store, image_id: str) -> bool:
    """Return whether an image was erased on request; if it is sent again, it is predicted and not stored."""
    images = TABLES[Image].c
    with store.ledger.read() as tx:
        erased = sa.and_(images.erased_at.is_not(None), images.expired_at.is_(None))
        query = sa.select(images.id).where(images.id == image_id, erased)
        return tx.connection.scalar(query) is not None


def _is_known(store: Store, data: bytes) -> bool:
    with store.ledger.read() as tx:
        return tx.get(Image, sha256_hex(data)) is not None
