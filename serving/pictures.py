"""From the bytes of a request to what is stored and what the model sees.

In: bytes that anybody may have sent. Out: a `StoredPicture` without metadata, or a `PictureError`.
Limits are checked on the header, before any pixel is decoded.
"""

import numpy as np
import sqlalchemy as sa

from images.decode import decode_square
from records.arrays import Float32Array
from records.errors import PictureError
from records.ids import sha256_hex
from records.ledger.tables import TABLES
from records.pictures import picture_size, sniff, strip_metadata
from records.store import Store
from records.types import Image
from serving.messages import HeatMap
from serving.outbox import StoredPicture
from vision.explanations.overlay import overlay_png
from vision.inference.attribution import Attribution
from vision.inference.loaded import LoadedModel


def take_in(store: Store, data: bytes, max_pixels: int) -> StoredPicture:
    """Check a picture and bring it to the form that is stored.

    Args:
        store: that may know the picture from an import.
        data: as sent.
        max_pixels: more are refused before decoding.
    Returns:
        The picture without metadata, except orientation and colour profile.
    Raises:
        PictureError: not a JPEG, PNG or WebP file, damaged, or too many pixels.
    """
    kind = sniff(data)
    width_px, height_px = picture_size(data)
    if width_px * height_px > max_pixels:
        raise PictureError(
            f"the picture has {width_px} x {height_px} pixels and {max_pixels / 1e6:g} million are allowed; "
            "send a smaller one",
            "too_many_pixels",
        )
    stored = strip_metadata(data)
    if stored != data and _is_known(store, data):
        # Imported in place: its id is that of the whole file.
        stored = data
    return StoredPicture(sha256_hex(stored), stored, kind, width_px, height_px)


def draw_map(picture: bytes, values: Float32Array, side_px: int, alpha: float) -> bytes:
    """Draw a map over the centre square of a picture.

    Args:
        picture: as stored.
        values: [h, w], finite.
        side_px: side of the result.
        alpha: opacity where the map is largest, 0 to 1.
    Returns:
        PNG bytes.
    """
    return overlay_png(decode_square(picture, side_px), values, alpha)


def gradcam_map(
    loaded: LoadedModel, picture: bytes, values: Float32Array, target: str, side_px: int, alpha: float
) -> HeatMap:
    """Put a Grad-CAM map and its drawing together; see `draw_map` for the arguments."""
    png = draw_map(picture, values, side_px, alpha)
    return HeatMap(
        "gradcam", loaded.gradcam_is_exact, loaded.target_layer, target, values, png,
        faithfulness=loaded.faithfulness,
    )  # fmt: skip


def attribution_map(
    loaded: LoadedModel,
    found: Attribution,
    picture: bytes,
    method: str,
    target: str,
    versus: str | None,
    side_px: int,
    alpha: float,
) -> HeatMap:
    """Put a computed map and its drawing together; see `draw_map`. What speaks against the class is not drawn."""
    png = draw_map(picture, np.clip(found.values, 0.0, None), side_px, alpha)
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
        # What was measured holds for the method that it was measured with.
        faithfulness=loaded.faithfulness if method == "gradcam" and versus is None else None,
    )


def was_erased(store: Store, image_id: str) -> bool:
    """Return whether a picture was erased on request; one that is sent again is answered and not stored again."""
    images = TABLES[Image].c
    with store.ledger.read() as tx:
        erased = sa.and_(images.erased_at.is_not(None), images.expired_at.is_(None))
        query = sa.select(images.id).where(images.id == image_id, erased)
        return tx.connection.scalar(query) is not None


def _is_known(store: Store, data: bytes) -> bool:
    with store.ledger.read() as tx:
        return tx.get(Image, sha256_hex(data)) is not None
