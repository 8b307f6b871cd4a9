"""Who reads a question, and whether its task still says what the question is.

Some questions are blind: all of the random audit sample, since labels for an evaluation must not lean on
the model (a drawn image that is urgent or flagged is read once more for that), and a share of the
others, which shows how much the model's opinion draws its readers. A blind question goes to a project
of its own. Nothing here calls a server.
"""

import sqlalchemy as sa

from labeling.consensus import contested
from labeling.settings import LabelingSettings
from records.ids import hash_of, utc_now
from records.ledger.tables import TABLES
from records.store import Store
from records.types import Annotation, ReasonCode, ReviewItem, ReviewState

_ADJUDICATION_PRIORITY = 150.0
"""Between flags and referrals: two people have spent their time already."""
_SEVERAL = frozenset({ReasonCode.URGENT, ReasonCode.FLAGGED})


def plan_reads(store: Store, settings: LabelingSettings) -> int:
    """Decide which of the waiting questions are blind and whose they are, and add further reads.

    Args:
        store: with the outbox.
        settings: the share, the readers and the number of reads.
    Returns:
        How many further reads were added. What was decided once stays; calling again adds nothing.
    """
    added = 0
    with store.ledger.begin() as tx:
        for item in tx.find(ReviewItem, where={"state": ReviewState.NEW, "blind": False}, order_by=("id",)):
            if is_blind(item, settings.blind_share):
                tx.update(ReviewItem, item.id, blind=True, reader=_reader(item.id, settings.readers))
            for read in _further_reads(item, settings):
                if tx.get(ReviewItem, read.id) is None:
                    tx.add(read)
                    added += 1
    return added


def is_blind(item: ReviewItem, share: float) -> bool:
    """Return whether a question is asked without the model's opinion.

    Args:
        item: a question.
        share: setting `labeling.blind_share`.
    Returns:
        True for the audit sample, and for a share of the others that their ids decide; never for an urgent
        or a flagged one, whose reader should see everything. If such a one was drawn, it has a blind read beside it.
    """
    if not _SEVERAL.isdisjoint(item.reasons) or ReasonCode.ADJUDICATION in item.reasons:
        return False
    return ReasonCode.AUDIT_SAMPLE in item.reasons or _fraction(item.id) < share


def add_adjudications(store: Store, threshold: float) -> int:
    """Write a question about each image whose readers agree too little.

    Args:
        store: with the answers.
        threshold: setting `labeling.adjudicate_below`.
    Returns:
        How many were written. An image that has been asked about is not asked again, whatever came of it.
    """
    with store.ledger.begin() as tx:
        disputed = contested(tx.find(Annotation, order_by=("created_at", "id")), threshold)
        questions = [_adjudication(tx.require(ReviewItem, rows[-1].review_item_id)) for rows in disputed.values()]
        known = {item.id for item in tx.find(ReviewItem, where={"id": [question.id for question in questions]})}
        fresh = [question for question in questions if question.id not in known]
        tx.add(*fresh)
    return len(fresh)


def content_hash(item: ReviewItem) -> str:
    """Return what tells apart two states of a question that its task has to show."""
    return _content_hash(item.priority, [reason.value for reason in item.reasons], item.comment, item.suggested_label)


def stale_items(store: Store) -> list[ReviewItem]:
    """Return the open questions whose task says something else than they do now."""
    table = TABLES[ReviewItem].c
    columns = (table.id, table.priority, table.reasons, table.comment, table.suggested_label, table.sent_hash)
    query = sa.select(*columns).where(table.state == ReviewState.PUSHED, table.sent_hash.is_not(None))
    with store.ledger.read() as tx:
        rows = tx.connection.execute(query).all()
        ids = [row[0] for row in rows if _content_hash(*row[1:5]) != row[5]]
        return tx.find(ReviewItem, where={"id": ids}, order_by=("-priority", "id")) if ids else []


def _content_hash(priority: float, reasons: list[str], comment: str | None, suggested: str | None) -> str:
    return hash_of([priority, [str(reason) for reason in reasons], comment, suggested])[:16]


def _further_reads(item: ReviewItem, settings: LabelingSettings) -> list[ReviewItem]:
    if _SEVERAL.isdisjoint(item.reasons):
        return []
    wanted = min(settings.reads_per_item - 1, len(settings.readers))
    first = int(_fraction(item.id) * len(settings.readers))
    readers: list[str | None] = [settings.readers[(first + n) % len(settings.readers)] for n in range(wanted)]
    if not readers and ReasonCode.AUDIT_SAMPLE in item.reasons:
        readers = [_reader(item.id, settings.readers)]
    changes = {"prediction_id": None, "comment": None, "suggested_label": None, "blind": True, "overlay_blob": None}
    # The id follows from question and reader, so that no read is ever added twice.
    return [item.model_copy(update={**changes, "id": hash_of([item.id, r])[:32], "reader": r}) for r in readers]


def _reader(item_id: str, readers: tuple[str, ...]) -> str | None:
    return readers[int(_fraction(item_id) * 997) % len(readers)] if readers else None


def _fraction(item_id: str) -> float:
    """Return a number in [0, 1) that only the id decides."""
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
    )
