"""Folders as people have them: each file is imported, quarantined or listed, and tables are read as they were meant."""

import csv
import io
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from images.files import is_image, list_folder
from images.importer import import_folder
from images.layouts import read_source
from images.source_table import SourceTable
from records.errors import DataError
from records.settings import RecordsSettings
from records.store import open_store

HEADER = ["lesion_id", "image_id", "dx", "age", "localization"]
CODES = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)


def photo(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    PillowImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def put(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo(seed))


def table(names: Sequence[str], delimiter: str = ",", end: str = "", age: str = "45.0", place: str = "back") -> str:
    rows = [HEADER, *([f"L{at}", name, CODES[at % 7], age, place] for at, name in enumerate(names))]
    return rows_of(rows, delimiter, end)


def rows_of(rows: Sequence[Sequence[str]], delimiter: str, end: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="")
    for at, row in enumerate(rows):
        writer.writerow(row)
        out.write((end if at else "") + "\n")
    return out.getvalue()


def labels(source: SourceTable) -> list[str | None]:
    assert [row.problem for row in source.rows if row.problem] == []
    return [row.label for row in source.rows]


@pytest.mark.parametrize(
    ("said", "on_disk"),
    [
        ("Q0.jpg", "imgs/Q0.JPG"),
        ("q0.JPG", "imgs/Q0.jpeg"),
        ("Q0", "imgs/q0.jpg"),
        ("q0.jpg", "q0.jfif"),
        ("imgs\\q0.jpg", "imgs/q0.jpg"),
        (".\\imgs\\Q0.JPG", "imgs/q0.jpg"),
        ("./imgs/q0.jpg", "imgs/q0.jpg"),
        ("deep\\er\\q0", "deep/er/q0.png"),
        (unicodedata.normalize("NFC", "Rücken.jpg"), unicodedata.normalize("NFD", "Rücken.jpg")),
        (unicodedata.normalize("NFD", "é/à.png"), unicodedata.normalize("NFC", "é/à.png")),
        (unicodedata.normalize("NFC", "Änderung"), unicodedata.normalize("NFD", "ÄNDERUNG.JPG")),
        ("Rücken.jpg", "R\udcfccken.jpg"),
    ],
)
def test_names_that_systems_write_differently_are_found(tmp_path: Path, said: str, on_disk: str) -> None:
    put(tmp_path, on_disk)
    (tmp_path / "t.csv").write_text(table([said]))
    source = read_source(tmp_path)
    assert labels(source) == ["akiec"]
    assert source.unlisted == []


def test_a_name_that_two_files_have_is_not_guessed(tmp_path: Path) -> None:
    put(tmp_path, "p/a.JPG", "q/A.jpg", "b.jpg", "B.JPG")
    (tmp_path / "t.csv").write_text(table(["a.jpg", "b.jpg", "B.jpg", "p\\a.jpg"]))
    first, second, third, fourth = read_source(tmp_path).rows
    assert first.problem is not None
    assert "could be p/a.JPG and q/A.jpg" in first.problem
    assert second.path == tmp_path / "b.jpg"
    assert third.problem is not None
    assert fourth.path == tmp_path / "p/a.JPG"


NAMES = [f"q{number}.jpg" for number in range(7)]
TABLES = {
    "trailing": table(NAMES, end=",").encode(),
    "trailing twice": table(NAMES, ";", end=";;").encode(),
    "trailing in the header": table(NAMES).replace("localization\n", "localization,\n").encode(),
    "sep line": ("sep=;\r\n" + table(NAMES, ";")).encode(),
    "sep line, quoted": ('"sep=;"\n' + table(NAMES, ";")).encode(),
    "sep line, comma": ("SEP=,\n" + table(NAMES)).encode(),
    "sep line, tab": ("sep=\t\n" + table(NAMES, "\t")).encode("utf-16"),
    "utf-16": table(NAMES, "\t").encode("utf-16"),
    "utf-16 big end first": ("\ufeff" + table(NAMES)).encode("utf-16-be"),
    "utf-16 without mark": table(NAMES, ";").encode("utf-16-le"),
    "utf-8 with mark": ("\ufeff" + table(NAMES)).encode(),
    "cp1252": table(NAMES, ";", place="Rücken").encode("cp1252"),
    "cp1252 quotes": table(NAMES, place="\u201eArm\u201c \u20ac").encode("cp1252"),
    "decimal comma": table(NAMES, ";", age="45,0").encode(),
    "decimal comma, quoted": table(NAMES, age="45,0").encode(),
    "pipes": table(NAMES, "|").encode(),
    "rows of delimiters": (table(NAMES) + ",,,,\n,,,,\n").encode(),
    "blank lines": ("\n" + table(NAMES).replace("\n", "\r\n") + "\r\n\r\n").encode(),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_spreadsheets(tmp_path: Path, kind: str) -> None:
    put(tmp_path, *NAMES)
    (tmp_path / "t.csv").write_bytes(TABLES[kind])
    source = read_source(tmp_path)
    assert labels(source) == CODES
    assert [row.context["lesion_id"] for row in source.rows] == [f"L{at}" for at in range(7)]
    assert {row.age_years for row in source.rows} == {45.0}
    assert source.notes == (["t.csv is not UTF-8 and was read as Windows-1252 (cp1252)"] if "cp1252" in kind else [])
    if kind == "cp1252":
        assert source.rows[0].context["localization"] == "Rücken"


def test_a_row_of_shifted_columns_is_not_used(tmp_path: Path) -> None:
    put(tmp_path, *NAMES)
    lines = table(NAMES).splitlines()
    lines[2] = "L1,q1.jpg,bcc,45,0,back"
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    source = read_source(tmp_path)
    assert [row.problem for row in source.rows if row.problem] == [
        "row 2, 6 cells where the header has 5, so its columns are not known"
    ]
    assert source.unlisted == ["q1.jpg"]


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04" + bytes(50), b"image_id,dx\n\x81,nv\n", b'image_id,dx\n"a,nv\n', b"\n\n"]
)
def test_what_is_no_table_is_a_sentence(tmp_path: Path, data: bytes) -> None:
    put(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(DataError, match="not a CSV table"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected", "splits"),
    [
        (["cat/1.jpg", "dog/1.jpg", "owl/2.PNG"], ["cat", "dog", "owl"], {None}),
        (["train/cat/1.jpg", "val/cat/2.jpg", "test/dog/3.jpg"], ["dog", "cat", "cat"], {"train", "val", "test"}),
        (["set/Train/cat/1.jpg", "set/Valid/dog/2.jpg"], ["cat", "dog"], {"train", "val"}),
        (["animals/cat/p1/1.jpg", "animals/dog/p2/1.jpg"], ["cat", "dog"], {None}),
        (["none/1.jpg", "na/1.jpg"], ["na", "none"], {None}),
    ],
)
def test_a_folder_per_class(tmp_path: Path, names: list[str], expected: list[str], splits: set[str | None]) -> None:
    put(tmp_path, *names)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "x.jpg").write_bytes(photo(99))
    source = read_source(tmp_path)
    assert labels(source) == expected
    assert {row.split for row in source.rows} == splits
    assert source.layout.startswith("layout: a folder per class")
    assert "because there is no table" in source.layout


def test_images_without_table_or_classes_are_a_sentence(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(DataError, match="or a folder per class"):
        read_source(tmp_path)
    put(tmp_path, "imgs/c.jpg", "more/d.jpg")
    (tmp_path / "labels.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"save labels.xlsx as CSV"):
        read_source(tmp_path)


def test_links_in_circles_end(tmp_path: Path) -> None:
    put(tmp_path, "imgs/a.jpg")
    (tmp_path / "imgs" / "loop").symlink_to(tmp_path)
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "t.csv").write_text(table(["a", "self.jpg", "loop/imgs/loop/a.jpg"]))
    source = read_source(tmp_path)
    assert source.rows[0].path == tmp_path / "imgs/a.jpg"
    assert all(row.problem for row in source.rows[1:])
    assert len(source.unlisted) == 3


def test_odd_kinds_are_quarantined_with_what_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    put(folder, "mel/plain.jpg")
    odd = {"a.tif": photo(1, "TIFF"), "b.bmp": photo(2, "BMP"), "c.jpg": photo(3, "GIF"), "d.HEIC": HEIC}
    for name, data in {**odd, "cut.jpg": photo(4)[:-300], "really_png.jpg": photo(5, "PNG")}.items():
        (folder / "mel" / name).write_bytes(data)
    (folder / "Thumbs.db").write_bytes(b"x")
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    report = import_folder(store, folder)
    store.close()
    reasons = {row.source_id: row.reason for row in report.quarantined}
    assert report.classes == {"mel": 2}
    assert set(reasons) == {f"mel/{name}" for name in (*odd, "cut.jpg")}
    for name, kind in zip(odd, ("TIFF", "BMP", "GIF", "HEIC"), strict=True):
        assert f"does not read {kind} files" in reasons[f"mel/{name}"]


_STEM = st.text("aAbß éü_.-1", min_size=1, max_size=4).filter(lambda text: text.strip(". "))
_SUFFIX = st.sampled_from(
    [".jpg", ".JPG", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".heic", ".gif", ".jfif", "", ".txt"]
)
_FOLDER = st.sampled_from(["", "mel/", "nv/", "train/mel/", "MEL/", "none/", "__MACOSX/"])


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    files=st.lists(st.tuples(_FOLDER, _STEM, _SUFFIX, st.sampled_from(["JPEG", "PNG", "BMP", "cut", "heic", "text"])),
                   min_size=1, max_size=8),
    said=st.sampled_from(["path", "name", "stem", "upper", "backslash", "no table"]),
    kept=st.integers(0, 8),
)  # fmt: skip
def test_images_on_disk_are_imported_quarantined_or_listed(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, str, str, str]], said: str, kept: int
) -> None:
    root = tmp_path_factory.mktemp("tree")
    folder = root / "data"
    folder.mkdir()
    written = 0
    for seed, (above, stem, suffix, kind) in enumerate(files):
        path = folder / f"{above}{stem}{suffix}"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        made = {"cut": photo(seed)[:-200], "heic": HEIC, "text": b"text"}
        path.write_bytes(made[kind] if kind in made else photo(seed, kind))
        written += kind != "text" and "__MACOSX" not in above
    images = [path for path in list_folder(folder).files if is_image(path)]
    assert len(images) >= written
    spell = {
        "path": str, "name": lambda p: Path(p).name, "stem": lambda p: Path(p).stem, "upper": str.upper,
        "backslash": lambda p: p.replace("/", "\\"),
    }  # fmt: skip
    if said != "no table":
        names = [spell[said](path.relative_to(folder).as_posix()) for path in images][:kept]
        random.Random(kept).shuffle(names)
        rows = [["image_id", "dx"], *([name, CODES[at % 7]] for at, name in enumerate(names))]
        (folder / "t.csv").write_text(rows_of(rows, ",", ""))
    store = open_store(RecordsSettings(home=root / "home"))
    sentence = None
    try:
        source = read_source(folder)
        used = {row.path.resolve() for row in source.rows if row.path is not None}
        assert used.isdisjoint((folder / name).resolve() for name in source.unlisted)
        assert len(used) + len(source.unlisted) == len(images)
        report = import_folder(store, folder)
        names_said = {row.source_id for row in source.rows}
        refused = {row.source_id for row in report.quarantined}
        imported = names_said - refused
        assert refused <= names_said
        assert report.images == len(imported) - len({name for name, _ in report.same_bytes} - refused)
        assert report.unlisted == source.unlisted
        assert report.layout == source.layout
    except DataError as error:
        sentence = str(error)
    finally:
        store.close()
    # If nothing can be used at all, the sentence says so.
    assert sentence is None or ("\n" not in sentence and len(sentence) > 20)


@pytest.mark.parametrize("said", ["x.jpg", "x", "a/x.jpg", "a\\x"])
def test_of_equal_images_the_one_that_is_named_is_used(tmp_path: Path, said: str) -> None:
    for name in ("a/x.jpg", "x.jpg", "z/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(photo(0))
    (tmp_path / "t.csv").write_text(table([said]))
    source = read_source(tmp_path)
    named = said.replace("\\", "/").removesuffix(".jpg") + ".jpg"
    assert labels(source) == ["akiec"]
    if said != "x":
        assert source.rows[0].path == tmp_path / named
    assert len(source.unlisted) == 2
