"""Folders with files that Label Studio exported: which class each image has, and what cannot be taken."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from images.importer import import_folder
from images.layouts import read_source
from records.errors import DataError
from records.settings import RecordsSettings
from records.store import open_store
from tests.images.test_layouts import found, put, write


def chosen(*classes: str, control: str = "dx", kind: str = "choices") -> dict[str, Any]:
    return {"from_name": control, "to_name": "image", "type": kind, "value": {kind: list(classes)}}


def task(number: int, image: str, *annotations: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    said = [{"id": 10 * number + at, "result": result, "was_cancelled": False} for at, result in enumerate(annotations)]
    return {"id": number, "data": {"image": image, **values}, "annotations": said, "predictions": []}


def export(folder: Path, *tasks: dict[str, Any]) -> None:
    write(folder, "project-3-at-2026-11-02-10-11-0c44a6a2.json", json.dumps(tasks))


def test_addresses_of_every_kind_find_their_file(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "0a1b2c3d-b.jpg", "in/c 1.jpg", "d.jpg", "e.jpg", "deadbeef-f.jpg")
    export(
        tmp_path,
        task(1, "/data/upload/3/9f8e7d6c-a.jpg", [chosen("mel")]),
        task(2, "/data/upload/3/0a1b2c3d-b.jpg", [chosen("nv")]),
        task(3, "/data/local-files/?d=photos/in/c%201.jpg", [chosen("bcc")]),
        task(4, "s3://bucket/d.jpg", [chosen("mel")], note="seen by dr. Who", url="https://example.org"),
        task(5, "https://example.org/x/e.jpg?token=1", [chosen("nv")]),
        task(6, "deadbeef-f.jpg", [chosen("df")]),
    )
    source = read_source(tmp_path)
    assert source.layout.startswith("layout: Label Studio, because project-3-at")
    assert found(source) == ["mel", "nv", "bcc", "mel", "nv", "df"]
    assert [row.path.name for row in source.rows if row.path] == [
        "a.jpg", "0a1b2c3d-b.jpg", "c 1.jpg", "d.jpg", "e.jpg", "deadbeef-f.jpg",
    ]  # fmt: skip
    assert source.unlisted == []


def test_annotators_agree_or_the_image_has_no_class(tmp_path: Path) -> None:
    put(tmp_path, *(f"{at}.jpg" for at in range(6)))
    skipped = task(3, "3.jpg", [chosen("mel")], [chosen("nv")])
    skipped["annotations"][1]["was_cancelled"] = True
    export(
        tmp_path,
        task(0, "0.jpg", [chosen("mel")], [chosen("mel")]), task(1, "1.jpg", [chosen("mel")], [chosen("nv")]),
        task(2, "2.jpg", [chosen("mel", "nv")]), skipped, task(4, "4.jpg"),
        # A second task about an image that there is.
        task(5, "5.jpg", [chosen("nv")]), task(6, "5.jpg", [chosen("mel")]),
    )  # fmt: skip
    source = read_source(tmp_path)
    assert found(source) == ["mel", "label_conflict", "label_conflict", "mel", None, "label_conflict"]


def test_the_control_with_the_class_is_named_where_there_are_several(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    export(tmp_path, task(1, "a.jpg", [chosen("good", control="quality"), chosen("Naevus", control="finding")]))
    with pytest.raises(DataError, match=r"fields finding, quality; say which one .* --columns dx=finding"):
        read_source(tmp_path)
    assert found(read_source(tmp_path, {"dx": "finding"})) == ["Naevus"]
    with pytest.raises(DataError, match="fields finding, quality"):
        read_source(tmp_path, {"dx": "nothing"})
    put(tmp_path / "new", "a.jpg")
    export(tmp_path / "new", task(1, "a.jpg"))
    assert found(read_source(tmp_path / "new", {"dx": "finding"})) == [None], "nobody annotated yet"


@pytest.mark.parametrize("kind", ["taxonomy", "rectanglelabels", "completions"])
def test_other_results_that_name_a_class(kind: str, tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    said = task(1, "a.jpg", [chosen("mel", kind="choices" if kind == "completions" else kind)])
    if kind == "taxonomy":
        said["annotations"][0]["result"][0]["value"]["taxonomy"] = [["skin", "malignant", "mel"]]
    if kind == "completions":  # releases before 1.0
        said["completions"] = said.pop("annotations")
    export(tmp_path, said)
    assert found(read_source(tmp_path)) == ["mel"]


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_rows_with_an_annotation_each(kind: str, tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    rows: list[dict[str, Any]] = [
        {"image": f"/data/upload/3/9f8e7d6c-{name}.jpg", "id": at, "patient": f"P{at}", "choice": choice,
         "annotator": at % 2, "annotation_id": at, "created_at": "2026-11-02T10:11:12Z",
         "updated_at": "2026-11-02T10:11:12Z", "lead_time": 3.5}
        for at, (name, choice) in enumerate(
            [("a", "mel"), ("a", "mel"), ("b", "nv"), ("b", "mel"), ("c", {"choices": ["nv", "bcc"]}), ("d", "")]
        )
    ]  # fmt: skip
    if kind == "json":
        write(tmp_path, "project-3.json", json.dumps(rows))
    else:
        with (tmp_path / "project-3.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            for row in rows:
                choice = row["choice"]
                writer.writerow(row | {"choice": json.dumps(choice) if isinstance(choice, dict) else choice})
    source = read_source(tmp_path)
    assert "layout: Label Studio" in source.layout
    assert found(source) == ["mel", "label_conflict", "label_conflict", None]
    assert source.unlisted == ["b.jpg", "c.jpg"]


def test_what_cannot_be_taken_is_listed(tmp_path: Path) -> None:
    put(tmp_path / "data", "a.jpg", "extra.jpg")
    export(
        tmp_path / "data",
        task(1, "a.jpg", [chosen("mel")]),
        task(2, "data:image/jpeg;base64,/9j/4AAQ", [chosen("nv")]),
        task(3, "/data/upload/3/9f8e7d6c-gone.jpg", [chosen("nv")]),
    )
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    report = import_folder(store, tmp_path / "data")
    store.close()
    assert report.classes == {"mel": 1}
    assert {row.source_id for row in report.quarantined} == {"task 2", "3/9f8e7d6c-gone.jpg"}
    assert report.unlisted == ["extra.jpg"]


@pytest.mark.parametrize("content", ["[]", '[{"data": 1, "annotations": []}]', "[1, 2]", '{"data": {}}', "[" * 100_000])
def test_other_json_is_no_export(content: str, tmp_path: Path) -> None:
    put(tmp_path, "mel/a.jpg", "nv/b.jpg")
    write(tmp_path, "some.json", content)
    source = read_source(tmp_path)
    assert found(source) == ["mel", "nv"]
