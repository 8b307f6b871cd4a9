"""The consensus that is kept equals the one that is computed from all annotations, and reads only what is new."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from cluster import labels
from cluster.labels import resolved_labels
from records.erasure import RECORDS_PLACES, erase_images
from records.ids import utc_now
from records.ledger.tables import CONSENSUS, TABLES
from records.store import Store
from records.types import Annotation, Image, ReasonCode, ResolvedLabel, ReviewItem
from tests.labeling.test_consensus import said

IMAGES = [f"{number:064x}" for number in range(6)]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many annotations each computation of a consensus took."""
    counts: list[int] = []
    whole = labels.resolve

    def resolve(rows: Sequence[Annotation], *arguments: Any, **options: Any) -> list[ResolvedLabel]:
        counts.append(len(rows))
        return whole(rows, *arguments, **options)

    monkeypatch.setattr(labels, "resolve", resolve)
    return counts


@pytest.fixture
def annotated(store: Store) -> Store:
    """A store of images that one annotator has read for the audit, and of every other one a second for a doubt."""
    now = utc_now()
    with store.ledger.begin() as tx:
        for number, image in enumerate(IMAGES):
            tx.add(Image(id=image, uri="", format="jpeg", width_px=9, height_px=9, provenance="x", created_at=now))
            for kind, reason in (("doubt", ReasonCode.REFER), ("audit", ReasonCode.AUDIT_SAMPLE)):
                item = {"id": f"{kind} {number}", "image_id": image, "created_at": now, "priority": 1.0}
                tx.add(ReviewItem(**item, reasons=[reason], blind=kind == "audit"))
            tx.add(of(number, "audit", "mel"), *([of(number, "doubt", "mel", "ben")] if number % 2 else []))
    return store


def of(number: int, kind: str, label: str | None, who: str = "anna", **changes: object) -> Annotation:
    row = said(who, label, image_id=IMAGES[number], review_item_id=f"{kind} {number}", **changes)
    return row.model_copy(update={"annotation_id": int(row.id)})


def computed(store: Store, until: datetime | None = None) -> list[ResolvedLabel]:
    with store.ledger.read() as tx:
        return labels._resolved(tx, None, until, "majority")


def test_it_equals_what_all_annotations_come_to_after_every_change(annotated: Store) -> None:
    store, chance, moments = annotated, np.random.default_rng(3), list[datetime]()
    table, items = TABLES[Annotation], TABLES[ReviewItem]

    def step() -> Any:
        number, kind = int(chance.integers(6)), str(chance.choice(["doubt", "audit"]))
        label = [None, "mel", "nv", "bcc"][int(chance.integers(4))]
        row = of(number, kind, label, f"annotator {chance.integers(3)}", gold=bool(chance.random() < 0.2))
        with store.ledger.read() as tx:
            earlier = tx.find(Annotation, where={"image_id": IMAGES[number]}, order_by=("id",))
        old = earlier[int(chance.integers(len(earlier)))] if earlier else row
        again = old.model_copy(update={"id": row.id, "created_at": row.created_at, "revision": row.revision})
        return (
            lambda tx: tx.add(row),
            lambda tx: tx.add(again.model_copy(update={"label": "df"})),
            lambda tx: tx.add(again.model_copy(update={"deleted": True})),
            lambda tx: tx.connection.execute(sa.delete(table).where(table.c.id == old.id)),
            lambda tx: tx.connection.execute(sa.update(table).where(table.c.id == old.id).values(label="vasc")),
            lambda tx: tx.connection.execute(
                sa.update(items).where(items.c.id == f"{kind} {number}").values(
                    reasons=[str(chance.choice(["audit_sample", "adjudication", "flagged"]))],
                    blind=bool(chance.random() < 0.5),
                )
            ),
        )[int(chance.integers(6))]  # fmt: skip

    for number in range(120):
        change = step()
        with store.ledger.begin() as tx:
            change(tx)
        if number % 10 == 0:
            with store.ledger.read() as tx:
                moments.append(tx.find(Annotation, order_by=("-created_at",), limit=1)[0].created_at)
        if number % 3 == 0:
            assert resolved_labels(store) == computed(store)
            for until in moments[-3:]:
                assert resolved_labels(store, until) == computed(store, until)
    assert len({one.method for one in computed(store)}) == 2, "some images were decided"
    assert resolved_labels(store, method="dawid_skene") != []


def test_only_annotations_of_images_with_something_new_are_read(annotated: Store, read: list[int]) -> None:
    assert [one.from_audit_sample for one in resolved_labels(annotated)] == [True, False] * 3
    assert sum(read) == 9
    read.clear()
    assert len(resolved_labels(annotated)) == 6
    assert read == [], "nothing is new"
    with annotated.ledger.begin() as tx:
        tx.add(of(1, "doubt", "nv", "ben"))
    assert [one.label for one in resolved_labels(annotated)] == ["mel", None, "mel", "mel", "mel", "mel"]
    assert read == [3]
    read.clear()
    with annotated.ledger.begin() as tx:
        tx.update(ReviewItem, "audit 2", reasons=[ReasonCode.AUDIT_SAMPLE, ReasonCode.FLAGGED])
        tx.update(ReviewItem, "doubt 4", reasons=[ReasonCode.REFER, ReasonCode.FLAGGED])
    assert [one.from_audit_sample for one in resolved_labels(annotated)] == [True, False, False, False, True, False]
    assert read == [1], "nobody answered the other item"


def test_what_is_kept_of_an_image_is_erased_with_it(annotated: Store) -> None:
    def kept() -> dict[str, Any]:
        with annotated.ledger.read() as tx:
            return {row.image_id: row.resolved for row in tx.connection.execute(sa.select(CONSENSUS))}

    resolved_labels(annotated)
    assert kept()[IMAGES[0]]["label"] == "mel"
    erase_images(annotated, IMAGES[:1], actor="test", places=RECORDS_PLACES)
    assert kept()[IMAGES[0]] is None
    assert [one.image_id for one in resolved_labels(annotated)] == IMAGES[1:]
