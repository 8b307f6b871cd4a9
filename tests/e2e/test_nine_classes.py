"""Another field without code: nine classes, own columns, split and taxonomy, from import to evaluation."""

import csv
import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app

NINE = runpy.run_path(str(Path(__file__).with_name("nine_classes.py")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    NINE["make_folder"](tmp_path / "shapes")
    return tmp_path / "shapes"


@pytest.fixture
def relook(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a verb in a home of its own with the folder's taxonomy; returns what it prints as JSON."""
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RELOOK_RECORDS__TAXONOMY", str(folder / "shapes.yaml"))

    def call(*words: object) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        printed: dict[str, Any] = json.loads(result.stdout)
        return printed

    return call


@pytest.mark.long
def test_import_train_evaluate_with_no_code(relook: Any, folder: Path, tmp_path: Path) -> None:
    with (folder / "register.csv").open(encoding="utf-8") as file:
        given = {row["file"]: row for row in csv.DictReader(file)}
    imported = relook("data", "import", folder, "--columns", NINE["COLUMNS"], "--in-place")
    assert {q["source_id"]: q["code"] for q in imported["quarantined"]} == {
        f"{name}.png": code for code, name in NINE["UNUSABLE"].items()
    }
    assert imported["images"] == len(given) - 3
    assert set(imported["classes"]) == set(NINE["CLASSES"])
    assert not list((tmp_path / "home" / "blobs").rglob("*.png"))
    folds = Counter(row["fold"] for name, row in given.items() if name.removesuffix(".png") not in _unusable())
    assert (imported["splits"]["val"], imported["splits"]["test"]) == (folds["val"], folds["test"])
    assert imported["splits"]["calibration"] > 0
    assert sum(imported["splits"][s] for s in ("train", "calibration", "gate")) == folds["train"]

    # The folder is known now: its columns need not be named again, and nothing is decoded twice.
    audit = relook("data", "audit", "--data", folder)
    assert (audit["dataset_id"], audit["leaked_lesions"]) == (imported["dataset_id"], 0)
    assert audit["quarantined"] == 3

    small = ("--set", "trainers.model.side_px=32", "--set", "trainers.epochs=5", "--set", "trainers.batch_size=16")
    trained = relook(
        "train", "--data", folder, *small, "--set", "trainers.precision=fp32", "--set", "trainers.workers.threads=1"
    )
    assert trained["dataset_id"] == imported["dataset_id"]
    evaluated = relook("evaluate", trained["model_id"], "--split", "test")
    assert evaluated["images"] == folds["test"]
    assert set(evaluated["per_class"]) == set(NINE["CLASSES"])
    assert evaluated["key_class"]["name"] == NINE["KEY_CLASS"]
    # By chance it would be 1/9.
    assert evaluated["balanced_accuracy"] > 0.25
    others = relook(
        "evaluate", trained["model_id"], "--images", folder / "photos", "--labels", _usable_table(folder, given),
        "--columns", "image=file,dx=finding,lesion=spot",
    )  # fmt: skip
    assert others["images"] == imported["images"]


def _unusable() -> set[str]:
    return set(NINE["UNUSABLE"].values())


def _usable_table(folder: Path, given: dict[str, dict[str, str]]) -> Path:
    path = folder / "usable.csv"
    rows = [row for name, row in given.items() if name.removesuffix(".png") not in _unusable()]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_split_that_a_patient_crosses_is_reported_and_not_kept(relook: Any, folder: Path) -> None:
    path = folder / "register.csv"
    text = path.read_text(encoding="utf-8").splitlines()
    moved = next(n for n, line in enumerate(text) if ",train," in line and line.count("_1.png"))
    text[moved] = text[moved].replace(",train,", ",test,")
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    imported = relook("data", "import", folder, "--columns", NINE["COLUMNS"])
    assert any(
        "split was not kept: 1 lesions or patients lie on two of its splits" in note for note in imported["notes"]
    )
    assert relook("data", "audit")["leaked_lesions"] == 0
