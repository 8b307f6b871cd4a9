"""The one transaction that ends an import: images, groups, splits, labels, quarantine, audit event.

In: what was read and decoded. Out: ledger rows, all of them or none. What the ledger knows already stays
as it is, so writing the same import again adds nothing but the audit event.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from images.grouping import NearPair, set_groups, set_splits, write_groups
from images.import_rows import Entry, GroupFacts, Refusal, draw_splits, pick_withheld
from records import audit
from records.erasure import remove_expired_tombstones
from records.ids import hash_of, utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.types import LABEL_RANK, Confirmation, Group, Image, Quarantined, SourceLabel, Split

IMPORT_ACTION = "data.imported"
"""Action of the audit event; its subject is the import's id."""


@dataclass(frozen=True)
class Reading:
    """How a table was read, by which its folder is known again.

    Args:
        table: SHA-256 of the table.
        columns: that were named, what to column.
    """

    table: str
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """What is to be written.

    Args:
        import_id: of the import.
        entries: rows that can be used.
        images: their images, one per entry; two entries may be the same image.
        pairs: near-duplicates.
        refusals: rows that cannot be used.
        withhold_share: share of the train-split groups whose labels are kept back.
        split_salt: setting `records.split_salt`.
        reading: goes into the audit event.
    """

    import_id: str
    entries: Sequence[Entry]
    images: Sequence[Image]
    pairs: Sequence[NearPair]
    refusals: Sequence[Refusal]
    withhold_share: float
    split_salt: str
    reading: Reading


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        new_images: images that the ledger did not know.
        group_of: image id to group id; an image that would have joined two splits is missing.
        split_of: group id to split, of the groups that have one.
        withheld: entries whose label was kept back, one per image.
        quarantined: every row that could not be used, those of earlier runs of the same import included.
        notes: sentences about a given split.
    """

    new_images: int
    group_of: dict[str, str]
    split_of: dict[str, Split]
    withheld: list[Entry]
    quarantined: list[Quarantined]
    notes: list[str]


@dataclass(frozen=True)
class _Label:
    text: str
    confirmation: Confirmation
    source: str


def write_import(tx: Transaction, plan: Plan) -> Written:
    """Write an import.

    Args:
        tx: a write transaction.
        plan: what is to be written.
    Returns:
        What was written.
    """
    new_images, linking = _write_images(tx, plan)
    group_of = _groups_of(tx, plan)
    facts = _facts(plan, group_of)
    split_of, notes = _write_splits(tx, facts, plan.split_salt)
    known = _known_labels(tx)
    conflicts = _conflicts(plan, known)
    withheld = _withheld(plan, facts, group_of, split_of, known)
    skipped = {entry.image_id for entry in withheld} | {image_id for image_id, _ in conflicts}
    _write_labels(tx, plan, known, skipped)
    refusals = [*plan.refusals, *linking, *(refusal for _, refusal in conflicts)]
    quarantined = _write_quarantine(tx, plan.import_id, refusals)
    details = {
        "images": len(group_of), "quarantined": len(quarantined), "withheld": len(withheld),
        "table": plan.reading.table, "columns": dict(plan.reading.columns),
    }  # fmt: skip
    audit.append(tx, actor="local", action=IMPORT_ACTION, subject=plan.import_id, details=details)
    return Written(new_images, group_of, split_of, withheld, quarantined, notes)


def _write_images(tx: Transaction, plan: Plan) -> tuple[int, list[Refusal]]:
    """Write the images that are new, each in its group; name those that would join two splits."""
    remove_expired_tombstones(tx, {image.id for image in plan.images})
    table = TABLES[Image]
    known = dict(tx.connection.execute(sa.select(table.c.id, table.c.group_id)).all())
    first = {image.id: image for image in reversed(plan.images)}
    without_group = sorted(image_id for image_id in first if known.get(image_id) is None)
    placement = write_groups(tx, without_group, plan.images, plan.pairs)
    new = [image for image_id, image in first.items() if image_id not in known]
    tx.add(*(image.model_copy(update={"group_id": placement.group_of.get(image.id)}) for image in new))
    set_groups(tx, {i: group_id for i, group_id in placement.group_of.items() if i in known})
    refusals = [
        Refusal(
            entry.row.source_id,
            "links_two_splits",
            f"{entry.row.source_id} belongs to groups {' and '.join(placement.refused[entry.image_id])}, "
            "which are on two splits of the split",
        )
        for entry in plan.entries
        if entry.image_id in placement.refused
    ]
    return len(new), refusals


def _groups_of(tx: Transaction, plan: Plan) -> dict[str, str]:
    table = TABLES[Image]
    wanted = {image.id for image in plan.images}
    rows = tx.connection.execute(sa.select(table.c.id, table.c.group_id).where(table.c.group_id.is_not(None))).all()
    return {image_id: group_id for image_id, group_id in rows if image_id in wanted}


def _facts(plan: Plan, group_of: Mapping[str, str]) -> dict[str, GroupFacts]:
    """Gather the labelled groups of the import; the first image by id speaks for its group."""
    facts: dict[str, GroupFacts] = {}
    for entry in sorted(plan.entries, key=lambda entry: entry.image_id):
        group_id = group_of.get(entry.image_id)
        if group_id is None or entry.row.label is None:
            continue
        splits = frozenset() if entry.row.split is None else frozenset({entry.row.split})
        before = facts.get(group_id, GroupFacts(entry.row.label, frozenset()))
        facts[group_id] = GroupFacts(before.label, before.splits | splits)
    return facts


def _write_splits(tx: Transaction, facts: Mapping[str, GroupFacts], salt: str) -> tuple[dict[str, Split], list[str]]:
    split_of = {group.id: group.split for group in tx.find(Group) if group.split is not None}
    undrawn = {group_id: fact for group_id, fact in facts.items() if group_id not in split_of}
    drawn, notes = draw_splits(undrawn, is_first=not split_of, salt=salt)
    set_splits(tx, drawn)
    return {**split_of, **{group_id: split for group_id, (split, _) in drawn.items()}}, notes


def _known_labels(tx: Transaction) -> dict[str, list[_Label]]:
    table = TABLES[SourceLabel]
    query = sa.select(table.c.image_id, table.c.label, table.c.confirmation, table.c.source)
    labels: dict[str, list[_Label]] = {}
    for image_id, label, confirmation, source in tx.connection.execute(query):
        labels.setdefault(image_id, []).append(_Label(label, Confirmation(confirmation), source))
    return labels


def _conflicts(plan: Plan, known: Mapping[str, list[_Label]]) -> list[tuple[str, Refusal]]:
    """Name the images that an equally strong label of another import contradicts."""
    conflicts = []
    for entry in plan.entries:
        rank = LABEL_RANK[entry.row.confirmation]
        for label in known.get(entry.image_id, ()):
            if entry.row.label not in (None, label.text) and LABEL_RANK[label.confirmation] == rank:
                reason = f"{entry.row.source_id} is {entry.row.label} here and was imported as {label.text} before"
                conflicts.append((entry.image_id, Refusal(entry.row.source_id, "label_conflict", reason)))
    return conflicts


def _withheld(
    plan: Plan,
    facts: Mapping[str, GroupFacts],
    group_of: Mapping[str, str],
    split_of: Mapping[str, Split],
    known: Mapping[str, list[_Label]],
) -> list[Entry]:
    """Choose the images whose label is kept back; one that the ledger knows already cannot be."""
    train = {group_id: fact.label for group_id, fact in facts.items() if split_of.get(group_id) is Split.TRAIN}
    picked = pick_withheld(train, plan.withhold_share, plan.split_salt)
    withheld = {
        entry.image_id: entry
        for entry in plan.entries
        if entry.row.label is not None and group_of.get(entry.image_id) in picked and entry.image_id not in known
    }
    return list(withheld.values())


def _write_labels(tx: Transaction, plan: Plan, known: Mapping[str, list[_Label]], skipped: set[str]) -> None:
    now, source = utc_now(), f"import:{plan.import_id}"
    labels: dict[str, SourceLabel] = {}
    for entry in plan.entries:
        text, confirmation = entry.row.label, entry.row.confirmation
        if text is None or entry.image_id in skipped:
            continue
        if _Label(text, confirmation, source) in known.get(entry.image_id, ()):
            continue
        key = hash_of([entry.image_id, source, text, confirmation])[:32]
        labels[key] = SourceLabel(
            id=key, image_id=entry.image_id, label=text, confirmation=confirmation, source=source, created_at=now
        )
    tx.add(*labels.values())


def _write_quarantine(tx: Transaction, import_id: str, refusals: Sequence[Refusal]) -> list[Quarantined]:
    now = utc_now()
    rows = {
        key: Quarantined(
            id=key, import_id=import_id, source_id=r.source_id, code=r.code, reason=r.reason, created_at=now
        )
        for r in refusals
        for key in [hash_of([import_id, r.source_id, r.code])[:32]]
    }
    known = {row.id for row in tx.find(Quarantined, where={"import_id": import_id})}
    tx.add(*(row for key, row in rows.items() if key not in known))
    return list(rows.values())
