from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pandas as pd
import pytest
import sqlalchemy as sa

from records import datasets
from records.changes import NAME, claim, settle
from records.consent import lower_consent
from records.datasets import MANIFEST, build_version, load_dataset
from records.erasure import erase_images
from records.ledger.tables import TABLES
from records.store import Store
from records.types import Confirmation, Consent, Cursor, DatasetChange, Group, Image, ResolvedLabel, SourceLabel
from tests.records.marks import MARKED, marks_after_changes
from tests.records.plans import scanned, sent

Add = Callable[..., None]
Id = Callable[[object], str]
NewStore = Callable[..., AbstractContextManager[Store]]
Resolved = dict[str, ResolvedLabel]
Step = Callable[[Store, Resolved], None]


images, labels = TABLES[Image], TABLES[SourceLabel]


def sql(statement: Any) -> Step:
    def run(store: Store, _: Resolved) -> None:
        with store.ledger.begin() as tx:
            tx.connection.execute(statement)

    return run


def killed(store: Store, _: Resolved) -> None:
    with store.ledger.begin() as tx:
        claim(tx)


@pytest.fixture
def steps(add_labelled: Add, image_id: Id) -> list[Step]:
    """What can change a version, one thing at a time, and some things that cannot."""

    def group_of(store: Store, name: object) -> str:
        with store.ledger.read() as tx:
            return str(tx.require(Image, image_id(name)).group_id)

    def says(name: object, label: str, who: str = "anna", **more: Any) -> Step:
        said = {"confirmation": Confirmation.CONSENSUS, "annotators": [who]} | more
        one = ResolvedLabel.model_validate({"image_id": image_id(name), "label": label} | said)
        return lambda store, resolved: resolved.update({one.image_id: one})

    def merge(one: object, other: object) -> Step:
        def run(store: Store, _: Resolved) -> None:
            gone, kept = group_of(store, one), group_of(store, other)
            with store.ledger.begin() as tx:
                tx.update(Group, gone, merged_into=kept)
                tx.connection.execute(sa.update(images).where(images.c.group_id == gone).values(group_id=kept))

        return run

    def stronger(store: Store, _: Resolved) -> None:
        with store.ledger.begin() as tx:
            tx.add(
                SourceLabel(
                    id="outcome", image_id=image_id(9), label="bcc", confirmation=Confirmation.HISTOPATHOLOGY,
                    source="outcome:1", created_at=tx.now(),
                )
            )  # fmt: skip

    def twice(store: Store, _: Resolved) -> None:
        add_labelled(store, ["twice"], "mel", source="import:1")
        with store.ledger.begin() as tx:
            more = {"image_id": image_id("twice"), "label": "mel", "confirmation": Confirmation.SINGLE_READER}
            tx.add(SourceLabel(id="later", source="import:2", created_at=tx.now(), **more))

    return [
        lambda store, _: add_labelled(store, ["new", "newer"], "mel"),
        lambda store, _: add_labelled(store, ["kept out"], "mel", consent=Consent.REVIEW),
        lambda store, _: add_labelled(store, ["alone"], "mel", group_id=None),
        stronger,
        twice,
        sql(sa.delete(labels).where(labels.c.id == f"import:1 {image_id('twice')}")),  # only its source is another
        says(3, "bcc"),
        says("unlabelled", "bcc"),
        killed,
        lambda store, _: add_labelled(store, ["unlabelled"], None),
        says(3, "bcc", who="ben"),
        merge(5, 6),
        merge(6, 7),
        lambda store, _: lower_consent(store, image_id(11), Consent.REVIEW, actor="test"),
        lambda store, _: erase_images(store, [image_id(12)], actor="test", places=()),
        sql(sa.update(images).where(images.c.id == image_id("alone")).values(group_id="0" * 16)),
        sql(sa.update(images).where(images.c.id == image_id("kept out")).values(consent=Consent.TRAINING)),
        sql(sa.delete(labels).where(labels.c.image_id == image_id(20))),
        sql(sa.update(labels).where(labels.c.image_id == image_id(21)).values(label="bkl")),
        lambda store, resolved: resolved.clear(),
        lambda store, _: None,
    ]


def test_a_version_of_its_parent_and_the_changes_is_that_of_everything(
    new_store: NewStore, add_labelled: Add, steps: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_ROWS_AT_ONCE", 7)  # several parts, of which most stay as they are
    with new_store("quick") as quick, new_store("whole") as whole:
        parents = {}
        for store in (quick, whole):
            add_labelled(store, range(40), "nv")
            with store.ledger.begin() as tx:
                tx.add(Group(id="0" * 16, created_at=tx.now()))
            parents[store] = build_version(store).version.id
        ids = set(parents.values())
        known: dict[Store, Resolved] = {quick: {}, whole: {}}
        for number, step in enumerate(steps, start=1):
            reports = {}
            for store in (quick, whole):
                step(store, known[store])
                with pytest.MonkeyPatch.context() as patch:
                    if store is quick:
                        patch.delattr(datasets, "_from_all")
                    else:
                        patch.setattr("records.changes._RULES", number + 100)
                    reports[store] = build_version(
                        store, resolved=[*known[store].values()], round_number=number, parent_id=parents[store]
                    )
            ours, theirs = reports[quick], reports[whole]
            assert ours == theirs
            pd.testing.assert_frame_equal(ours.version.rows, theirs.version.rows)
            pd.testing.assert_frame_equal(load_dataset(quick, ours.version.id).rows, ours.version.rows)
            ids.add(ours.version.id)
            parents = {store: reports[store].version.id for store in reports}
        assert len(ids) > 12
        with quick.ledger.read() as tx, whole.ledger.read() as other:
            noted = [sorted(c.image_id for c in t.find(DatasetChange) if len(c.dataset_id) == 64) for t in (tx, other)]
        assert noted[0] == noted[1]


def test_one_change_is_found_without_reading_a_table(store: Store, add_labelled: Add) -> None:
    add_labelled(store, range(30), "nv")
    first = build_version(store).version
    add_labelled(store, ["new"], "mel")
    with sent(store.ledger) as statements:
        second = build_version(store, round_number=1, parent_id=first.id).version
    assert second.num_images == 31
    assert scanned(store.ledger, statements) == []


def test_what_changes_while_a_version_is_built_is_examined_by_the_next(
    store: Store, add_labelled: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_labelled(store, range(30), "nv")
    parent = build_version(store).version.id
    add_labelled(store, ["a"], "mel")
    read, late = datasets.read_rows, iter(["b"])

    def read_and_then_change(*arguments: Any) -> Any:
        found = read(*arguments)
        add_labelled(store, late, "mel")
        return found

    monkeypatch.setattr(datasets, "read_rows", read_and_then_change)
    for images in (31, 32):
        report = build_version(store, round_number=1, parent_id=parent)
        assert report.version.num_images == images
        parent = report.version.id


def test_a_build_that_began_earlier_is_no_base_after_a_later_one(store: Store, add_labelled: Add) -> None:
    add_labelled(store, range(30), "nv")
    parent = build_version(store).version
    with store.ledger.begin() as tx:
        slow = claim(tx)
    add_labelled(store, ["a"], "mel")
    newest = build_version(store, round_number=1, parent_id=parent.id).version
    with store.ledger.begin() as tx:
        settle(tx, slow, parent.id, [])
    with store.ledger.read() as tx:
        assert tx.require(Cursor, NAME).position["base"] == newest.id


def test_an_altered_parent_is_not_built_upon(store: Store, add_labelled: Add) -> None:
    add_labelled(store, range(30), "nv")
    parent = build_version(store).version
    whole = datasets.read_manifest(store, parent.id)
    datasets.pq.write_table(whole.slice(1), store.home.datasets / parent.id / MANIFEST)
    add_labelled(store, ["new"], "mel")
    assert build_version(store, round_number=1, parent_id=parent.id).version.num_images == 31


def test_an_item_is_marked_by_whatever_changes_what_its_task_shows(store: Store, sample: Callable[..., Any]) -> None:
    assert marks_after_changes(store, sample) == MARKED
