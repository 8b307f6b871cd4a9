"""Retention: served images and predictions older than the configured number of days are deleted.

An image is deleted as on erasure, with heat maps and personal data; a tombstone stays, so that its predictions keep
their reference. Images with an open review item, a label or an outcome, images in a dataset version and those of an
open incident or the regression set are kept, whatever their age, so that no version, figure or replay changes. Each
run writes one audit event.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pyarrow.compute as pc
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

from records import audit
from records.datasets import read_manifest
from records.erasure import blank_personal_fields
from records.lease import hold
from records.ledger import Transaction
from records.ledger.tables import TABLES, any_of, unindexed
from records.store import Store
from records.types import (
    Annotation,
    Cursor,
    DatasetRecord,
    EventRecord,
    Flag,
    Image,
    Incident,
    IncidentPrediction,
    IncidentState,
    Outcome,
    Prediction,
    ReviewItem,
    ReviewState,
    SourceLabel,
)

ACTION = "retention.applied"
"""Action of the audit event; its details are the report."""

_NAME = "records.retention"
# Per transaction, which blocks other writers; images take longer, since their blobs are deleted in it.
_IMAGES_AT_ONCE, _PREDICTIONS_AT_ONCE = 100, 1000
_DELETERS = 16
_UNNAMED_FOR = timedelta(days=7)
_OPEN = (ReviewState.NEW, ReviewState.PUSHED)
_IMAGE, _PREDICTION, _ITEM = TABLES[Image].c, TABLES[Prediction].c, TABLES[ReviewItem].c
_HAS_MAP = sa.or_(_ITEM.heat_map.is_not(None), _ITEM.overlay_blob.is_not(None))


class Retention(BaseModel):
    """What is due, or what a run deleted."""

    model_config = ConfigDict(frozen=True)

    images_before: datetime | None = Field(description="last sent before this; empty: images are kept")
    predictions_before: datetime | None = Field(description="made before this; empty: predictions are kept")
    images: int = Field(default=0, ge=0)
    overlays: int = Field(default=0, ge=0, description="heat maps over those images")
    predictions: int = Field(default=0, ge=0)
    images_needed: int = Field(default=0, ge=0, description="as old, and kept since they are still needed")
    predictions_needed: int = Field(default=0, ge=0, description="as old, and kept since something refers to them")


def find_due(store: Store, now: datetime | None = None) -> Retention:
    """Return what a run would delete; nothing is written.

    Args:
        store: its settings say how long to keep what.
        now: the time to count from; default: the present.
    Returns:
        The counts.
    Raises:
        IntegrityError: the manifest of a dataset version is missing, so the images in it are unknown.
    """
    limits = _limits(store, now or _now(store))
    due = _due_images(store, limits.images_before)
    with store.ledger.read() as tx:
        overlays = sum(
            _count(tx, _ITEM.id, any_of(_ITEM.image_id, part, tx.connection.dialect), _HAS_MAP)
            for part in _parts(due, _PREDICTIONS_AT_ONCE)
        )
        old = _count(tx, _IMAGE.id, *_old_images(limits.images_before)) if limits.images_before else 0
        before = limits.predictions_before
        predictions = _count(tx, _PREDICTION.id, *_due_predictions(before)) if before else 0
        old_predictions = _count(tx, _PREDICTION.id, _PREDICTION.created_at < before) if before else 0
    return limits.model_copy(
        update={
            "images": len(due),
            "overlays": overlays,
            "predictions": predictions,
            "images_needed": old - len(due),
            "predictions_needed": old_predictions - predictions,
        }
    )


def apply_retention(
    store: Store,
    *,
    actor: str,
    forget: Callable[[Sequence[str]], object],
    advance: Callable[[int, int], None] = lambda done, total: None,
    now: datetime | None = None,
) -> Retention:
    """Delete what is due. What a killed run left is due again, and that run gets its audit event first.

    Args:
        store: its ledger and blobs are changed.
        actor: who asked for it, for the audit.
        forget: removes other copies of images on this machine, by their ids.
        advance: called with the number of images and predictions done, and their total.
        now: the time to count from; default: the present.
    Returns:
        What was deleted.
    Raises:
        RefusedError: another run is in progress.
        IntegrityError: the manifest of a dataset version is missing; nothing was deleted.
        UnavailableError: a blob cannot be removed; run it again.
    """
    now = now or _now(store)
    # One run at a time: the cursor holds the counts of a single run.
    with hold(store.ledger, _NAME):
        with store.ledger.begin() as tx:
            _close(tx, actor, finished=False)
        planned = find_due(store, now)
        if planned.images_before is None and planned.predictions_before is None:
            return planned
        needed = planned.model_dump(include={"images_needed", "predictions_needed"})
        # The counts of what stays are known now; those of what goes are added up while it goes.
        run = _Run(store, _limits(store, now).model_copy(update=needed), forget, now)
        run.begin()
        total, done = planned.images + planned.predictions, 0
        for number in run.batches():
            done += number
            advance(min(done, total), total)
        with store.ledger.begin() as tx:
            _close(tx, actor, finished=True)
    return run.deleted


def remove_unnamed_blobs(store: Store, now: datetime | None = None) -> int:
    """Delete blobs that no row names, older than a week, and return their number; UnavailableError if one cannot be.

    A process that is killed between storing an image or a heat map and writing its row leaves such a blob, which no
    erasure would find. A week, since an import stores its images long before it writes their rows.
    """
    old = set(store.blobs.ids(before=(now or _now(store)) - _UNNAMED_FOR))
    with store.ledger.read() as tx:
        for column in (_IMAGE.id, _ITEM.overlay_blob):
            old -= set(tx.connection.scalars(sa.select(column).where(column.is_not(None))))
    for blob_id in old:
        store.blobs.delete(blob_id)
    return len(old)


@dataclass
class _Run:
    """One run. Its counts are kept in a cursor, which is updated in the transactions that delete."""

    store: Store
    deleted: Retention
    forget: Callable[[Sequence[str]], object]
    now: datetime

    def begin(self) -> None:
        """Create the cursor."""
        with self.store.ledger.begin() as tx:
            if tx.get(Cursor, _NAME) is None:
                tx.add(Cursor(name=_NAME, position={}))
            self._keep(tx)

    def batches(self) -> Iterator[int]:
        """Delete batch by batch and yield how many rows each batch examined."""
        images_before, predictions_before = self.deleted.images_before, self.deleted.predictions_before
        for part in _parts(_due_images(self.store, images_before), _IMAGES_AT_ONCE):
            with self.store.ledger.begin() as tx:
                self._expire(tx, part, images_before)
            yield len(part)
        for part in _pages_of_predictions(self.store, predictions_before):
            with self.store.ledger.begin() as tx:
                # Due is checked again in the transaction that deletes: a flag may have come in since the page was read.
                mine = any_of(_PREDICTION.id, part, tx.connection.dialect)
                gone = tx.connection.execute(
                    sa.delete(TABLES[Prediction]).where(mine, *_due_predictions(predictions_before))
                )
                self._count(tx, predictions=gone.rowcount)
            yield len(part)

    def _expire(self, tx: Transaction, part: Sequence[str], before: datetime | None) -> None:
        """Delete the images of a batch that are still due."""
        dialect = tx.connection.dialect
        due = [any_of(_IMAGE.id, part, dialect), *_old_images(before, dialect), *_unreferenced(_IMAGE.id)]
        ids = list(tx.connection.scalars(sa.select(_IMAGE.id).where(*due)))
        asked = any_of(_ITEM.image_id, ids, dialect)
        maps = _count(tx, _ITEM.id, asked, _HAS_MAP)
        overlays = list(
            tx.connection.scalars(sa.select(_ITEM.overlay_blob).where(asked, _ITEM.overlay_blob.is_not(None)))
        )
        blank_personal_fields(tx, ids)
        gone = {"erased_at": self.now, "expired_at": self.now}
        tx.connection.execute(sa.update(TABLES[Image]).where(any_of(_IMAGE.id, ids, dialect)).values(gone))
        tx.connection.execute(sa.update(TABLES[ReviewItem]).where(asked).values(overlay_blob=None))
        self._count(tx, images=len(ids), overlays=maps)
        # Bytes are deleted before the commit: after a kill the rows are due again, and no row claims that bytes are
        # gone while they still exist. Writers are serialized, so an image that is added again comes after this.
        self.forget(ids)
        with ThreadPoolExecutor(_DELETERS) as pool:
            list(pool.map(self.store.blobs.delete, [*ids, *overlays]))

    def _count(self, tx: Transaction, **more: int) -> None:
        summed = {name: getattr(self.deleted, name) + number for name, number in more.items()}
        self.deleted = self.deleted.model_copy(update=summed)
        self._keep(tx)

    def _keep(self, tx: Transaction) -> None:
        tx.update(Cursor, _NAME, position=self.deleted.model_dump(mode="json"))


def _close(tx: Transaction, actor: str, *, finished: bool) -> None:
    """Write the audit event of the run that the cursor describes, if there is one, and empty the cursor."""
    cursor = tx.get(Cursor, _NAME)
    if cursor is None or not cursor.position:
        return
    details = {**cursor.position, "finished": finished}
    audit.append(tx, actor=actor, action=ACTION, subject="served images and predictions", details=details)
    tx.update(Cursor, _NAME, position={})


def _now(store: Store) -> datetime:
    with store.ledger.read() as tx:
        return tx.now()


def _limits(store: Store, now: datetime) -> Retention:
    days = store.settings.keep_images_days, store.settings.keep_predictions_days
    images, predictions = (None if number is None else now - timedelta(days=number) for number in days)
    return Retention(images_before=images, predictions_before=predictions)


def _due_images(store: Store, before: datetime | None) -> list[str]:
    """Return the ids of images that are due, sorted."""
    if before is None:
        return []
    query = sa.select(_IMAGE.id).where(*_old_images(before), *_unreferenced(_IMAGE.id)).order_by(_IMAGE.id)
    with store.ledger.read() as tx:
        found = list(tx.connection.scalars(query))
        datasets = tx.find(DatasetRecord) if found else []
    # An image in a version has a label and is kept for that; this second check protects it if the label row is lost.
    used: set[str] = set()
    for dataset in datasets:
        rows = read_manifest(store, dataset.id, filters=pc.field("image_id").isin(found))
        used.update(rows["image_id"].to_pylist())
    return [image_id for image_id in found if image_id not in used]


def _pages_of_predictions(store: Store, before: datetime | None) -> Iterator[list[str]]:
    """Yield the ids of predictions that are due, oldest first, in pages; each is read in a view of its own."""
    if before is None:
        return
    # By time, whose index leads to the old ones; by id alone, every page would look for them among all rows.
    place = _PREDICTION.created_at, _PREDICTION.id
    query = sa.select(*place).where(*_due_predictions(before)).order_by(*place).limit(_PREDICTIONS_AT_ONCE)
    page: Sequence[Any] = ()
    while True:
        later = (
            [sa.tuple_(*place) > sa.tuple_(*map(sa.literal, page[-1], (place[0].type, place[1].type)))] if page else []
        )
        with store.ledger.read() as tx:
            page = tx.connection.execute(query.where(*later)).all()
        if not page:
            return
        yield [row.id for row in page]


def _old_images(before: datetime | None, named: sa.Dialect | None = None) -> list[sa.ColumnElement[bool]]:
    """Return the conditions that an image was served long ago; `named` if other conditions say which images."""
    provenance = _IMAGE.provenance if named is None else unindexed(_IMAGE.provenance, named)
    sent_since = sa.exists().where(_PREDICTION.image_id == _IMAGE.id, _PREDICTION.created_at >= before)
    return [provenance == "served", _IMAGE.erased_at.is_(None), _IMAGE.created_at < before, ~sent_since]


def _due_predictions(before: datetime | None) -> list[sa.ColumnElement[bool]]:
    # Events refer to their prediction, so a prediction that has events stays.
    kinds = (Flag, Outcome, EventRecord)
    named = [sa.exists().where(TABLES[kind].c.prediction_id == _PREDICTION.id) for kind in kinds]
    return [
        _PREDICTION.created_at < before,
        *(~condition for condition in named),
        *_unreferenced(_PREDICTION.image_id),
    ]


def _unreferenced(image_id: sa.Column[Any]) -> list[sa.ColumnElement[bool]]:
    """Return the conditions that an image has no open review item, label or outcome, and no incident needs it."""
    # `exists` stops at the first row and uses the index on the image.
    is_open = sa.exists().where(_ITEM.image_id == image_id, _ITEM.state.in_(_OPEN))
    kinds = (SourceLabel, Annotation, Outcome)
    labelled = [sa.exists().where(TABLES[kind].c.image_id == image_id) for kind in kinds]
    rows, opened = TABLES[IncidentPrediction].c, TABLES[Incident].c
    is_examined = rows.incident_id.in_(sa.select(opened.id).where(opened.state == IncidentState.OPEN))
    of_incident = sa.exists().where(rows.image_id == image_id, sa.or_(rows.truth.is_not(None), is_examined))
    return [~is_open, *(~condition for condition in labelled), ~of_incident]


def _count(tx: Transaction, column: sa.Column[Any], *conditions: sa.ColumnElement[bool]) -> int:
    return int(tx.connection.execute(sa.select(sa.func.count(column)).where(*conditions)).scalar_one())


def _parts(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    yield from (ids[at : at + size] for at in range(0, len(ids), size))
