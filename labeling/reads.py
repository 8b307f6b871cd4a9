"""Which reads a review item gets: blind or with the prediction, further reads, adjudications, and refreshed tasks.

Items of the random audit sample are read blind, since labels for an evaluation must not depend on the model. If such
an item is also urgent or flagged, it gets a second, blind read. A share of the other items is blind as well, which
measures how far the prediction influences its readers. Gold tasks join the blind ones. This module writes to the
ledger and calls no server.
"""

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa

from labeling.cases import TAKEN_OUT
from labeling.consensus import contested
from labeling.gold import add_gold
from labeling.settings import LabelingSettings
from records.ids import hash_of, utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES, any_of
from records.store import Store
from records.types import Annotation, ReasonCode, ReviewItem, ReviewState

_ADJUDICATION_PRIORITY = 150.0
"""Below flags and above referrals: two people have spent time on the image already."""
CURRENT = "current"
"""The `sent_hash` of a review item whose task shows it as it is; older releases stored a hash instead."""
CHANGED = "changed"
"""The `sent_hash` of one that changed since: a trigger of the database writes it, whatever statement changed it."""
ADOPTED = "adopted"
"""The `sent_hash` of one whose task an earlier push imported without recording it: nobody knows what it shows."""
STALE = (CHANGED, ADOPTED, TAKEN_OUT)
_ROWS_AT_ONCE = 10_000  # that are read
_ITEMS_AT_ONCE = 1000  # in a transaction that writes
_SEVERAL = frozenset({ReasonCode.URGENT, ReasonCode.FLAGGED, ReasonCode.INCIDENT})


def plan_reads(store: Store, settings: LabelingSettings) -> int:
    """Decide which waiting review items are blind and whose they are, and add further reads; returns their number."""
    table = TABLES[ReviewItem].c
    query = sa.select(table.id, table.reasons).where(table.state == ReviewState.NEW, table.blind.is_(False))
    with store.ledger.read() as tx:
        rows = tx.connection.execute(query.execution_options(yield_per=_ROWS_AT_ONCE))
        wanted = sorted(row.id for row in rows if _needs_a_plan(row.id, row.reasons, settings))
    added = 0
    # Every choice follows from the item's id, so a push that was killed half-way decides the same the next time.
    for start in range(0, len(wanted), _ITEMS_AT_ONCE):
        ids = wanted[start : start + _ITEMS_AT_ONCE]
        with store.ledger.begin() as tx:
            where = {"id": ids, "state": ReviewState.NEW, "blind": False}
            items = tx.find(ReviewItem, where=where, order_by=("id",))
            blind = [item for item in items if is_blind(item, settings.blind_share)]
            changes = {item.id: {"blind": True, "reader": _reader(item.id, settings.readers)} for item in blind}
            tx.update_many(ReviewItem, changes)
            further = {read.id: read for item in items for read in _further_reads(item, settings)}
            known = {item.id for item in tx.find(ReviewItem, where={"id": list(further)})} if further else set()
            tx.add(*(read for read in further.values() if read.id not in known))
            added += len(further) - len(known)
    if settings.gold_share > 0:
        with store.ledger.begin() as tx:
            added += add_gold(tx, settings.gold_share)
    return added


def _needs_a_plan(item_id: str, reasons: Collection[str], settings: LabelingSettings) -> bool:
    return _is_blind(item_id, reasons, settings.blind_share) or not _SEVERAL.isdisjoint(reasons)


def is_blind(item: ReviewItem, share: float) -> bool:
    """Return whether a review item is read without the model's prediction.

    Args:
        item: a review item.
        share: setting `labeling.blind_share`.
    Returns:
        True for the audit sample, and for the given share of the other items, chosen by their ids.
    """
    return _is_blind(item.id, item.reasons, share)


def _is_blind(item_id: str, reasons: Collection[str], share: float) -> bool:
    # A person decides about a patient here, or between two annotators, and should see all that is known. An audit
    # sample among these items gets its blind read from `_further_reads`.
    if not _SEVERAL.isdisjoint(reasons) or ReasonCode.ADJUDICATION in reasons:
        return False
    return ReasonCode.AUDIT_SAMPLE in reasons or (share > 0 and _fraction(item_id) < share)


def add_adjudications(store: Store, threshold: float) -> int:
    """Add a review item for each image whose annotators agree less than the threshold, at most once per image.

    Args:
        store: its ledger holds the annotations.
        threshold: setting `labeling.adjudicate_below`.
    Returns:
        How many were added.
    """
    with store.ledger.begin() as tx:
        said = tx.find(Annotation, where={"gold": False}, order_by=("created_at", "id"))
        disputed = contested(said, threshold)
        about = {rows[-1].review_item_id for rows in disputed.values()}
        wanted = [_adjudication(item) for item in tx.find(ReviewItem, where={"id": about}, order_by=("id",))]
        # The id follows from the image. Annotators who still disagree after an adjudication cause no second one.
        known = {item.id for item in tx.find(ReviewItem, where={"id": [item.id for item in wanted]})}
        fresh = [item for item in wanted if item.id not in known]
        tx.add(*fresh)
    return len(fresh)


def stale_items(store: Store) -> list[ReviewItem]:
    """Return the review items whose open task shows something else, or nobody knows what, the most urgent first."""
    with store.ledger.read() as tx:
        found = tx.find(ReviewItem, where={"state": ReviewState.PUSHED, "sent_hash": STALE})
    # Sorted here: to have them in order, SQLite would read all open items in the order of another index.
    return sorted(found, key=lambda item: (-item.priority, item.id))


def note_sent(tx: Transaction, changes: Mapping[str, dict[str, Any]], sent: Collection[ReviewItem]) -> None:
    """Record that tasks show what their items are about.

    Args:
        tx: a write transaction.
        changes: further changes by item id.
        sent: the items, as they were when their tasks were made; those that changed since are marked.
    """
    items = TABLES[ReviewItem].c
    query = sa.select(items.id, items.priority, items.reasons, items.comment, items.suggested_label)
    mine = any_of(items.id, [item.id for item in sent], tx.connection.dialect)
    now = {row[0]: tuple(row[1:]) for row in tx.connection.execute(query.where(mine))}
    marks = {item.id: CURRENT if now.get(item.id) == _shown(item) else CHANGED for item in sent}
    tx.update_many(ReviewItem, {item.id: {**changes.get(item.id, {}), "sent_hash": marks[item.id]} for item in sent})


def _shown(item: ReviewItem) -> tuple[float, list[str], str | None, str | None]:
    """Return what a task shows of its review item; the trigger `mark_changed_task` watches the same columns."""
    return item.priority, [reason.value for reason in item.reasons], item.comment, item.suggested_label


def _further_reads(item: ReviewItem, settings: LabelingSettings) -> list[ReviewItem]:
    if _SEVERAL.isdisjoint(item.reasons):
        return []
    wanted = min(settings.reads_per_item - 1, len(settings.readers))
    # Starts at a reader that the id chooses and goes round, so that the work is shared evenly and nobody reads twice.
    first = int(_fraction(item.id) * len(settings.readers))
    readers: list[str | None] = [settings.readers[(first + n) % len(settings.readers)] for n in range(wanted)]
    if not readers and ReasonCode.AUDIT_SAMPLE in item.reasons:
        readers = [_reader(item.id, settings.readers)]
    changes = {"prediction_id": None, "comment": None, "suggested_label": None, "blind": True}
    changes |= {"overlay_blob": None, "heat_map": None, "cases": None}
    # The id follows from item and reader, so that a read is never added twice.
    return [item.model_copy(update={**changes, "id": hash_of([item.id, r])[:32], "reader": r}) for r in readers]


def _reader(item_id: str, readers: tuple[str, ...]) -> str | None:
    # Not the fraction itself: blind items are those with a small one, and all of them would get the first reader.
    return readers[int(_fraction(item_id) * 997) % len(readers)] if readers else None


def _fraction(item_id: str) -> float:
    """Return a number in [0, 1) that depends on the id alone."""
    return int(hash_of(["blind", item_id])[:8], 16) / 16**8


def _adjudication(about: ReviewItem) -> ReviewItem:
    return ReviewItem(
        id=hash_of(["adjudication", about.image_id])[:32],
        created_at=utc_now(),
        prediction_id=about.prediction_id,
        image_id=about.image_id,
        reasons=[ReasonCode.ADJUDICATION],
        priority=_ADJUDICATION_PRIORITY,
        overlay_blob=about.overlay_blob,
        heat_map=about.heat_map,
        crop=about.crop,
    )
