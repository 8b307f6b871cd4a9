"""Stored images by id: their ledger rows, and their bytes checked against the id."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from records.errors import DataError, IntegrityError, UnknownIdError
from records.ids import sha256_hex
from records.store import Store
from records.types import Image

_BATCH = 5000


def find_images(store: Store, image_ids: Sequence[str]) -> list[Image]:
    """Return the ledger rows of images, in the given order.

    Args:
        store: with the ledger.
        image_ids: [N] image ids.
    Returns:
        [N] images.
    Raises:
        UnknownIdError: an image is not in the ledger.
    """
    found: dict[str, Image] = {}
    with store.ledger.read() as tx:
        for start in range(0, len(image_ids), _BATCH):
            batch = image_ids[start : start + _BATCH]
            found.update((image.id, image) for image in tx.find(Image, where={"id": batch}))
    absent = next((image_id for image_id in image_ids if image_id not in found), None)
    if absent is not None:
        raise UnknownIdError(f"no image has the id {absent[:12]}; import it first")
    return [found[image_id] for image_id in image_ids]


def read_image(store: Store, image: Image) -> bytes:
    """Return the stored bytes of an image, from the blob store or from where it was imported in place.

    Args:
        store: with the blobs.
        image: its ledger row.
    Returns:
        The bytes; their SHA-256 is the image's id.
    Raises:
        DataError: an in-place file is gone.
        UnknownIdError: the blob is gone.
        IntegrityError: the bytes were altered.
    """
    # A blob is found by content and not by address, so that a home that was moved or restored still reads it.
    if image.uri.endswith(image.id):
        return store.blobs.get(image.id)
    path = Path(unquote(urlsplit(image.uri).path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"image {image.source_id or image.id[:12]} was imported in place and cannot be read at {path} "
            f"({error.strerror}); put it back, or import the folder again"
        ) from error
    if sha256_hex(data) != image.id:
        raise IntegrityError(f"image {image.source_id or image.id[:12]} at {path} was altered since it was imported")
    return data
