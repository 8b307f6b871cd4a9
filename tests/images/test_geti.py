"""Projects of Intel Geti: its own signed archive, and the folder of its SDK; made here in the form that Geti writes."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from images.importer import import_folder
from images.layouts import read_source
from records.errors import DataError
from records.settings import RecordsSettings
from records.store import open_store
from tests.images.test_layouts import found, photo, put, write

STORAGE, TESTING = "a" * 24, "b" * 24
LABELS = {"mel": "1" * 24, "nv": "2" * 24, "Lesion": "3" * 24, "No object": "4" * 24}
WHOLE = {"type": "RECTANGLE", "x1": 0.0, "y1": 0.0, "x2": 1.0, "y2": 1.0}
BOX = {"type": "RECTANGLE", "x1": 0.1, "y1": 0.0, "x2": 0.5, "y2": 1.0}


def image_id(number: int) -> str:
    return f"{number:024x}"


def revision(number: int, day: int, *labels: str, kind: str = "ANNOTATION", shape: Any = None) -> dict[str, Any]:
    marks = [{"label_id": {"$sid": LABELS[name]}, "probability": 1.0} for name in labels]
    return {
        "_id": {"$sid": f"{day:023x}e"}, "kind": kind, "creation_date": {"$date": f"2025-03-{day:02}T10:00:00Z"},
        "media_identifier": {"media_id": {"$sid": image_id(number)}, "type": "image"},
        "annotations": [{"shape": shape or WHOLE, "labels": marks}] if labels else [],
    }  # fmt: skip


def documents() -> dict[str, list[dict[str, Any]]]:
    names = {number: f"visit {number}" for number in range(1, 8)}
    schema = {"label_tree": {"edges": [[{"$sid": LABELS[name]}, {"$sid": LABELS["Lesion"]}] for name in ("mel", "nv")]}}
    return {
        "image": [
            {"_id": {"$sid": image_id(number)}, "name": name, "extension": "JPG", "width": 32, "height": 24,
             "dataset_storage_id": {"$sid": TESTING if number == 2 else STORAGE}}
            for number, name in names.items()
        ],
        "label": [
            {"_id": {"$sid": one}, "name": name, "is_empty": name == "No object"} for name, one in LABELS.items()
        ],
        "label_schema": [{"_id": {"$sid": "9" * 24}, **schema}],
        "dataset_storage": [
            {"_id": {"$sid": STORAGE}, "use_for_training": True}, {"_id": {"$sid": TESTING}, "use_for_training": False},
        ],
        "video": [{"_id": {"$sid": "8" * 24}, "name": "film"}],
        "annotation_scene": [
            revision(1, 3, "mel", "Lesion"), revision(1, 1, "nv"), revision(1, 9, "nv", kind="PREDICTION"),
            revision(2, 1, "nv", shape=BOX), revision(3, 1, "mel", "nv"), revision(4, 1, "No object"),
            revision(5, 1, "nv"), revision(5, 2), revision(6, 1, "mel"), revision(7, 1, "mel"),
        ],
    }  # fmt: skip


def archive(path: Path) -> None:
    inner = path.with_name("project.zip")
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("manifest.json", json.dumps({"version": "20.0", "min_id": "0" * 24}))
        for name, found_ones in documents().items():
            file.writestr(f"documents/{name}.jsonl", "".join(json.dumps(one) + "\n" for one in found_ones))
        for number in range(1, 7):
            place = f"binaries/images/dataset_storages/{TESTING if number == 2 else STORAGE}/{image_id(number)}"
            file.writestr(f"{place}.jpg", photo(number))
            file.writestr(f"{place}_thumbnail.jpg", photo(100 + number))
        file.writestr("binaries/videos/film.mp4", b"\x00\x00\x00\x18ftypmp42")
    with zipfile.ZipFile(path, "w") as file:
        file.write(inner, "project.zip")
        file.writestr("ecdsa_p384.sig", b"signature")
        file.writestr("public_key.der", b"key")


def test_a_project_is_imported_from_its_archive(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    archive(tmp_path / "made" / "7c1d.zip")
    reports = []
    for number, place in enumerate(("7c1d.zip", "project.zip", "signed")):
        if place == "signed":
            zipfile.ZipFile(tmp_path / "made" / "7c1d.zip").extractall(tmp_path / "made" / place)
        store = open_store(RecordsSettings(home=tmp_path / f"home{number}"))
        report = import_folder(store, tmp_path / "made" / place)
        assert list(store.home.cache.glob("unpacked-*")) == []
        store.close()
        assert (report.classes, report.images, report.unlabelled) == ({"mel": 2, "nv": 1}, 5, 2)
        refused = sorted((one.code, one.reason) for one in report.quarantined)
        assert [code for code, _ in refused] == ["label_conflict", "missing"]
        assert "has the classes mel and nv" in refused[0][1]
        assert "visit 7" in refused[1][1]
        assert report.layout.startswith("layout: project of Intel Geti, because documents has")
        assert [note for note in report.notes if "thumbnails" in note or "videos" in note] == [
            "6 thumbnails that Geti made of its images were not imported",
            "1 videos were not imported; export their frames as images",
        ]
        assert len(report.unlisted) == 1, report.unlisted  # the image of two classes
        reports.append(report)
    assert len({report.dataset_id for report in reports}) == len({report.import_id for report in reports}) == 1


def test_images_for_tests_stay_in_the_test_split_and_damage_is_said(tmp_path: Path) -> None:
    for name, found_ones in documents().items():
        write(tmp_path / "p", f"documents/{name}.jsonl", "".join(json.dumps(one) + "\n" for one in found_ones))
    put(tmp_path / "p", *(f"binaries/images/x/{image_id(number)}.jpg" for number in range(1, 8)))
    source = read_source(tmp_path / "p")
    assert found(source) == ["mel", "nv", "label_conflict", None, None, "mel", "mel"]
    assert [row.split and row.split.value for row in source.rows] == [None, "test", None, None, None, None, None]
    (tmp_path / "p" / "documents" / "annotation_scene.jsonl").write_text('{"kind": "ANN')
    with pytest.raises(DataError, match=r"line 1 of .*annotation_scene.jsonl is not JSON .*; export the project again"):
        read_source(tmp_path / "p")


def test_a_project_that_lacks_collections_and_has_empty_lines_is_read(tmp_path: Path) -> None:
    found_ones = documents()
    found_ones["label_schema"][0]["label_tree"]["edges"].append("of another form")
    for name in ("image", "label", "label_schema", "annotation_scene"):
        text = "\n\n".join(json.dumps(one) for one in found_ones[name])
        write(tmp_path / "p", f"documents/{name}.jsonl", text)
    put(tmp_path / "p", *(f"binaries/images/x/{image_id(number)}.jpg" for number in range(1, 8)))
    source = read_source(tmp_path / "p")
    assert found(source) == ["mel", "nv", "label_conflict", None, None, "mel", "mel"]
    assert {row.split for row in source.rows} == {None}, "which images are for tests stood in what is missing"


def test_a_collection_of_gigabytes_is_not_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path / "7c1d.zip")
    monkeypatch.setattr("images.layouts.geti._MAX_BYTES", 10)
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    with pytest.raises(DataError, match="has more than 1 GB, more than is read at once; export a part"):
        import_folder(store, tmp_path / "7c1d.zip")
    store.close()


def test_the_folder_of_the_sdk_is_read(tmp_path: Path) -> None:
    labels = [
        {"id": one, "name": name, "is_empty": name == "No object",
         "parent_id": LABELS["Lesion"] if name in ("mel", "nv") else None}
        for name, one in LABELS.items()
    ]  # fmt: skip
    write(tmp_path, "project.json", json.dumps({"name": "p", "pipeline": {"tasks": [{"labels": labels}]}}))
    for dataset, name, chosen in (("Dataset", "a", ["Lesion", "mel"]), ("Second", "a", ["nv"]), ("Dataset", "b.1", []),
                                  ("Dataset", "gone", ["mel"])):  # fmt: skip
        marks = [{"labels": [{"name": one, "id": "other"} for one in chosen], "shape": {"type": "RECTANGLE"}}]
        write(tmp_path, f"annotations/{dataset}/{name}.json", json.dumps({"annotations": marks, "kind": "ANNOTATION"}))
    put(tmp_path, "images/Dataset/a.jpg", "images/Second/a.png", "images/Dataset/b.1.jpg", "images/Dataset/extra.jpg")
    source = read_source(tmp_path)
    assert {row.source_id: row.label for row in source.rows if row.problem is None} == {
        "images/Dataset/a.jpg": "mel", "images/Second/a.png": "nv", "images/Dataset/b.1.jpg": None,
    }  # fmt: skip
    assert [row.code for row in source.rows if row.problem is not None] == ["missing"]
    assert source.unlisted == ["images/Dataset/extra.jpg"]
