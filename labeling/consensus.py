"""What several readers of one picture together say. A pure function over expert labels."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from records.types import AnswerKind, Confirmation, ExpertLabel, ResolvedLabel


def resolve(labels: Iterable[ExpertLabel], audit_items: Collection[str] = frozenset()) -> list[ResolvedLabel]:
    """Return one resolution per picture, by majority.

    Args:
        labels: all rows that were ever read, in any order, tombstones and old revisions included.
        audit_items: ids of review items that came from the random audit sample and from nothing else.
    Returns:
        Sorted by picture id, one for each picture with at least one answer that still stands. Of each
        reader only the newest answer counts. The label is the class that more than half of those who
        named a class agree on, and empty where there is none: a tie, only `can't tell`, or only
        `other`. Two and more who agree are a consensus.
    """
    by_image: dict[str, list[ExpertLabel]] = defaultdict(list)
    for label in _standing(labels):
        by_image[label.image_id].append(label)
    return [_resolve_one(image_id, by_image[image_id], audit_items) for image_id in sorted(by_image)]


def _standing(labels: Iterable[ExpertLabel]) -> list[ExpertLabel]:
    """Return each reader's newest answer about each picture, without what was deleted."""
    rows = sorted(labels, key=lambda label: (label.created_at, label.id))
    last_row = {(row.server, row.review_item_id, row.annotation_id): row for row in rows}
    alive = sorted(
        (row for row in last_row.values() if not row.deleted),
        key=lambda row: (row.annotated_at, row.created_at, row.id),
    )
    return list({(row.image_id, row.annotator): row for row in alive}.values())


def _resolve_one(image_id: str, standing: list[ExpertLabel], audit_items: Collection[str]) -> ResolvedLabel:
    votes = Counter(row.label for row in standing if row.answer == AnswerKind.CLASS and row.label is not None)
    best, agreeing = votes.most_common(1)[0] if votes else (None, 0)
    decided = agreeing * 2 > votes.total()
    return ResolvedLabel(
        image_id=image_id,
        label=best if decided else None,
        confirmation=Confirmation.CONSENSUS if decided and agreeing > 1 else Confirmation.SINGLE_READER,
        annotators=sorted(row.annotator for row in standing),
        expert_label_ids=sorted(row.id for row in standing),
        from_audit_sample=all(row.review_item_id in audit_items for row in standing),
    )
