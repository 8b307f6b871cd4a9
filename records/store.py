"""The store: home, taxonomy, ledger and blobs, opened together and passed to every room."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa

from records.audit import head_file, open_chain
from records.blobs import BlobStore, open_blobs
from records.errors import DataError, IntegrityError, UnknownIdError
from records.home import Home, open_home
from records.ids import sha256_hex
from records.ledger import Ledger, open_ledger
from records.settings import RecordsSettings
from records.taxonomy import Taxonomy, load_taxonomy
from records.types import Image

_BATCH = 5000
"""Ids per query of the ledger."""


@dataclass(frozen=True)
class Store:
    """Everything that is kept. Open it with `open_store`.

    Args:
        settings: it was opened with; the home in them is absolute, so another process may open the same store.
        home: the folder that everything lives under.
        taxonomy: which classes there are.
        ledger: every record.
        blobs: images and overlays.
    """

    settings: RecordsSettings
    home: Home
    taxonomy: Taxonomy
    ledger: Ledger
    blobs: BlobStore

    def portable_settings(self) -> RecordsSettings:
        """Return settings that open this store from any working folder: home and taxonomy file are absolute paths."""
        taxonomy = self.settings.taxonomy
        if Path(taxonomy).is_file():
            taxonomy = str(Path(taxonomy).absolute())
        return self.settings.model_copy(update={"home": self.home.root, "taxonomy": taxonomy})

    def close(self) -> None:
        """Close the connections; the files stay."""
        self.ledger.close()


def open_store(settings: RecordsSettings) -> Store:
    """Open home, taxonomy, ledger (migrated) and blobs.

    Args:
        settings: of the records room.
    Returns:
        The open store.
    Raises:
        ConfigError: a place cannot be used.
        TaxonomyError: the taxonomy is malformed.
        UnavailableError: the database or the blob store does not answer.
    """
    taxonomy = load_taxonomy(settings.taxonomy)
    home = open_home(settings.home)
    ledger = open_ledger(
        database_url(settings, home),
        durability=settings.durability,
        busy_timeout_s=settings.busy_timeout_s,
        audit_head=head_file(home),
    )
    open_chain(ledger, home)
    settings = settings.model_copy(update={"home": home.root})
    return Store(settings, home, taxonomy, ledger, open_blobs(settings.blobs or str(home.blobs)))


def database_url(settings: RecordsSettings, home: Home) -> str | sa.URL:
    """Return where the ledger is: what the settings name, or `ledger.db` in the home.

    Args:
        settings: of the records room.
        home: that they opened.
    Returns:
        A SQLAlchemy URL.
    """
    return settings.database or sa.URL.create("sqlite", database=str(home.root / "ledger.db"))


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
