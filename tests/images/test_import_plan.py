"""The rules of an import by hand: refusals, same bytes, given splits, withheld groups."""

from collections import Counter
from pathlib import Path

from images.import_plan import (
    Entry,
    GroupFacts,
    draw_splits,
    merge_same_bytes,
    pick_withheld,
    usable_rows,
)
from images.intake import TakenIn
from images.source_table import SourceRow
from records.grouping import draw_split, draw_stratified
from records.taxonomy import load_taxonomy
from records.types import Confirmation, Split

HAM = load_taxonomy("ham10000")
SALT = "test"


def row(name: str, label: str | None = "nv", lesion: str | None = None, *, found: bool = True) -> SourceRow:
    context = dict.fromkeys(("patient_id", "site", "device", "sex", "localization"))
    path = Path(f"/data/{name}.jpg") if found else None
    problem = None if found else f"there is no image named {name} in /data"
    return SourceRow(
        name, path, problem, label, Confirmation.CONSENSUS, None, {"lesion_id": lesion, **context}, None, None
    )


def entry(name: str, image_id: str, label: str | None = "nv") -> Entry:
    return Entry(row(name, label), TakenIn(Path(f"/data/{name}.jpg"), image_id=image_id))


def groups(count: int, label: str = "nv", *splits: Split) -> dict[str, GroupFacts]:
    return {f"{label}-{'-'.join(splits)}{n}": GroupFacts(label, frozenset(splits)) for n in range(count)}


def test_rows_that_cannot_be_used_are_named() -> None:
    rows = [
        row("good"),
        row("bare", None),
        row("zebra", "zebra"),
        row("lost", found=False),
        row("twice", "nv"),
        row("twice", "mel"),
        row("left", "nv", "L1"),
        row("right", "bkl", "L1"),
        row("other", None, "L1"),
        row("again"),
        row("again"),
    ]
    kept, refusals, notes = usable_rows(rows, HAM)
    assert [r.source_id for r in kept] == ["good", "bare", "again"]
    assert {(r.source_id, r.code, r.reason) for r in refusals} == {
        ("zebra", "unknown_class", "zebra has the class 'zebra'; taxonomy 'ham10000' has " + ", ".join(HAM.codes)),
        ("lost", "missing", "there is no image named lost in /data"),
        ("twice", "label_conflict", "image twice has the classes mel and nv"),
        ("left", "label_conflict", "lesion L1 has the classes bkl and nv"),
        ("right", "label_conflict", "lesion L1 has the classes bkl and nv"),
        ("other", "label_conflict", "lesion L1 has the classes bkl and nv"),
    }
    assert len(refusals) == 6
    assert notes == ["1 rows repeat the image of another row and were read once"]


def test_every_row_is_kept_refused_or_counted() -> None:
    rows = [row(str(n % 7), ["nv", "mel", "zebra", None][n % 4], f"L{n % 5}", found=n % 3 > 0) for n in range(60)]
    kept, refusals, _ = usable_rows(rows, HAM)
    assert {r.source_id for r in kept} | {r.source_id for r in refusals} == {r.source_id for r in rows}


def test_same_bytes_are_one_image_unless_labels_disagree() -> None:
    entries = [entry("a", "1"), entry("b", "2", "mel"), entry("c", "1"), entry("d", "2", "nv"), entry("e", "1", None)]
    kept, same_bytes, refusals = merge_same_bytes(entries)
    assert [e.row.source_id for e in kept] == ["a", "c", "e"]
    assert same_bytes == [("c", "a"), ("e", "a")]
    assert [(r.source_id, r.code) for r in refusals] == [("b", "label_conflict"), ("d", "label_conflict")]
    assert refusals[0].reason == "b and d are the same image with the classes mel and nv"


def test_the_first_import_is_stratified_and_later_ones_go_by_hash() -> None:
    facts = {**groups(100, "nv"), **groups(20, "mel")}
    first, notes = draw_splits(facts, is_first=True, salt=SALT)
    assert {g: s for g, (s, _) in first.items()} == draw_stratified({g: f.label for g, f in facts.items()}, SALT)
    assert {how for _, how in first.values()} == {"stratified"}
    assert notes == []
    later, _ = draw_splits(facts, is_first=False, salt=SALT)
    assert later == {g: (draw_split(g, SALT), "hash") for g in facts}


def test_a_whole_given_split_is_kept_as_it_is() -> None:
    facts = {name: fact for split in Split for name, fact in groups(5, "nv", split).items()}
    drawn, notes = draw_splits(facts, is_first=True, salt=SALT)
    assert drawn == {g: (next(iter(f.splits)), "given") for g, f in facts.items()}
    assert notes == []


def test_splits_that_the_table_lacks_come_out_of_its_training_groups() -> None:
    train, test = groups(100, "nv", Split.TRAIN), groups(30, "nv", Split.TEST)
    drawn, notes = draw_splits({**train, **test}, is_first=True, salt=SALT)
    assert all(drawn[g] == (Split.TEST, "given") for g in test)
    counts = Counter(drawn[g][0] for g in train)
    assert counts == {Split.TRAIN: 68, Split.VAL: 10, Split.CALIBRATION: 12, Split.GATE: 10}
    assert notes == []


def test_a_given_split_that_a_group_crosses_is_not_kept() -> None:
    facts = {**groups(10, "nv", Split.TRAIN), **groups(1, "nv", Split.TRAIN, Split.TEST)}
    drawn, notes = draw_splits(facts, is_first=True, salt=SALT)
    assert {how for _, how in drawn.values()} == {"stratified"}
    assert notes == ["the table's split was not kept: 1 lesions or patients lie on two of its splits"]


def test_withheld_groups_are_a_share_of_each_class_and_always_the_same() -> None:
    train = {g: f.label for g, f in {**groups(40, "nv"), **groups(10, "mel"), **groups(1, "df")}.items()}
    picked = pick_withheld(train, 0.2, SALT)
    assert Counter(train[g] for g in picked) == {"nv": 8, "mel": 2}
    assert picked == pick_withheld(dict(reversed(train.items())), 0.2, SALT)
    assert picked < pick_withheld(train, 0.4, SALT)
    assert pick_withheld(train, 0.0, SALT) == set()
    assert picked != pick_withheld(train, 0.2, "another salt")
