"""Deleting for good, in the store and in this home's decoded pixels: what is due, and what a person wants gone.

The records know what may go; decoded pixels are the trainers'. This is where the two meet.
"""

from collections.abc import Callable, Sequence
from functools import partial

from images.forget import forget_pixels
from records.erasure import Erasure, erase_image
from records.errors import DataError
from records.keys import patient_hash
from records.retention import Retention, apply_retention
from records.store import Store
from records.types import Image


def retain(store: Store, advance: Callable[[int, int], None]) -> Retention:
    """Delete served images and answers that are due.

    Args:
        store: with the settings.
        advance: hears how far it is, (done, total).
    Returns:
        What was deleted.
    Raises:
        RefusedError: another run is under way.
        IntegrityError: the manifest of a dataset version is missing; nothing was deleted.
        UnavailableError: a blob cannot be removed; run it again.
    """
    forget = partial(forget_pixels, store.home.cache)
    return apply_retention(store, actor="relook retention", forget=forget, advance=advance)


def images_to_erase(store: Store, image_ids: Sequence[str], patient_id: str | None) -> list[str]:
    """Return the images that are meant, by id.

    Args:
        store: with the images.
        image_ids: whole ids.
        patient_id: all images of this patient, too, named as imports and callers named them.
    Returns:
        Their ids, those that are gone already included: erasing again finishes what a killed run left.
    Raises:
        UnknownIdError: there is no such image.
        DataError: nothing was named, or no image of this patient is here.
    """
    with store.ledger.read() as tx:
        found = {tx.require(Image, image_id).id for image_id in image_ids}
        if patient_id is not None:
            theirs = tx.find(Image, where={"patient_hash": patient_hash(store.home, patient_id)})
            if not theirs:
                raise DataError("no image of this patient is here; name images by their ids if it came without one")
            found |= {image.id for image in theirs}
    if not found:
        raise DataError("name images by their whole ids, or a patient with --patient")
    return sorted(found)


def erase(store: Store, image_ids: Sequence[str], advance: Callable[[int], None]) -> list[Erasure]:
    """Erase images on a person's request.

    Args:
        store: with the images.
        image_ids: of `images_to_erase`.
        advance: hears how many are done.
    Returns:
        What was removed, per image.
    Raises:
        UnavailableError: a blob cannot be removed; run it again.
    """
    erased = []
    for image_id in image_ids:
        erased.append(erase_image(store, image_id, actor="relook erase"))
        forget_pixels(store.home.cache, [image_id])
        advance(len(erased))
    return erased


def sentence(found: Retention, *, dry_run: bool) -> str:
    """Return what went or would go, for people."""
    if found.images_before is None and found.predictions_before is None:
        return "everything is kept; records.keep_images_days and records.keep_predictions_days say for how long"
    lines, gone = [], "would go" if dry_run else "deleted"
    if found.images_before is not None:
        lines.append(
            f"images last sent before {found.images_before:%Y-%m-%d %H:%M}: {found.images} with "
            f"{found.overlays} heat maps {gone}, {found.images_needed} needed and kept"
        )
    if found.predictions_before is not None:
        lines.append(
            f"answers given before {found.predictions_before:%Y-%m-%d %H:%M}: {found.predictions} "
            f"{gone}, {found.predictions_needed} needed and kept"
        )
    return "\n".join(lines)
