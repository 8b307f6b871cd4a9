"""The store: home, taxonomy, ledger and blobs, opened together and passed to every room.

A home remembers the taxonomy of its labels, as an event of the audit chain. Also here: the ledger rows of images, and
their bytes checked against the id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa

from records import audit, tracing
from records.audit import head_file, open_chain
from records.blobs import BlobStore, open_blobs
from records.errors import DataError, IntegrityError, TaxonomyError, UnknownIdError
from records.home import Home, open_home
from records.ids import sha256_hex
from records.ledger import AuditPlaces, Ledger, Transaction, open_ledger
from records.ledger.tables import TABLES
from records.settings import RecordsSettings
from records.taxonomy import Taxonomy, load_taxonomy
from records.types import Annotation, AuditEvent, Image, SourceLabel

DEFAULT_TAXONOMY = "ham10000"
"""Taxonomy of a home that remembers none, where the settings name none."""

TAXONOMY_ACTION = "taxonomy.remembered"
"""Action of the audit event; its subject is the taxonomy's hash, its details are the document."""

_BATCH = 5000
"""Ids per query of the ledger."""


@dataclass(frozen=True)
class Store:
    """Everything that is kept. Open it with `open_store`.

    Args:
        settings: those it was opened with; `home` is absolute, so another process can open the same store.
        home: the folder that holds everything.
        taxonomy: the ordered classes.
        ledger: the database.
        blobs: bytes of images and overlays.
    """

    settings: RecordsSettings
    home: Home
    taxonomy: Taxonomy
    ledger: Ledger
    blobs: BlobStore

    def portable_settings(self) -> RecordsSettings:
        """Return settings that open this store from any working folder: home and taxonomy file are absolute paths."""
        taxonomy = self.settings.taxonomy
        if taxonomy is not None and Path(taxonomy).is_file():
            taxonomy = str(Path(taxonomy).absolute())
        return self.settings.model_copy(update={"home": self.home.root, "taxonomy": taxonomy})

    def close(self) -> None:
        """Close the connections of the ledger."""
        self.ledger.close()


def open_store(settings: RecordsSettings) -> Store:
    """Open home, taxonomy, ledger (migrated) and blobs.

    Without a taxonomy in the settings, the one that the home remembers is taken. A place that cannot be used raises
    ConfigError; a malformed taxonomy, or another one than the home remembers, TaxonomyError; a database or blob store
    that does not respond UnavailableError.
    """
    # First, since a wrong taxonomy should not leave an empty home behind.
    taxonomy = load_taxonomy(settings.taxonomy or DEFAULT_TAXONOMY)
    home = open_home(settings.home)
    ledger = open_ledger(
        database_url(settings, home),
        durability=settings.durability,
        busy_timeout_s=settings.busy_timeout_s,
        audit=AuditPlaces(settings.audit_key_file or home.keys / "audit-key", head_file(home), settings.audit_anchor),
    )
    with ledger.read() as tx:
        remembered = remembered_taxonomy(tx)
    if settings.taxonomy is None:
        if remembered is not None and remembered.hash == taxonomy.hash and not remembered.context:
            # A home that was begun before the built-in taxonomy named context; the hash does not cover it.
            remembered = remembered.model_copy(update={"context": taxonomy.context})
        taxonomy = remembered or taxonomy
    elif remembered is not None and remembered.hash != taxonomy.hash:
        ledger.close()
        raise _another(taxonomy, remembered)
    open_chain(ledger)
    blobs = open_blobs(settings.blobs or str(home.blobs), sync=settings.durability == "full")
    # Passed to Ray workers, which start in another folder, so the path has to be absolute.
    settings = settings.model_copy(update={"home": home.root})
    if settings.trace_endpoint is not None:
        # Here, since every process that works on a store opens it: replicas, pushes and rounds alike.
        tracing.start(settings.trace_endpoint, settings.trace_share)
    return Store(settings, home, taxonomy, ledger, blobs)


def remembered_taxonomy(tx: Transaction) -> Taxonomy | None:
    """Return the taxonomy of this home's labels; None before the first label."""
    events = tx.find(AuditEvent, where={"action": TAXONOMY_ACTION}, order_by=("-number",), limit=1)
    return Taxonomy.model_validate(events[0].details) if events else None


def remember_taxonomy(tx: Transaction, taxonomy: Taxonomy, *, replaces: bool = False) -> None:
    """Write the home's taxonomy in the transaction that needs it.

    Args:
        tx: a write transaction.
        taxonomy: that of the labels.
        replaces: True lets it take the place of another one, if it has the classes of all labels.
    Raises:
        TaxonomyError: the home remembers another taxonomy, or has labels that this one does not know.
    """
    before = remembered_taxonomy(tx)
    if before == taxonomy:
        return
    if before is not None and before.hash != taxonomy.hash and not replaces:
        raise _another(taxonomy, before)
    labels, choices = TABLES[SourceLabel].c.label, TABLES[Annotation].c.label
    stored = set(tx.connection.scalars(sa.select(labels).distinct()))
    if before is not None:
        # A choice that never was a class is stored and used for nothing.
        used = sa.select(choices).where(choices.in_(before.codes)).distinct()
        stored.update(tx.connection.scalars(used))
    if foreign := sorted(stored - set(taxonomy.codes)):
        raise TaxonomyError(
            f"this home has images labelled {foreign[0]!r}, which is no class of taxonomy {taxonomy.name!r}; "
            "use the taxonomy that they were imported with (records.taxonomy), or another RELOOK_HOME"
        )
    audit.append(
        tx, actor="local", action=TAXONOMY_ACTION, subject=taxonomy.hash, details=taxonomy.model_dump(mode="json")
    )


def _another(taxonomy: Taxonomy, remembered: Taxonomy) -> TaxonomyError:
    # The codes that differ are what a person recognizes; taxonomies of equal codes differ in names, costs or order.
    missing = [code for code in remembered.codes if code not in taxonomy.codes]
    added = [code for code in taxonomy.codes if code not in remembered.codes]
    what = [f"it lacks {', '.join(missing[:5])}"] if missing else []
    what += [f"it adds {', '.join(added[:5])}"] if added else []
    return TaxonomyError(
        f"taxonomy {taxonomy.name!r} ({taxonomy.hash[:12]}) is not that of this home, {remembered.name!r} "
        f"({remembered.hash[:12]}): {' and '.join(what) or 'names, order, costs or key classes differ'}; leave "
        "records.taxonomy out to use the home's, use another RELOOK_HOME, or replace it with `relook taxonomy use FILE`"
    )


def database_url(settings: RecordsSettings, home: Home) -> str | sa.URL:
    """Return the SQLAlchemy URL of the ledger: the one in the settings, or `ledger.db` in the home."""
    return settings.database or sa.URL.create("sqlite", database=str(home.root / "ledger.db"))


def find_images(store: Store, image_ids: Sequence[str]) -> list[Image]:
    """Return the ledger rows of [N] images, in the given order; an unknown id raises UnknownIdError."""
    found: dict[str, Image] = {}
    with store.ledger.read() as tx:
        # In batches: a condition on all ids of a large import at once would be one statement of many megabytes.
        for start in range(0, len(image_ids), _BATCH):
            batch = image_ids[start : start + _BATCH]
            found.update((image.id, image) for image in tx.find(Image, where={"id": batch}))
    absent = next((image_id for image_id in image_ids if image_id not in found), None)
    if absent is not None:
        raise UnknownIdError(f"no image has the id {absent[:12]}; import it first")
    return [found[image_id] for image_id in image_ids]


def read_image(store: Store, image: Image) -> bytes:
    """Return the stored bytes of an image, from the blob store or from where it was imported in place.

    The SHA-256 of the bytes is the image's id. An in-place file that is gone raises DataError, a missing blob
    UnknownIdError, altered bytes IntegrityError.
    """
    # A blob is found by its id, not by the stored URI: the home may have been moved or restored elsewhere since.
    if image.uri.endswith(image.id):
        return store.blobs.get(image.id)
    path = Path(unquote(urlsplit(image.uri).path))
    try:
        data = path.read_bytes()
    except OSError as error:
        # By its id: the message reaches logs and callers who may not know the image's name.
        raise DataError(
            f"image {image.id[:12]} was imported in place and cannot be read ({error.strerror}); put its file back, "
            f"or import the folder again (`relook trace {image.id[:12]}` names the image)"
        ) from error
    if sha256_hex(data) != image.id:
        raise IntegrityError(f"image {image.id[:12]}, imported in place, was altered since")
    return data
