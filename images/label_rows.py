"""The label rows of an import: what is stored, what contradicts an earlier row, and what corrects one.

Rows are never changed. A correction is a further row, whose source says that the earlier imported rows of its image no
longer count; see `records.labelled.counting`.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import sqlalchemy as sa

from records.ids import hash_of, utc_now
from records.labelled import correction_number, counting
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.types import LABEL_RANK, Confirmation, SourceLabel

_SHOWN = 5


@dataclass(frozen=True)
class Label:
    """A stored row that counts."""

    text: str
    confirmation: Confirmation
    source: str

    @property
    def rank(self) -> int:
        """Rank of its confirmation; smaller is stronger."""
        return LABEL_RANK[self.confirmation]


@dataclass(frozen=True)
class Said:
    """What a row of the table says about an image.

    Args:
        image_id: the image.
        source_id: its name in the table.
        text: class code.
        confirmation: how the diagnosis was established.
    """

    image_id: str
    source_id: str
    text: str
    confirmation: Confirmation


def known_labels(tx: Transaction) -> dict[str, list[Label]]:
    """Return image id to the rows of imports and outcomes that count."""
    table = TABLES[SourceLabel]
    query = sa.select(table.c.image_id, table.c.label, table.c.confirmation, table.c.source)
    labels: dict[str, list[Label]] = {}
    for image_id, label, confirmation, source in tx.connection.execute(query):
        labels.setdefault(image_id, []).append(Label(label, Confirmation(confirmation), source))
    return {image_id: counting(rows, lambda row: row.source) for image_id, rows in labels.items()}


def strongest(rows: Sequence[Label]) -> Label | None:
    """Return the row that decides; None without rows."""
    return min(rows, key=lambda row: (row.rank, row.source, row.text), default=None)


def differing(said: Sequence[Said], known: Mapping[str, list[Label]]) -> dict[str, tuple[Said, Label]]:
    """Return image id to what the table says and the stored row that it contradicts and does not outrank."""
    found = {}
    for one in said:
        before = strongest(known.get(one.image_id, ()))
        if before is not None and before.text != one.text and before.rank <= LABEL_RANK[one.confirmation]:
            # An outcome that is stronger stays as it is beside the label of the table, which is stored.
            if before.source.startswith("outcome:") and before.rank < LABEL_RANK[one.confirmation]:
                continue
            found[one.image_id] = (one, before)
    return found


def write_labels(
    tx: Transaction, import_id: str, said: Sequence[Said], known: Mapping[str, list[Label]], corrected: AbstractSet[str]
) -> dict[str, str]:
    """Write the rows that are new.

    Args:
        tx: a write transaction.
        import_id: of the import.
        said: what the table says, without what is not to be stored.
        known: see `known_labels`.
        corrected: images whose earlier imported rows no longer count.
    Returns:
        Image id to the class that counts then.
    """
    now, labels, counts = utc_now(), {}, {}
    for one in said:
        rows = known.get(one.image_id, [])
        number = max((correction_number(row.source) for row in rows), default=0) + (one.image_id in corrected)
        source = f"correction:{number}:{import_id}" if number else f"import:{import_id}"
        row = Label(one.text, one.confirmation, source)
        kept = [] if one.image_id in corrected else rows
        deciding = strongest([*kept, row])
        counts[one.image_id] = one.text if deciding is None else deciding.text
        if any((r.text, r.confirmation) == (row.text, row.confirmation) and import_id in r.source for r in kept):
            continue
        key = hash_of([one.image_id, source, one.text, one.confirmation])[:32]
        labels[key] = SourceLabel(
            id=key, image_id=one.image_id, label=one.text, confirmation=one.confirmation, source=source, created_at=now
        )
    tx.add(*labels.values())
    return counts


def sentence(found: Mapping[str, tuple[Said, Label]], *, taken_over: bool) -> list[str]:
    """Return the sentence that names labels which differ from stored ones; none if there are none."""
    if not found:
        return []
    shown = [f"{one.source_id} ({row.text} -> {one.text})" for one, row in list(found.values())[:_SHOWN]]
    named = ", ".join(shown) + (", ..." if len(found) > _SHOWN else "")
    if taken_over:
        ranks = sorted({f"{one.confirmation.value} (rank {LABEL_RANK[one.confirmation]})" for one, _ in found.values()})
        return [f"{len(found)} labels were corrected, as {' and '.join(ranks)}: {named}"]
    return [f"{len(found)} images carry another label than before: {named}; --correct takes it over"]
