"""Intake of images that were sent, and heat maps drawn over them.

In: untrusted bytes. Out: a `StoredImage` without metadata, or an `ImageError`. Limits are checked on the header,
before any pixel is decoded.
"""

from collections.abc import Sequence

import numpy as np

from images.dicom import as_plain_file
from images.overlay import overlay_png
from records.arrays import Float32Array, UInt8Array
from records.consent import as_allowed
from records.errors import ImageError
from records.ids import sha256_hex
from records.images import image_size, sniff, strip_metadata
from records.store import Store
from records.types import Consent, Image
from serving.messages import HeatMap
from serving.outbox import StoredImage
from vision.inference.attribution import Attribution
from vision.inference.loaded import LoadedModel


def take_in(store: Store, data: bytes, max_pixels: int) -> StoredImage:
    """Check an image and return it in the form that is stored.

    Args:
        store: its ledger may know the image from an import.
        data: as sent; a DICOM file becomes a PNG of its image.
        max_pixels: larger images are refused before decoding.
    Returns:
        The image without metadata, except orientation and colour profile.
    Raises:
        ImageError: not a JPEG, PNG, WebP or DICOM file, damaged, or too many pixels.
    """
    data = as_plain_file(data)
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


def gradcam_map(loaded: LoadedModel, shown: UInt8Array, values: Float32Array, target: str, alpha: float) -> HeatMap:
    """Return a Grad-CAM map with its overlay; see `overlay_png` for the arguments."""
    png = overlay_png(shown, values, alpha)
    return HeatMap(
        "gradcam", loaded.gradcam_is_exact, loaded.target_layer, target, values, png,
        crop=loaded.geometry.crop, faithfulness=loaded.faithfulness,
    )  # fmt: skip


def attribution_map(
    loaded: LoadedModel,
    found: Attribution,
    shown: UInt8Array,
    method: str,
    target: str,
    versus: str | None,
    alpha: float,
) -> HeatMap:
    """Return an attribution with its overlay; see `overlay_png`. Negative values are not drawn."""
    png = overlay_png(shown, np.clip(found.values, 0.0, None), alpha)
    return HeatMap(
        method=method,
        exact=found.exact,
        layer=found.layer,
        target=target,
        values=found.values,
        png=png,
        crop=loaded.geometry.crop,
        versus=versus,
        steps=found.steps,
        completeness_error=found.completeness_error,
        # Faithfulness is measured for Grad-CAM of one class, so it says nothing about other maps.
        faithfulness=loaded.faithfulness if method == "gradcam" and versus is None else None,
    )


def allowed_consents(store: Store, image_ids: Sequence[str], wanted: Sequence[Consent]) -> list[Consent]:
    """Return the consents that requests may use: an image that was erased is predicted, and nothing of it is kept."""
    asked = {image_id for image_id, consent in zip(image_ids, wanted, strict=True) if consent is not Consent.NONE}
    if not asked:
        return list(wanted)
    with store.ledger.read() as tx:
        known = {image.id: image for image in tx.find(Image, where={"id": asked})}
    return [as_allowed(known.get(image_id), consent) for image_id, consent in zip(image_ids, wanted, strict=True)]


def _is_known(store: Store, data: bytes) -> bool:
    with store.ledger.read() as tx:
        return tx.get(Image, sha256_hex(data)) is not None
