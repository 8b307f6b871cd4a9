"""Permanent deletion in the store and in the pixel cache: by retention period, and on a person's request.

`records` decides what may be deleted and does it; this module removes the decoded pixels along with it.
"""

from collections.abc import Callable, Sequence
from functools import partial

from images.cache import blank_pixels
from records.erasure import Erasure, erase_image
from records.errors import DataError
from records.keys import patient_hash
from records.retention import Retention, apply_retention
from records.store import Store
from records.types import Image


def retain(store: Store, advance: Callable[[int, int], None]) -> Retention:
    """Delete served images and predictions whose retention period has ended; `advance` gets (done, total).

    RefusedError if another deletion is running, IntegrityError if the manifest of a dataset version is missing (nothing
    was deleted), UnavailableError if a blob cannot be removed (run it again).
    """
    forget = partial(blank_pixels, store.home.cache)
    return apply_retention(store, actor="relook retention", forget=forget, advance=advance)


def images_to_erase(store: Store, image_ids: Sequence[str], patient_id: str | None) -> list[str]:
    """Return the sorted ids of the images to erase.

    Args:
        store: with the images.
        image_ids: full ids.
        patient_id: adds all images of this patient; named as in imports and requests.
    Returns:
        Ids, also of erased images: erasing them again finishes what a killed run left.
    Raises:
        UnknownIdError: there is no such image.
        DataError: no image is named, or none of this patient exists.
    """
    with store.ledger.read() as tx:
        found = {tx.require(Image, image_id).id for image_id in image_ids}
        # The ledger holds no patient ids, only their keyed hash.
        if patient_id is not None:
            theirs = tx.find(Image, where={"patient_hash": patient_hash(store.home, patient_id)})
            if not theirs:
                raise DataError("no image of this patient is here; name images by their ids if it came without one")
            found |= {image.id for image in theirs}
    if not found:
        raise DataError("name images by their whole ids, or a patient with --patient")
    return sorted(found)


def erase(store: Store, image_ids: Sequence[str], advance: Callable[[int], None]) -> list[Erasure]:
    """Erase images on a person's request; `advance` gets the number of erased images.

    UnavailableError if a blob cannot be removed; run it again.
    """
    erased = []
    for image_id in image_ids:
        # The ledger first: after a kill in between, erasing again finds the image and removes its pixels.
        erased.append(erase_image(store, image_id, actor="relook erase"))
        blank_pixels(store.home.cache, [image_id])
        advance(len(erased))
    return erased


def sentence(found: Retention, *, dry_run: bool) -> str:
    """Describe what was deleted, or with `dry_run` would be."""
    if found.images_before is None and found.predictions_before is None:
        return "everything is kept; records.keep_images_days and records.keep_predictions_days say for how long"
    lines, gone = [], "would be deleted" if dry_run else "deleted"
    if found.images_before is not None:
        lines.append(
            f"images last sent before {found.images_before:%Y-%m-%d %H:%M}: {found.images} with "
            f"{found.overlays} heat maps {gone}, {found.images_needed} needed and kept"
        )
    if found.predictions_before is not None:
        lines.append(
            f"predictions made before {found.predictions_before:%Y-%m-%d %H:%M}: {found.predictions} "
            f"{gone}, {found.predictions_needed} needed and kept"
        )
    return "\n".join(lines)
