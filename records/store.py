"""The store: home, taxonomy, ledger and blobs, opened together and passed to every room."""

from dataclasses import dataclass

import sqlalchemy as sa

from records.audit import head_file, open_chain
from records.blobs import BlobStore, open_blobs
from records.home import Home, open_home
from records.ledger import Ledger, open_ledger
from records.settings import RecordsSettings
from records.taxonomy import Taxonomy, load_taxonomy


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
