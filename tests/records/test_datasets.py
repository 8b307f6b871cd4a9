from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from records.datasets import HASHED_COLUMNS, BuildReport, build_version, content_id, load_dataset, read_manifest
from records.errors import DataError, IntegrityError, UnknownIdError
from records.grouping import draw_split
from records.ids import sha256_hex
from records.schemas import arrow_schema
from records.store import Store
from records.types import Confirmation, Consent, DatasetRecord, Group, Image, ManifestRow, ResolvedLabel, Split

Add = Callable[..., None]
Id = Callable[[object], str]
NewStore = Callable[..., AbstractContextManager[Store]]


@pytest.fixture
def imported(store: Store, add_labelled: Add) -> Store:
    """60 images in 60 groups, their splits drawn."""
    add_labelled(store, range(40), "nv", confirmation=Confirmation.HISTOPATHOLOGY)
    add_labelled(store, range(40, 60), "mel", confirmation=Confirmation.SINGLE_READER)
    build_version(store)
    return store


@pytest.fixture
def says(image_id: Id) -> Callable[..., ResolvedLabel]:
    """What annotators say of an image."""

    def make(name: object, label: str | None, *, audit: bool = False, two: bool = False) -> ResolvedLabel:
        return ResolvedLabel(
            image_id=image_id(name),
            label=label,
            confirmation=Confirmation.CONSENSUS if two else Confirmation.SINGLE_READER,
            annotators=["anna", "ben"] if two else ["anna"],
            from_audit_sample=audit,
        )

    return make


def _row(report: BuildReport, image: str) -> dict[str, Any]:
    (row,) = report.version.rows[report.version.rows["image_id"] == image].to_dict("records")
    return row


def _on(store: Store, split: Split, image_id: Id, start: int = 0) -> int:
    """Return the number of an image on a split."""
    rows = build_version(store).version.split(split)
    return next(n for n in range(start, 60) if image_id(n) in set(rows["image_id"]))


def test_a_version_holds_every_labelled_image_once(imported: Store, image_id: Id) -> None:
    report = build_version(imported)
    rows = report.version.rows
    assert list(rows.columns) == list(ManifestRow.model_fields)
    assert rows["image_id"].tolist() == sorted(image_id(n) for n in range(60))
    assert (report.version.num_images, report.version.num_groups) == (60, 60)
    assert {split: len(report.version.split(split)) for split in Split} == {
        Split.TRAIN: 35, Split.VAL: 6, Split.CALIBRATION: 7, Split.GATE: 6, Split.TEST: 6
    }  # fmt: skip
    assert report == BuildReport(report.version)


def test_equal_inputs_give_equal_ids_in_two_homes(new_store: NewStore, add_labelled: Add) -> None:
    ids = []
    for name, order in (("one", 1), ("two", -1)):
        with new_store(name) as store:
            add_labelled(store, list(range(30))[::order], "nv", source=f"import:{name}")
            add_labelled(store, list(range(30, 50))[::order], "mel", source=f"import:{name}")
            ids.append(build_version(store).version.id)
    assert ids[0] == ids[1]
    with new_store("three", split_salt="other") as store:
        add_labelled(store, range(30), "nv")
        add_labelled(store, range(30, 50), "mel")
        assert build_version(store).version.id != ids[0]


def test_the_same_version_is_written_once_and_loads_again(imported: Store) -> None:
    first, second = build_version(imported), build_version(imported, round_number=3)
    assert first.version.id == second.version.id
    with imported.ledger.read() as tx:
        (record,) = tx.find(DatasetRecord)
    assert (record.num_images, record.num_groups, record.round, record.parent_id) == (60, 60, 0, None)
    loaded = load_dataset(imported, first.version.id[:8])
    pd.testing.assert_frame_equal(loaded.rows, first.version.rows)
    assert loaded.taxonomy_hash == imported.taxonomy.hash
    assert pq.read_schema(imported.home.datasets / record.id / "manifest.parquet").remove_metadata() == arrow_schema(
        ManifestRow
    )


def test_the_id_is_about_what_training_sees(imported: Store) -> None:
    rows, taxonomy_hash = build_version(imported).version.rows, imported.taxonomy.hash
    before = content_id(rows, taxonomy_hash)
    assert content_id(rows.assign(label_source="annotator:x", round=9), taxonomy_hash) == before
    assert content_id(rows, "0" * 64) != before
    for column, value in (("label", "bcc"), ("split", "test"), ("group_id", "g"), ("label_rank", 9), ("image_id", "i")):
        assert content_id(rows.assign(**{column: value}), taxonomy_hash) != before


def test_a_single_reader_never_replaces_histopathology(
    imported: Store, image_id: Id, says: Callable[..., ResolvedLabel]
) -> None:
    contradicted, agreed = _on(imported, Split.TRAIN, image_id), _on(imported, Split.TRAIN, image_id, start=20)
    report = build_version(imported, resolved=[says(contradicted, "mel"), says(agreed, "nv")], round_number=1)
    assert _row(report, image_id(contradicted))["label"] == "nv"
    assert report.outranked == (image_id(contradicted),)
    assert report.new_labels == report.held_out == ()


def test_a_stronger_label_replaces_a_weaker_one(
    imported: Store, image_id: Id, says: Callable[..., ResolvedLabel]
) -> None:
    number = _on(imported, Split.TRAIN, image_id, start=40)
    report = build_version(imported, resolved=[says(number, "bcc", two=True)], round_number=2)
    row = _row(report, image_id(number))
    assert (row["label"], row["label_source"], row["label_rank"], row["round"]) == ("bcc", "annotator:anna+ben", 2, 2)
    assert report.new_labels == (image_id(number),)
    assert report.outranked == report.held_out == ()


def test_an_image_without_a_class_adds_nothing(
    imported: Store, image_id: Id, says: Callable[..., ResolvedLabel]
) -> None:
    report = build_version(imported, resolved=[says(0, None)], round_number=1)
    assert report == BuildReport(build_version(imported).version)


def _held_groups(store: Store, start: int, count: int) -> list[int]:
    """Return image numbers whose groups the hash would put on a split other than train."""
    salt = store.settings.split_salt
    names = (n for n in range(start, 9999) if draw_split(sha256_hex(f"group {n}".encode())[:16], salt) != Split.TRAIN)
    return [next(names) for _ in range(count)]


def test_doubt_joins_train_and_the_audit_sample_any_split_by_hash(
    imported: Store, add_labelled: Add, image_id: Id, says: Callable[..., ResolvedLabel]
) -> None:
    doubtful, audited = _held_groups(imported, 100, 2)
    add_labelled(imported, [doubtful, audited], None)
    resolved = [says(doubtful, "mel"), says(audited, "nv", audit=True)]
    report = build_version(imported, resolved=resolved, round_number=1)
    salt = imported.settings.split_salt
    assert _row(report, image_id(doubtful))["split"] == "train"
    assert _row(report, image_id(audited))["split"] == draw_split(sha256_hex(f"group {audited}".encode())[:16], salt)
    assert set(report.new_labels) == {image_id(doubtful), image_id(audited)}
    assert report.held_out == (image_id(audited),)
    with imported.ledger.read() as tx:
        assert tx.require(Group, sha256_hex(f"group {doubtful}".encode())[:16]).drawn_by == "doubt"


def test_a_label_from_doubt_never_enters_a_held_out_split(
    imported: Store, add_labelled: Add, image_id: Id, says: Callable[..., ResolvedLabel]
) -> None:
    """Neither as a new image of a held-out lesion, nor as a better label of a held-out image."""
    held = _on(imported, Split.TEST, image_id, start=40)
    group = sha256_hex(f"group {held}".encode())[:16]
    add_labelled(imported, ["doubted", "audited"], None, group=group)
    resolved = [says(held, "bcc", two=True), says("doubted", "bcc"), says("audited", "bcc", audit=True)]
    report = build_version(imported, resolved=resolved, round_number=1)
    assert (_row(report, image_id(held))["label"], _row(report, image_id(held))["split"]) == ("mel", "test")
    assert (_row(report, image_id("audited"))["label"], _row(report, image_id("audited"))["split"]) == ("bcc", "test")
    assert image_id("doubted") not in set(report.version.rows["image_id"])
    assert set(report.held_out) == {image_id(held), image_id("doubted"), image_id("audited")}
    assert report.version.num_images == 61


def test_adding_images_never_moves_a_group(imported: Store, add_labelled: Add) -> None:
    before = build_version(imported).version.rows
    add_labelled(imported, range(200, 300), "vasc")
    after = build_version(imported).version.rows
    both = before.merge(after, on="image_id", suffixes=("", "_after"))
    assert len(both) == 60
    assert (both["split"] == both["split_after"]).all()
    assert (both["group_id"] == both["group_id_after"]).all()
    assert (after.groupby("group_id")["split"].nunique() == 1).all()


def test_a_label_keeps_the_round_that_brought_it_in(
    imported: Store, add_labelled: Add, image_id: Id, says: Callable[..., ResolvedLabel]
) -> None:
    add_labelled(imported, ["a", "b"], None)
    first = build_version(imported, resolved=[says("a", "mel")], round_number=1)
    parent = first.version.id
    second = build_version(imported, resolved=[says("a", "mel"), says("b", "nv")], round_number=2, parent_id=parent)
    assert [_row(second, image_id(name))["round"] for name in ("a", "b", 0)] == [1, 2, 0]
    changed = build_version(imported, resolved=[says("a", "nv")], round_number=3, parent_id=second.version.id)
    assert _row(changed, image_id("a"))["round"] == 3
    with imported.ledger.read() as tx:
        assert tx.require(DatasetRecord, second.version.id).parent_id == parent


def test_what_is_left_out_is_named(
    imported: Store, add_labelled: Add, image_id: Id, sample: Callable[..., Any]
) -> None:
    add_labelled(imported, ["private"], "nv", consent=Consent.REVIEW)
    add_labelled(imported, ["alone"], "nv", group_id=None)
    add_labelled(imported, ["erased"], "nv", erased_at=sample(Image).created_at)
    report = build_version(imported)
    assert report.without_consent == (image_id("private"),)
    assert report.ungrouped == (image_id("alone"),)
    assert report.version.num_images == 60


def test_without_a_label_there_is_no_version(store: Store) -> None:
    with pytest.raises(DataError, match="no image has a label yet"):
        build_version(store)
    assert list(store.home.datasets.iterdir()) == []


def test_an_altered_manifest_is_refused(imported: Store) -> None:
    version = build_version(imported).version
    path = imported.home.datasets / version.id / "manifest.parquet"
    whole = path.read_bytes()
    said = f"the manifest of dataset version {version.id[:12]}"
    for column, value in (("label", "bcc"), ("split", "train")):
        version.rows.assign(**{column: value}).to_parquet(path)
        with pytest.raises(IntegrityError, match=f"{said} was altered"):
            load_dataset(imported, version.id)
    version.rows.drop(columns="split").to_parquet(path)
    with pytest.raises(IntegrityError, match=f"{said} was altered"):
        load_dataset(imported, version.id)
    for rubbish in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(rubbish)
        with pytest.raises(IntegrityError, match=f"{said} cannot be read"):
            load_dataset(imported, version.id)
    path.unlink()
    with pytest.raises(IntegrityError, match=f"{said} is missing"):
        read_manifest(imported, version.id)


def test_a_lost_manifest_is_written_again(imported: Store) -> None:
    version = build_version(imported).version
    (imported.home.datasets / version.id / "manifest.parquet").unlink()
    build_version(imported)
    assert load_dataset(imported, version.id).num_images == 60


@pytest.mark.parametrize("name", ["", "0000", "0" * 12])
def test_a_name_that_nothing_has_is_refused(imported: Store, name: str) -> None:
    with pytest.raises(UnknownIdError, match=f"no dataset version has the id '{name}'"):
        load_dataset(imported, name)


def test_a_prefix_that_two_share_is_refused(imported: Store, sample: Callable[..., Any]) -> None:
    with imported.ledger.begin() as tx:
        tx.add(*[sample(DatasetRecord, n, id=f"abcdef12{n}") for n in range(2)])
    with pytest.raises(UnknownIdError, match="2 dataset versions share"):
        load_dataset(imported, "abcdef12")


BUILD = """
import sys
from pathlib import Path
from records.datasets import build_version
from records.settings import RecordsSettings
from records.store import open_store
print(build_version(open_store(RecordsSettings(home=Path(sys.argv[1])))).version.id)
"""


def test_two_processes_build_the_same_version(store: Store, add_labelled: Add, run_python: Callable[..., Any]) -> None:
    add_labelled(store, range(60), "nv")
    started = [run_python(BUILD, store.home.root) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in started]
    assert [complaint for _, complaint in said] == ["", ""]
    assert said[0] == said[1]
    assert load_dataset(store, said[0][0].strip()).num_images == 60
    files = {path.name for path in (store.home.datasets / said[0][0].strip()).iterdir()}
    assert files == {"manifest.parquet", "dataset.json"}


def test_the_id_is_that_of_the_rows_as_csv_whatever_their_texts_hold() -> None:
    plain = [("a" * 64, "g1", "train", "nv", 0), ("b" * 64, "g2", "val", "ml", 3)]
    odd = [("c" * 64, 'g"3', "test", "a,b", 1), ("d" * 64, "g\n4", "gate", "ü\r", 2)]
    for rows in (plain, odd, plain + odd):
        frame = pd.DataFrame(rows, columns=HASHED_COLUMNS)
        text = frame.to_csv(index=False, header=False, lineterminator="\n")
        wanted = sha256_hex(f"t\n{','.join(HASHED_COLUMNS)}\n{text}".encode())
        assert content_id(frame, "t") == wanted
