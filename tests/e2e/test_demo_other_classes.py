"""The demo on classes that the generator does not know, from a folder of images to a retrained model."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.dicoms import dicom
from tests.e2e import nine_classes, pets
from tests.e2e.test_demo import relook


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RELOOK_RECORDS__TAXONOMY", str(tmp_path / "mine.yaml"))
    return tmp_path / "home"


def as_dicom(folder: Path) -> None:
    """Replace the images of a folder by DICOM files of a patient each."""
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        path.with_suffix("").write_bytes(dicom(pixels, PatientID=f"P{number}", PatientAge="040Y"))
        path.unlink()


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["pets", "pets in DICOM files", "nine classes"])
def test_the_whole_demo(kind: str, home: Path, tmp_path: Path) -> None:
    folder, options, images = tmp_path / "data", (), 60
    if kind.startswith("pets"):
        pets.make_folder(folder)
        if kind != "pets":
            as_dicom(folder)
        pets.write_taxonomy(tmp_path / "mine.yaml")
    else:
        images = len(nine_classes.make_folder(folder))
        (folder / "shapes.yaml").rename(tmp_path / "mine.yaml")
        options = ("--columns", nine_classes.COLUMNS, "--set", "tuning.trials=2", "--set", "trainers.epochs=8")
    done = relook(home, "demo", "--json", "--data", str(folder), *options)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout)
    assert summary["data"]["images"] == images
    assert (summary["served"]["failed"], summary["swap"]["failed"]) == (0, 0)
    assert summary["gate"]["harmed_challenger_refused"] is True
    assert summary["rounds"][1]["labels_from_annotators"] > 0
    assert (summary["label_studio"]["lost"], summary["label_studio"]["duplicated"]) == (0, 0)
    assert summary["trace"]["complete"] is True
