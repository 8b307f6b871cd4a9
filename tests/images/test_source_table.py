"""Reading a data folder: which table, which columns, which file; and one clear sentence for each fault."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from images.import_plan import read_label
from images.layouts import read_source
from images.source_table import SourceRow
from records.errors import DataError
from records.taxonomy import load_taxonomy
from records.types import Confirmation, Split


def make(folder: Path, table: str, *images: str, name: str = "table.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(table)
    for image in images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(image.encode())
    return folder


def only(folder: Path, **columns: str) -> SourceRow:
    rows = read_source(folder, columns).rows
    assert len(rows) == 1
    return rows[0]


def test_a_full_row(tmp_path: Path) -> None:
    table = (
        "image_id,dx,dx_type,lesion_id,patient_id,age,sex,localization,site,device,split,acquired_at\n"
        " a ,nv,histo,L1,P1,45.0,male,back,Vienna,D3,validation,2020-05-01T10:00:00\n"
    )
    row = only(make(tmp_path, table, "deep/er/a.jpg"))
    assert row.source_id == "a"
    assert row.path == tmp_path / "deep/er/a.jpg"
    assert (row.label, row.confirmation, row.split) == ("nv", Confirmation.HISTOPATHOLOGY, Split.VAL)
    assert row.context == {
        "lesion_id": "L1", "patient_id": "P1", "site": "Vienna", "device": "D3", "sex": "male", "localization": "back",
    }  # fmt: skip
    assert row.age_years == 45.0
    assert row.acquired_at == datetime(2020, 5, 1, 10, tzinfo=UTC)


def test_columns_can_be_renamed(tmp_path: Path) -> None:
    row = only(
        make(tmp_path, "file;diagnosis;mole\nx.png;mel;7\n", "x.png"), image="file", dx="diagnosis", lesion="mole"
    )
    assert (row.source_id, row.label, row.context["lesion_id"]) == ("x.png", "mel", "7")
    assert row.confirmation is Confirmation.SINGLE_READER


@pytest.mark.parametrize("empty", ["", "unknown", "NaN", "N/A"])
def test_empty_cells_are_none(tmp_path: Path, empty: str) -> None:
    row = only(make(tmp_path, f"image_id,dx,age,sex,lesion_id\na,{empty},{empty},{empty},{empty}\n", "a.jpg"))
    # Whether such a word is a class or says that there is none, depends on the taxonomy.
    assert row.label == (empty or None)
    assert read_label(row.label, load_taxonomy("ham10000")) is None
    assert row.age_years is None
    assert set(row.context.values()) == {None}


@pytest.mark.parametrize(
    ("text", "confirmation"),
    [
        ("histo", Confirmation.HISTOPATHOLOGY),
        ("follow_up", Confirmation.FOLLOW_UP),
        ("Follow-up", Confirmation.FOLLOW_UP),
        ("consensus", Confirmation.CONSENSUS),
        ("confocal", Confirmation.CONFOCAL),
        ("single reader", Confirmation.SINGLE_READER),
    ],
)
def test_confirmations(tmp_path: Path, text: str, confirmation: Confirmation) -> None:
    assert only(make(tmp_path, f"image_id,dx,dx_type\na,nv,{text}\n", "a.jpg")).confirmation is confirmation


def test_values_that_say_nothing_are_counted(tmp_path: Path) -> None:
    table = "image_id,dx,age,dx_type,acquired_at\na,nv,old,oracle,yesterday\nb,nv,-3,oracle,\nc,nv,131,,\n"
    notes = read_source(make(tmp_path, table, "a.jpg", "b.jpg", "c.jpg")).notes
    assert notes[0].startswith("2 diagnoses were confirmed by 'oracle'")
    assert "3 ages are not numbers from 0 to 130 and were left out" in notes
    assert "1 times are not ISO 8601 from 1900 to 2199 and were left out" in notes


def test_files_are_found_by_stem_name_or_path(tmp_path: Path) -> None:
    make(
        tmp_path,
        "image_id,dx\na,nv\nb.png,nv\nsub/c.jpg,nv\nd,nv\n,nv\n../x.jpg,nv\n",
        "p/a.JPG",
        "q/b.png",
        "sub/c.jpg",
    )
    rows = read_source(tmp_path).rows
    assert [row.path and row.path.name for row in rows] == ["a.JPG", "b.png", "c.jpg", None, None, None]
    assert rows[3].problem == f"there is no image named d in {tmp_path}"
    assert rows[4].problem == "row 5 names no image"
    assert rows[5].problem is not None
    assert "outside" in rows[5].problem


def test_two_files_of_one_name(tmp_path: Path) -> None:
    make(tmp_path, "image_id,dx\na,nv\nb,nv\n", "p/a.jpg", "q/a.jpg", "p/b.jpg", "q/b.jpg")
    (tmp_path / "p/b.jpg").write_bytes(b"same")
    (tmp_path / "q/b.jpg").write_bytes(b"same")
    first, second = read_source(tmp_path).rows
    assert first.problem == "a could be p/a.jpg and q/a.jpg; write the path into the table"
    assert second.path == tmp_path / "p/b.jpg"


def test_the_official_table_wins_over_others(tmp_path: Path) -> None:
    make(tmp_path, "image_id,dx\na,nv\n", "a.jpg", name="HAM10000_metadata")
    make(tmp_path, "x\n1\n", name="other.csv")
    assert read_source(tmp_path).path.name == "HAM10000_metadata"
    assert read_source(tmp_path, table=Path("HAM10000_metadata")).rows[0].label == "nv"


def test_byte_order_mark_and_tabs(tmp_path: Path) -> None:
    make(tmp_path, "\ufeffimage_id\tdx\na\tnv\n", "a.jpg", name="t.tsv")
    assert read_source(tmp_path).rows[0].source_id == "a"


@pytest.mark.parametrize(
    ("table", "images", "columns", "message"),
    [
        ("image_id,label\na,nv\n", ["a.jpg"], {}, r"no column 'dx'; it has image_id, label; .*--columns dx=NAME"),
        ("image,dx\na,nv\n", ["a.jpg"], {}, r"no column 'image_id'; .*--columns image=NAME"),
        ("image_id,dx\na,nv\n", ["a.jpg"], {"lesion": "mole"}, "no column 'mole' for lesion; it has image_id, dx"),
        ("image_id,dx\na,nv\n", ["a.jpg"], {"diagnosis": "dx"}, "--columns does not take 'diagnosis'; it takes"),
        ("image_id,dx\n", ["a.jpg"], {}, "has no rows"),
        ("image_id,dx\na,nv\n", [], {}, "there are no images in"),
        ("image_id,dx,split\na,nv,holdout\n", ["a.jpg"], {}, "the split 'holdout'; it must be one of train, val"),
        ("", ["a.jpg"], {}, "is not a CSV table"),
        ('image_id,dx\na,nv\n"b', ["a.jpg"], {}, "is not a CSV table"),
        ("image_id,dx,dx\na,nv,mel\n", ["a.jpg"], {}, "has two columns 'dx'; remove one of them"),
    ],
)
def test_faults_are_one_sentence(
    tmp_path: Path, table: str, images: list[str], columns: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_source(make(tmp_path, table, *images), columns)
    assert "\n" not in str(caught.value)


def test_faults_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data folder"):
        read_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"it needs HAM10000_metadata.csv, or one CSV file"):
        read_source(tmp_path)
    make(tmp_path, "image_id,dx\n", name="a.csv")
    make(tmp_path, "image_id,dx\n", name="b.csv")
    with pytest.raises(DataError, match=r"holds 2 tables \(a.csv, b.csv\); name the right one with --table"):
        read_source(tmp_path)
    with pytest.raises(DataError, match=r"there is no table c.csv"):
        read_source(tmp_path, table=Path("c.csv"))
    (tmp_path / "a.csv").write_bytes(b"image_id,dx\n\x81\x8d,nv\n")
    with pytest.raises(DataError, match="is not a CSV table"):
        read_source(tmp_path, table=Path("a.csv"))
    (tmp_path / "a.csv").write_bytes("image_id,dx\na,nv\n".encode("utf-16")[:-1])
    with pytest.raises(DataError, match="is not a CSV table: it is not whole UTF-16"):
        read_source(tmp_path, table=Path("a.csv"))


def test_rows_marked_as_two_classes_and_empty_lines(tmp_path: Path) -> None:
    make(tmp_path / "hot", "image_id,plum,amber\na,1.0,1.0\nb,0.0,1.0\n", "a.jpg", "b.jpg")
    first, second = read_source(tmp_path / "hot").rows
    assert (first.code, second.label) == ("label_conflict", "amber")
    assert "is marked as plum and amber" in str(first.problem)
    lines = '{"image_id": "a", "dx": "nv"}\n\n{"image_id": "b", "dx": null}\n'
    make(tmp_path / "lines", lines, "a.jpg", "b.jpg", name="t.jsonl")
    assert [row.label for row in read_source(tmp_path / "lines").rows] == ["nv", None]
