from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from records import labelled
from records.errors import DataError, IntegrityError, TaxonomyError
from records.grouping import draw_split
from records.ids import sha256_hex
from records.labelled import Known, annotations, draw_splits, known_of, read_rows
from records.store import Store
from records.types import Confirmation, Consent, Group, Image, ResolvedLabel, SourceLabel, Split

Add = Callable[..., None]
Id = Callable[[object], str]
NOBODY = annotations([], 0)


def read_known(store: Store, annotators: pd.DataFrame) -> Known:
    return known_of(store, read_rows(store), annotators)


def _rows(store: Store, *resolved: ResolvedLabel) -> dict[str, dict[str, Any]]:
    frame = read_known(store, annotations(resolved, 1)).rows
    return {row["image_id"]: row for row in frame.to_dict("records")}


def test_a_store_without_usable_labels_is_refused(store: Store, add_labelled: Add, image_id: Id) -> None:
    with pytest.raises(DataError, match="no image has a label yet; import a folder"):
        read_known(store, NOBODY)
    add_labelled(store, ["pool"], None)
    with pytest.raises(DataError, match="no image has a label yet"):
        read_known(store, NOBODY)
    add_labelled(store, ["a"], "nv", consent=Consent.REVIEW)
    add_labelled(store, ["b"], "nv", group_id=None)
    with pytest.raises(DataError, match="none of 2 labelled images has both consent for training and a group"):
        read_known(store, NOBODY)


def test_the_strongest_label_wins_and_the_first_import_among_equals(
    store: Store, add_labelled: Add, image_id: Id, sample: Callable[..., Any]
) -> None:
    add_labelled(store, ["a"], "nv", confirmation=Confirmation.SINGLE_READER, source="import:1")
    with store.ledger.begin() as tx:
        for number, (label, confirmation, source) in enumerate(
            [
                ("mel", Confirmation.CONSENSUS, "import:3"),
                ("bcc", Confirmation.CONSENSUS, "import:2"),
                ("akiec", Confirmation.CONSENSUS, "import:2"),
                ("df", Confirmation.FLAG, "import:0"),
            ]
        ):
            values = {"image_id": image_id("a"), "label": label, "confirmation": confirmation, "source": source}
            tx.add(sample(SourceLabel, number, **values))
    (row,) = _rows(store).values()
    assert (row["label"], row["label_source"], row["label_rank"], row["round"]) == ("akiec", "import:2", 2, 0)
    strong = ResolvedLabel(image_id=image_id("a"), label="vasc", confirmation=Confirmation.CONSENSUS, annotators=["x"])
    assert _rows(store, strong)[image_id("a")]["label"] == "akiec"


def test_a_class_that_the_taxonomy_does_not_have_is_named(store: Store, add_labelled: Add) -> None:
    add_labelled(store, ["a"], "owl")
    with pytest.raises(TaxonomyError, match="unknown class 'owl'"):
        read_known(store, NOBODY)


def test_a_group_that_is_lost_is_named(store: Store, add_labelled: Add) -> None:
    add_labelled(store, ["a"], "nv", group_id="lost")
    with pytest.raises(IntegrityError, match="group 'lost' that it does not know"):
        read_known(store, NOBODY)


def test_merged_groups_count_as_the_last_one(store: Store, add_labelled: Add, image_id: Id) -> None:
    for name, group in (("a", "g1"), ("b", "g2"), ("c", "g3"), ("d", "g4")):
        add_labelled(store, [name], "nv", group=group)
    with store.ledger.begin() as tx:
        tx.update(Group, "g1", merged_into="g2")
        tx.update(Group, "g2", merged_into="g3")
        tx.update(Group, "g3", split=Split.GATE)
    rows = _rows(store)
    assert {rows[image_id(n)]["group_id"] for n in "abc"} == {"g3"}
    assert {rows[image_id(n)]["split"] for n in "abc"} == {"gate"}
    assert rows[image_id("d")]["group_id"] == "g4"


def test_an_erased_image_is_gone(store: Store, add_labelled: Add, image_id: Id, sample: Callable[..., Any]) -> None:
    add_labelled(store, ["a", "b"], "nv")
    with store.ledger.begin() as tx:
        tx.update(Image, image_id("a"), erased_at=sample(Image).created_at)
    assert set(_rows(store)) == {image_id("b")}


def test_splits_are_drawn_once_first_stratified_then_by_hash(store: Store, add_labelled: Add) -> None:
    salt = store.settings.split_salt
    add_labelled(store, range(40), "nv")
    draw_splits(store, read_known(store, NOBODY).rows)
    with store.ledger.read() as tx:
        first = {group.id: group for group in tx.find(Group)}
    assert {group.drawn_by for group in first.values()} == {"stratified"}
    assert [sum(g.split == split for g in first.values()) for split in Split] == [23, 4, 5, 4, 4]
    add_labelled(store, range(40, 80), "mel")
    rows = read_known(store, NOBODY).rows
    draw_splits(store, rows)
    with store.ledger.read() as tx:
        second = {group.id: group for group in tx.find(Group)}
    assert {key: second[key] for key in first} == first
    assert {g.drawn_by for key, g in second.items() if key not in first} == {"hash"}
    assert all(g.split == draw_split(key, salt) for key, g in second.items() if key not in first)


def test_writers_do_not_wait_for_draws_and_one_first_draw_counts(
    store: Store, add_labelled: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_labelled(store, range(40), "nv")
    rows = read_known(store, NOBODY).rows
    draw, drawn = labelled.draw_stratified, list[dict[str, Split]]()

    def while_others_write(*given: Any) -> dict[str, Split]:
        # Another process draws the rows of 30 groups; it could not write if this one held a write transaction.
        if not drawn:
            drawn.append({})
            draw_splits(store, rows[:30])
        drawn.append(draw(*given))
        return drawn[-1]

    monkeypatch.setattr(labelled, "draw_stratified", while_others_write)
    monkeypatch.setattr(labelled, "_ROWS_AT_ONCE", 7)
    draw_splits(store, rows)
    with store.ledger.read() as tx:
        found = {group.id: group.split for group in tx.find(Group) if group.split is not None}
    # The other one's draw, all of it and nothing of ours: 40 groups would have been stratified otherwise.
    assert found == drawn[1]
    assert (len(drawn[1]), len(drawn[2])) == (30, 40)
    draw_splits(store, rows)
    with store.ledger.read() as tx:
        assert {group.drawn_by for group in tx.find(Group)} == {"stratified", "hash"}


@pytest.mark.parametrize("source", ["outcome:1", "annotator"])
def test_a_group_whose_label_comes_from_doubt_goes_to_train(
    store: Store, add_labelled: Add, image_id: Id, source: str
) -> None:
    add_labelled(store, ["imported"], "nv")
    held = [n for n in range(200) if draw_split(_group(n), store.settings.split_salt) != Split.TRAIN][:3]
    add_labelled(store, held, "mel" if source != "annotator" else None, source=source)
    annotators = [
        ResolvedLabel(image_id=image_id(n), label="mel", confirmation=Confirmation.SINGLE_READER, annotators=["x"])
        for n in held
        if source == "annotator"
    ]
    rows = read_known(store, annotations(annotators, 1)).rows
    draw_splits(store, rows)
    with store.ledger.read() as tx:
        drawn = [tx.require(Group, _group(n)) for n in held]
    assert [(g.split, g.drawn_by) for g in drawn] == [(Split.TRAIN, "doubt")] * 3


def _group(name: object) -> str:
    return sha256_hex(f"group {name}".encode())[:16]
