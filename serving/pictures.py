"""From the bytes of a request to what is stored and what the model sees.

In: bytes that anybody may have sent. Out: a `StoredPicture` without metadata, or a `PictureError`.
Limits are checked on the header, before any pixel is decoded.
"""

import numpy as np
from numpy.typing import NDArray

from records.errors import PictureError
from records.ids import sha256_hex
from records.pictures import picture_size, sniff, strip_metadata
from records.store import Store
from records.types import Image
from serving.messages import HeatMap
from serving.outbox import StoredPicture
from trainers.data.decode import decode_square
from trainers.explanations.overlay import overlay_png
from trainers.inference.loaded import LoadedModel


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


def draw_map(picture: bytes, values: NDArray[np.float32], side_px: int, alpha: float) -> bytes:
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
    loaded: LoadedModel, picture: bytes, values: NDArray[np.float32], target: str, side_px: int, alpha: float
) -> HeatMap:
    """Put a Grad-CAM map and its drawing together; see `draw_map` for the arguments."""
    png = draw_map(picture, values, side_px, alpha)
    return HeatMap("gradcam", loaded.gradcam_is_exact, loaded.target_layer, target, values, png)


def _is_known(store: Store, data: bytes) -> bool:
    with store.ledger.read() as tx:
        return tx.get(Image, sha256_hex(data)) is not None
