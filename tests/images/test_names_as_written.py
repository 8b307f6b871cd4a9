"""Names and labels as other machines and spreadsheets write them: found where they can mean one image only."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from images.importer import import_folder
from records.errors import DataError
from records.settings import RecordsSettings
from records.store import open_store
from tests.images.test_layouts import put, write

FOUR = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
CLASSES = ["mel", "nv", "bcc", "mel"]
ALL = {"bcc": 1, "mel": 2, "nv": 1}


def table(names: list[str], head: str = "image_id,dx", labels: list[str] = CLASSES) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        put(folder, *FOUR)
        write(
            folder, "t.csv", "\n".join([head, *(f"{name},{label}" for name, label in zip(names, labels, strict=True))])
        )

    return make


def text(name: str, content: str, *images: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        put(folder, *(images or FOUR))
        write(folder, name, content)

    return make


def folders(*names: str) -> Callable[[Path], None]:
    return lambda folder: put(folder, *names)


def of_splits(folder: Path) -> None:
    for split in ("train", "test"):
        put(folder, f"{split}/1.jpg", f"{split}/2.jpg")
        write(folder, f"{split}/metadata.csv", "file_name,label\n1.jpg,mel\n2.jpg,nv\n")


LINES = [json.dumps({"file_name": f"./{name}", "label": label}) for name, label in zip(FOUR, CLASSES, strict=True)]
TREE = [f"{split}/{name}/{name}{at}.jpg" for split in ("train", "test") for name in ("mel", "nv") for at in "12"]
CASES: dict[str, tuple[Callable[[Path], None], dict[str, int], list[str], list[str]]] = {
    # made by, classes, codes of quarantined rows, what is listed
    "paths of another machine": (table([f"/home/bob/data/{name}" for name in FOUR]), ALL, [], []),
    "paths of Windows": (table([f"C:\\Users\\bob\\{name}" for name in FOUR]), ALL, [], []),
    "addresses": (table([f"https://example.org/x/{name}?raw=1" for name in FOUR]), ALL, [], []),
    "another format": (table(["a.png", "b.PNG", "c.webp", "d.jpeg"]), ALL, [], []),
    "columns in capitals": (table(FOUR, head="Image_ID, DX"), ALL, [], []),
    "zeros that a spreadsheet dropped": (
        text("t.csv", "image_id,dx\n1,mel\n2.0,nv\n03,bcc\n", "0001.jpg", "0002.jpg", "0003.jpg"),
        {"bcc": 1, "mel": 1, "nv": 1}, [], [],
    ),
    "a number that is two images": (
        text("t.csv", "image_id,dx\n1,mel\n2,nv\n", "x/01.jpg", "y/001.jpg", "2.jpg"), {"nv": 1}, ["missing"],
        ["x/01.jpg", "y/001.jpg"],
    ),
    "a folder of another patient": (
        text("t.csv", "image_id,dx\np1/1.jpg,mel\np2/1.jpg,nv\nhttps://h/p2/1.jpg,nv\n", "p1/1.jpg"), {"mel": 1},
        ["missing", "missing"], [],
    ),
    "above the folder": (table(["../a.jpg", "/etc/passwd", "c", "d"]), {"bcc": 1, "mel": 1}, ["missing"] * 2,
                         ["a.jpg", "b.jpg"]),
    "marks of spreadsheets": (
        text("t.csv", "image;MEL;NV;BCC\na;TRUE;FALSE;\nb;no;yes;\nc;0,0;0,0;1,0\nd;x;;\n"), ALL, [], [],
    ),
    "lines of JSON": (text("metadata.jsonl", "\n".join(LINES)), ALL, [], []),
    "a table in a folder of its own": (
        text("meta/t.csv", "image_id,dx\na,mel\nb,nv\n", "images/a.jpg", "images/b.jpg"), {"mel": 1, "nv": 1}, [], [],
    ),
    "a table in the folder of each split": (
        of_splits, {"mel": 2, "nv": 2}, [], [],
    ),
    "words joined by signs": (
        folders("basal_cell_carcinoma/1.jpg", "Melanocytic-Nevi/2.jpg", "vascular_things/3.jpg"), {"bcc": 1, "nv": 1},
        ["unknown_class"], [],
    ),
    "characters that nobody sees": (
        table(FOUR, labels=["\u200bmel", "n\u00adv", "\ufeffbcc", "mel\u00a0"]), ALL, [], [],
    ),
    "an image beside the splits": (folders(*TREE, "readme/sample.png"), {"mel": 4, "nv": 4}, [], []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_there_is_found_and_nothing_else_is(name: str, tmp_path: Path) -> None:
    make, classes, refused, listed = CASES[name]
    make(tmp_path / "data")
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    report = import_folder(store, tmp_path / "data")
    store.close()
    assert report.classes == classes
    assert [row.code for row in report.quarantined] == refused
    assert report.unlisted == listed
    assert report.unlabelled == (1 if "beside" in name else 0)
    said = [note for note in report.notes if "no class" in note]
    assert said == ([
        "labels that are no class: 'vascular_things' (1); --labels reads them as one, for example "
        "'vascular_things=akiec'"
    ] if "unknown_class" in refused else [])  # fmt: skip


def test_a_table_beside_packed_images_is_refused_with_the_way_out(tmp_path: Path) -> None:
    write(tmp_path, "t.csv", "image_id,dx\na,mel\n")
    (tmp_path / "images_part_1.zip").write_bytes(b"PK\x03\x04")
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    with pytest.raises(DataError, match=r"no images in .*; unpack images_part_1.zip there, or import one archive"):
        import_folder(store, tmp_path)
    (tmp_path / "t.csv").unlink()
    with pytest.raises(DataError, match=r"there is no table in .*; unpack images_part_1.zip there"):
        import_folder(store, tmp_path)
    for split in ("train", "test"):
        put(tmp_path / "two", f"{split}/1.jpg")
        write(tmp_path / "two", f"{split}/labels.csv", "image_id,dx\n1.jpg,mel\n")
    with pytest.raises(DataError, match=r"2 tables \(test/labels.csv, train/labels.csv\); name the right one with"):
        import_folder(store, tmp_path / "two")
    (tmp_path / "t.csv").write_text('{"image_id": "a", "dx": "mel"}\n[1]\n')
    with pytest.raises(DataError, match=r"t.csv is not a table of JSON lines: line 2 is no object"):
        import_folder(store, tmp_path)
    for address in ("s3://bucket/images", "https://example.org/a.zip"):
        with pytest.raises(DataError, match=r"addresses are not imported; copy what is there to a folder first"):
            import_folder(store, Path(address))
    store.close()
