"""Erasure on request: one register of all that holds an image or a word about the person in it, with its erasers.

    ROWS      tables of the ledger: which rows belong to an image, what of them is blanked, which are deleted
    Place     what lies elsewhere. Blobs, reports, backups and the ledger's file are declared here; decoded pixels,
              tasks and outputs of the demo in the rooms that write them

`erase_images` runs every eraser, always: whether the image is stored, was erased before or never had a row. So an
erasure that was killed is finished by the next one. What stays: a tombstone, the predictions without context, the class
in the manifests of dataset versions (their ids are hashes of all rows), and the audit event. All of them name the image
by its hash only. Loading a dataset version leaves out erased images, so no model is trained on them again.
"""

import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

from records import audit
from records.cases import FILE as CASES_FILE
from records.cases import remove_cases
from records.durable import write_file
from records.errors import RelookError, UnavailableError, UnknownIdError
from records.ids import utc_now
from records.ledger import Transaction
from records.ledger.ledger import reachable
from records.ledger.tables import TABLES, any_of
from records.store import Store
from records.types import (
    TRAINABLE,
    Annotation,
    AuditEvent,
    Consent,
    Cursor,
    DatasetChange,
    EventRecord,
    Flag,
    Image,
    Incident,
    IncidentPrediction,
    ModelRecord,
    Outcome,
    Prediction,
    Quarantined,
    Record,
    ReviewItem,
    ReviewState,
    SourceLabel,
)

PERSONAL = (
    "source_id", "lesion_id", "patient_hash", "age_years", "sex", "localization", "device", "site", "acquired_at",
    "perceptual_hash",
)  # fmt: skip
"""Fields of an image that may point at the person in it."""
ACTION = "image.erased"
BACKUPS = "records.backups"
"""Cursor with the folders that backups were written to."""
ERASED_LIST = "erased.txt"
"""File of a backup with the ids of what was erased since, one a line; `restore` applies it."""
_CHECKPOINT_TRIES, _CHECKPOINT_PAUSE_S = 50, 0.2


@dataclass(frozen=True)
class Rows:
    """What happens to a table's rows that belong to an image.

    Args:
        of: the type, and with it the table.
        by: column that holds the id of the image, or `prediction_id`.
        personal: columns that are blanked when the image expires or is erased, with their blank values.
        also: columns that are blanked only when it is erased.
        deleted: whether an erasure deletes the rows instead.
        impersonal: columns of text or JSON that say nothing about a person, and stay.
    """

    of: type[Record]
    by: str = "image_id"
    personal: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)
    deleted: bool = False
    impersonal: tuple[str, ...] = ()


ROWS: tuple[Rows, ...] = (
    Rows(
        Image, "id", dict.fromkeys(PERSONAL), {"uri": "", "consent": Consent.NONE},
        impersonal=("id", "format", "provenance", "group_id"),
    ),
    Rows(
        Prediction, personal={"context": {}, "context_effect": None}, also={"idempotency_key": None},
        impersonal=(
            "id", "request_id", "caller", "organisation", "image_id", "consent", "model_id", "model_status", "arm",
            "rollout_id", "engine", "precision", "settings_hash", "label", "probabilities", "prediction_set",
            "quality_reason", "decision", "reasons",
        ),
    ),
    Rows(
        ReviewItem, personal={"comment": None, "heat_map": None}, also={"suggested_label": None, "overlay_blob": None},
        impersonal=("id", "prediction_id", "image_id", "reasons", "reader", "sent_hash", "state", "cases", "crop"),
    ),
    Rows(Flag, "prediction_id", {"comment": None}, deleted=True),
    Rows(Outcome, deleted=True),
    Rows(SourceLabel, deleted=True),
    Rows(Annotation, deleted=True),
    Rows(
        EventRecord, "prediction_id", also={"details": {}},
        impersonal=("id", "organisation", "kind", "prediction_id", "source"),
    ),
    Rows(
        Incident, also={"truth": "", "note": None, "evidence": {}, "why": None},
        impersonal=("id", "actor", "prediction_id", "image_id", "model_id", "action", "state", "closed_by", "proof"),
    ),
    Rows(
        IncidentPrediction, also={"truth": None},
        impersonal=("id", "incident_id", "prediction_id", "image_id", "criteria"),
    ),
    Rows(DatasetChange, impersonal=("id", "dataset_id", "image_id")),
)  # fmt: skip
"""Quarantined rows belong to no image id: those that name the image or its lesion are deleted, too."""

_LAST = {"uri", "overlay_blob"}
"""Blanked at the very end: a killed erasure still finds through them what it did not come to."""


@dataclass(frozen=True)
class Place:
    """A place outside the ledger that holds images, or words about the people in them.

    Args:
        name: unique.
        where: its folder in the home, or what else it is.
        holds: what of an image.
        erase: removes what the place holds of images, by their ids, and returns how many things; may be repeated.
    """

    name: str
    where: str
    holds: str
    erase: Callable[[Store, Collection[str]], int]


class Erasure(BaseModel):
    """What an erasure removed."""

    model_config = ConfigDict(frozen=True)

    images: list[str] = Field(description="their ids")
    blobs: int = Field(ge=0, description="images and heat maps removed from the blob store")
    withdrawn: int = Field(ge=0, description="open review items that were withdrawn")
    left_in_place: list[str] = Field(
        description="paths of images that were imported in place; Relook does not delete files it did not write",
    )


def erase_images(
    store: Store,
    image_ids: Sequence[str],
    *,
    actor: str,
    places: Sequence[Place],
    advance: Callable[[int], None] = lambda done: None,
) -> Erasure:
    """Erase images; repeating it finishes what a killed run left and adds no second audit event.

    Args:
        store: its ledger and blobs are changed.
        image_ids: 64 hex characters each.
        actor: who asked for it, for the audit.
        places: all of this program; each eraser runs, also if one before it failed.
        advance: called with the number of images whose rows are erased.
    Returns:
        What was removed.
    Raises:
        UnknownIdError: nothing here has one of the ids; no image is erased then.
        UnavailableError: a place cannot be reached; run it again.
    """
    with store.ledger.read() as tx:
        for image_id in image_ids:
            if tx.get(Image, image_id) is None and not _has_traces(store, tx, image_id):
                raise UnknownIdError(f"no Image has the id {image_id!r}")
    left, withdrawn = [], 0
    # The ledger first: once the tombstone is committed Relook serves the image no more, so a kill before the bytes
    # are deleted leaves nothing that can be read through it.
    for done, image_id in enumerate(image_ids, start=1):
        with store.ledger.begin() as tx:
            image = tx.get(Image, image_id)
            left += [path for path in [_path_in_place(image)] if path is not None]
            withdrawn += bury(tx, image_id, store.blobs.uri(image_id))
            if not tx.count(AuditEvent, where={"action": ACTION, "subject": image_id}, at_most=1):
                audit.append(tx, actor=actor, action=ACTION, subject=image_id)
        advance(done)
    blobs = run_erasers(store, image_ids, places)
    with store.ledger.begin() as tx:
        blank_last(tx, image_ids)
    return Erasure(images=list(image_ids), blobs=blobs, withdrawn=withdrawn, left_in_place=left)


def run_erasers(store: Store, image_ids: Collection[str], places: Sequence[Place]) -> int:
    """Run all erasers for images and return the number of blobs that were removed.

    If erasers fail, the others run all the same and the first error is raised at the end.
    """
    errors: list[RelookError] = []
    blobs = 0
    for place in places:
        try:
            found = place.erase(store, image_ids)
            blobs += found if place is BLOBS else 0
        except RelookError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return blobs


def _path_in_place(image: Image | None) -> str | None:
    """Return the path of a file that was imported in place; a blob's URI ends in its id."""
    if image is None or not image.uri or image.uri.endswith(image.id):
        return None
    return unquote(urlsplit(image.uri).path)


def _has_traces(store: Store, tx: Transaction, image_id: str) -> bool:
    owners = (rows.of for rows in ROWS if rows.by == "image_id")
    return store.blobs.has(image_id) or any(tx.count(one, {"image_id": image_id}, at_most=1) for one in owners)


def bury(tx: Transaction, image_id: str, uri: str) -> int:
    """Make an image a tombstone, in a write transaction: no word about the person stays in the ledger.

    Args:
        tx: of the whole ledger, so that no request writes about the image meanwhile.
        image_id: an image without a row gets one, so that it is not stored when it is sent again.
        uri: of its blob.
    Returns:
        The number of open review items that were withdrawn.
    """
    image = tx.get(Image, image_id)
    if image is None:
        now = utc_now()
        tx.add(
            Image(
                id=image_id, uri=uri, format="none", width_px=1, height_px=1, provenance="erased", created_at=now,
                erased_at=now,
            )
        )  # fmt: skip
    # An image that merely expired could be added again, so its tombstone becomes a permanent one.
    elif not image.is_erased_for_good:
        tx.update(Image, image_id, erased_at=utc_now(), expired_at=None)
    items = TABLES[ReviewItem].c
    withdrawn = tx.connection.execute(
        sa.update(TABLES[ReviewItem])
        .where(items.image_id == image_id, items.state.in_((ReviewState.NEW, ReviewState.PUSHED)))
        .values(state=ReviewState.WITHDRAWN)
    )
    if image is not None:
        delete_quarantined(tx, [name for name in (image.source_id, image.lesion_id) if name])
    for rows in ROWS:
        if rows.deleted:
            tx.connection.execute(sa.delete(TABLES[rows.of]).where(_of_images(tx, rows, [image_id])))
    _blank(tx, [image_id], without=_LAST)
    return withdrawn.rowcount


def blank_last(tx: Transaction, image_ids: Collection[str]) -> None:
    """Blank what the erasers found blobs and files by, when all of them have run."""
    _blank(tx, image_ids, only=_LAST)


def erased_ids(tx: Transaction) -> set[str]:
    """Return the ids of all erased images."""
    images = TABLES[Image].c
    return set(tx.connection.scalars(sa.select(images.id).where(images.erased_at.is_not(None))))


def unusable_ids(tx: Transaction) -> set[str]:
    """Return the ids of images that were erased or whose consent to training was taken back."""
    images = TABLES[Image].c
    lowered = sa.and_(images.consent_lowered_at.is_not(None), images.consent.not_in(TRAINABLE))
    return set(tx.connection.scalars(sa.select(images.id).where(sa.or_(images.erased_at.is_not(None), lowered))))


def blank_personal_fields(tx: Transaction, image_ids: Collection[str]) -> None:
    """Blank what the records say about the people in expired images; ids, predictions and flags stay."""
    for rows in ROWS:
        _update(tx, rows, image_ids, rows.personal)


def remove_expired_tombstones(tx: Transaction, image_ids: Collection[str]) -> None:
    """Remove the tombstones of expired images, so that the caller's write transaction can add them anew.

    The tombstone of an image that was erased on request stays.
    """
    images = TABLES[Image]
    known = any_of(images.c.id, image_ids, tx.connection.dialect)
    tx.connection.execute(sa.delete(images).where(known, images.c.expired_at.is_not(None)))


def _blank(
    tx: Transaction, image_ids: Collection[str], *, only: Collection[str] = (), without: Collection[str] = ()
) -> None:
    for rows in ROWS:
        values = {**rows.personal, **rows.also} if not rows.deleted else {}
        _update(tx, rows, image_ids, {n: v for n, v in values.items() if n not in without and (not only or n in only)})


def _update(tx: Transaction, rows: Rows, image_ids: Collection[str], values: Mapping[str, Any]) -> None:
    # In SQL, since the record types declare most of these fields immutable.
    if values:
        tx.connection.execute(sa.update(TABLES[rows.of]).where(_of_images(tx, rows, image_ids)).values(**values))


def _of_images(tx: Transaction, rows: Rows, image_ids: Collection[str]) -> sa.ColumnElement[bool]:
    column, dialect = TABLES[rows.of].c[rows.by], tx.connection.dialect
    if rows.by != "prediction_id":
        return any_of(column, image_ids, dialect)
    predictions = TABLES[Prediction].c
    return column.in_(sa.select(predictions.id).where(any_of(predictions.image_id, image_ids, dialect)))


def delete_quarantined(tx: Transaction, names: Collection[str]) -> list[str]:
    """Delete the quarantined rows that name one of these images or lesions, and return their ids."""
    if not names:
        return []
    table = TABLES[Quarantined]
    said = re.compile("|".join(rf"(?<![\w-]){re.escape(name)}(?![\w-])" for name in names))
    mentions = [
        column.contains(name, autoescape=True) for name in names for column in (table.c.source_id, table.c.reason)
    ]
    found = tx.connection.execute(sa.select(table.c.id, table.c.source_id, table.c.reason).where(sa.or_(*mentions)))
    ids = [row.id for row in found if said.search(f"{row.source_id}\n{row.reason}")]
    delete_quarantined_rows(tx, ids)
    return ids


def delete_quarantined_rows(tx: Transaction, ids: Collection[str]) -> None:
    """Delete quarantined rows by their ids."""
    table = TABLES[Quarantined]
    tx.connection.execute(sa.delete(table).where(any_of(table.c.id, ids, tx.connection.dialect)))


# ---------------------------------------------------------------- places


def _erase_blobs(store: Store, image_ids: Collection[str]) -> int:
    """Delete images and the heat maps over them."""
    items = TABLES[ReviewItem].c
    with store.ledger.read() as tx:
        mine = any_of(items.image_id, image_ids, tx.connection.dialect)
        overlays = set(
            tx.connection.scalars(sa.select(items.overlay_blob).where(mine, items.overlay_blob.is_not(None)))
        )
    # The image's own id always: an image that was imported in place may have been sent over HTTP, too.
    found = [blob_id for blob_id in {*image_ids, *overlays} if store.blobs.has(blob_id)]
    for blob_id in found:
        store.blobs.delete(blob_id)
    return len(found)


_PIXELS_IN_HTML = re.compile(r"<img\b[^>]*\bsrc=\"data:image/(?!svg)[^>]*>", re.IGNORECASE)


def without_images(html: str) -> str:
    """Return a report without embedded images; drawn figures (SVG) stay."""
    return _PIXELS_IN_HTML.sub("<i>removed</i>", html)


def reports(store: Store) -> Iterator[Path]:
    """Yield the HTML reports of the home."""
    for folder in (store.home.bundles, store.home.runs):
        yield from sorted(folder.rglob("*.html"))


def _erase_reports(store: Store, image_ids: Collection[str]) -> int:
    """Remove images from reports: whose they are cannot be told from them."""
    changed = 0
    for path in reports(store):
        html = path.read_text(encoding="utf-8", errors="surrogateescape")
        if (kept := without_images(html)) != html:
            write_file(path, kept.encode(errors="surrogateescape"))
            changed += 1
    return changed


def _erase_cases(store: Store, image_ids: Collection[str]) -> int:
    """Take images out of the confirmed cases of all bundles, also of those that lie outside the home."""
    with store.ledger.read() as tx:
        outside = {Path(model.path) for model in tx.find(ModelRecord)}
    folders = {path.parent for path in store.home.bundles.glob(f"*/{CASES_FILE}")} | outside
    return sum(remove_cases(folder, set(image_ids)) for folder in sorted(folders))


EVENT_IMAGES = "tensorboard/images"
"""Folder in a run's, with images in the event files of TensorBoard."""
SHOWN_IMAGES = "shown.json"
"""In that folder: the ids of the images that its files show."""


def _erase_event_images(store: Store, image_ids: Collection[str]) -> int:
    """Remove the images of each run that shows one of these: a single one cannot be taken out of an event file."""
    removed = 0
    for folder in sorted(store.home.runs.rglob(EVENT_IMAGES)):
        shown = folder / SHOWN_IMAGES
        if not shown.is_file() or any(image_id in shown.read_text() for image_id in image_ids):
            shutil.rmtree(folder)
            removed += 1
    return removed


def note_in_backups(store: Store, ids: Collection[str]) -> int:
    """Add images, or quarantined rows, to the list of every backup that can be reached; a backup itself never changes.

    Both are named by hashes. UnavailableError is raised if a list cannot be written.
    """
    with store.ledger.read() as tx:
        cursor = tx.get(Cursor, BACKUPS)
    noted = 0
    for folder in map(Path, cursor.position["folders"] if cursor is not None else ()):
        if not folder.is_dir():
            continue
        try:
            missing = sorted(set(ids) - read_erased(folder / ERASED_LIST))
            if missing:
                with (folder / ERASED_LIST).open("a") as file:
                    file.write("".join(f"{one}\n" for one in missing))
        except OSError as error:
            raise UnavailableError(
                f"{folder / ERASED_LIST} cannot be written ({error.strerror}); make the backup's folder writable, or "
                "delete the backup, and erase again"
            ) from error
        noted += len(missing)
    return noted


def read_erased(path: Path) -> set[str]:
    """Return the ids in a list of erased images and quarantined rows; a missing file is an empty list."""
    return set(re.findall(r"\b(?:[0-9a-f]{32}){1,2}\b", path.read_text())) if path.is_file() else set()


def _rewrite_file(store: Store, image_ids: Collection[str]) -> int:
    """Rewrite SQLite's file and empty its log: both still hold rows as they were, in space that is free."""
    if store.ledger.engine.dialect.name != "sqlite":
        return 0
    with reachable(store.ledger.url), store.ledger.engine.connect() as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        try:
            # `secure_delete` would not do: it leaves copies of rows that SQLite moved between pages.
            raw.execute("VACUUM")
            # A reader of an older view keeps the log from being emptied, for as long as its transaction takes.
            for _ in range(_CHECKPOINT_TRIES):
                if raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0:
                    return 1
                time.sleep(_CHECKPOINT_PAUSE_S)
        except sqlite3.OperationalError as error:
            raise UnavailableError(f"the ledger's file cannot be rewritten ({error}); erase again") from error
    raise UnavailableError("the ledger's log cannot be emptied while somebody reads the ledger; erase again")


BLOBS = Place("blobs", "blobs", "images, and heat maps over them", _erase_blobs)
RECORDS_PLACES: tuple[Place, ...] = (
    BLOBS,
    Place("reports", "bundles, runs", "images that a report embeds; Relook itself writes none there", _erase_reports),
    Place("confirmed cases", "bundles", "features and classes of images shown beside predictions", _erase_cases),
    Place("event files", "runs", "images that TensorBoard shows of a training", _erase_event_images),
    Place("backups", "folders of `relook backup`", "all of it, as it was", note_in_backups),
    Place("ledger file", "ledger.db", "rows as they were before", _rewrite_file),
)
