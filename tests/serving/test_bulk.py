"""Prediction of a folder: most urgent first, unreadable files are listed, an interrupted run continues."""

import csv
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from records.errors import DataError, RefusedError
from records.models import find_bundle
from records.store import Store
from serving.bulk import predict_folder
from serving.client import Client
from serving.settings import ServingSettings

SETTINGS = ServingSettings(max_batch_size=4)


@pytest.fixture
def folder(tmp_path: Path, make_image: Callable[..., bytes]) -> Path:
    made = tmp_path / "images"
    (made / "more").mkdir(parents=True)
    for number in range(9):
        (made / ("more" if number % 2 else ".") / f"p{number}.jpg").write_bytes(make_image(number))
    (made / "broken.png").write_bytes(b"no image")
    (made / "notes.txt").write_text("not an image")
    return made


def test_the_table_has_the_predictions_of_the_service_in_order(
    service_store: Store, client: Client, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "table.csv"
    result = predict_folder(find_bundle(service_store, "champion"), folder, out, SETTINGS, explain=True)
    assert (len(result.rows), result.failed) == (11, 2)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows[-2:]] == ["broken.png", "notes.txt"]
    assert rows[-1]["error"]
    ranks = [["urgent", "review", "retake", "answered"].index(row["decision"]) for row in rows[:-2]]
    assert ranks == sorted(ranks)
    for before, after in pairwise(rows[:-2]):
        if before["decision"] == after["decision"]:
            assert float(before["p_malignant"]) >= float(after["p_malignant"])
    served = client.predict((folder / rows[0]["image"]).read_bytes())
    assert rows[0]["label"] == served.label
    assert float(rows[0]["confidence"]) == pytest.approx(served.confidence, abs=1e-5)
    assert len(list((tmp_path / "table.csv.maps").iterdir())) == 9
    assert not (tmp_path / "table.csv.partial").exists()


def test_an_interrupted_run_goes_on_and_ends_the_same(service_store: Store, folder: Path, tmp_path: Path) -> None:
    bundle = find_bundle(service_store, "champion")
    whole = predict_folder(bundle, folder, tmp_path / "whole.csv", SETTINGS)

    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    out = tmp_path / "part.csv"
    with pytest.raises(KeyboardInterrupt):
        predict_folder(bundle, folder, out, SETTINGS, on_done=stop)
    partial = tmp_path / "part.csv.partial"
    with partial.open("a") as file:
        file.write('{"image": "half')
    with pytest.raises(RefusedError, match="--resume"):
        predict_folder(bundle, folder, out, SETTINGS)
    head, _, rows = partial.read_text().partition("\n")
    partial.write_text(head.replace(bundle.id, "f" * 64) + "\n" + rows)
    with pytest.raises(RefusedError, match="was started with model ffffffffffff; remove it to start again"):
        predict_folder(bundle, folder, out, SETTINGS, resume=True)
    partial.write_text(head + "\n" + rows)
    seen: list[int] = []
    resumed = predict_folder(bundle, folder, out, SETTINGS, resume=True, on_done=lambda done, _: seen.append(done))
    assert seen[0] >= 4
    assert [row["image"] for row in resumed.rows] == [row["image"] for row in whole.rows]
    assert [row["decision"] for row in resumed.rows] == [row["decision"] for row in whole.rows]


def test_images_of_too_many_pixels_are_rows_with_a_sentence(service_store: Store, folder: Path, tmp_path: Path) -> None:
    bundle = find_bundle(service_store, "champion")
    result = predict_folder(bundle, folder, tmp_path / "t.csv", SETTINGS.model_copy(update={"max_megapixels": 0.001}))
    readable = [row["error"] for row in result.rows if "pixels are too many" in (row["error"] or "")]
    assert readable
    assert {row["decision"] for row in result.rows} == {None}


def test_an_empty_folder_is_refused(service_store: Store, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    bundle: Any = find_bundle(service_store, "champion")
    with pytest.raises(DataError, match="holds no"):
        predict_folder(bundle, tmp_path / "none", tmp_path / "out.csv", SETTINGS)
