"""A taxonomy is proposed from the labels of a folder, and leaves to people what people have to decide."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image as PillowImage

from cluster.cli import run
from images.importer import import_folder
from images.taxonomy_proposal import propose_taxonomy
from records.errors import DataError
from records.settings import RecordsSettings
from records.store import open_store
from records.taxonomy import load_taxonomy


def write(folder: Path, labels: Sequence[str]) -> Path:
    folder.mkdir()
    rows = ["image_id,dx"]
    for number, label in enumerate(labels):
        rows.append(f'i{number},"{label}"')
        pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        PillowImage.fromarray(pixels).save(folder / f"i{number}.jpg")
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize(
    ("labels", "counts"),
    [
        (["MEL", " mel ", "Mel", "NV"], {"mel": 3, "nv": 1}),
        (["0.0", "0", "1"], {"0": 2, "1": 1}),
        (["Melanoma, NOS", "Nävus: blau #1", "Узел", "узел"], {"class": 2, "melanoma_nos": 1, "navus_blau_1": 1}),
        (["A+", "A-", "a b"], {"a": 1, "a_2": 1, "a_b": 1}),
        (["x" * 60, "x" * 61], {"x" * 28: 1, "x" * 28 + "_2": 1}),
        (["mel", "nv", "unknown", "NA"], {"mel": 1, "nv": 1}),
    ],
)
def test_the_proposal_is_a_taxonomy_under_which_its_labels_are_imported(
    tmp_path: Path, labels: list[str], counts: dict[str, int]
) -> None:
    folder = write(tmp_path / "my data: 1", labels)
    proposal = propose_taxonomy(folder)
    assert proposal.counts == counts
    (tmp_path / "t.yaml").write_text(proposal.text)
    taxonomy = load_taxonomy(str(tmp_path / "t.yaml"))
    assert taxonomy.name == "my data: 1"
    assert set(taxonomy.codes) == set(counts)
    assert not taxonomy.malignant_codes
    store = open_store(RecordsSettings(home=tmp_path / "home", taxonomy=str(tmp_path / "t.yaml")))
    assert import_folder(store, folder).classes == counts
    store.close()


def test_what_people_have_to_decide_is_said(tmp_path: Path) -> None:
    proposal = propose_taxonomy(write(tmp_path / "data", ["melanoma", "melanome", "nevus", "unknown", "unknown"]))
    assert [note for note in proposal.notes if "look alike" in note] == [
        "'melanoma' and 'melanome' look alike; if they are one class, make one an alias of the other"
    ]
    assert "'unknown' (2 images): taken as no diagnosis; add a class of that name if it is one" in proposal.notes
    assert "malignant: true for every class" in proposal.text


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [(["mel", "MEL"], "has the one class 'mel'"), (["", ""], "has no label"), (["unknown", "na"], "has no label")],
)
def test_fewer_than_two_classes_are_refused(tmp_path: Path, labels: list[str], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        propose_taxonomy(write(tmp_path / "data", labels))


def test_the_verb_writes_a_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write(tmp_path / "data", ["mel", "nv"]), tmp_path / "mine.yaml"
    assert run(["taxonomy", "from", str(folder / "t.csv"), "--name", "mine", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"mel": 1, "nv": 1}
    assert load_taxonomy(str(out)).name == "mine"
    assert run(["taxonomy", "from", str(folder), "--out", str(out)]) == 2
    assert "give --out a new file" in capsys.readouterr().err
    assert run(["taxonomy", "from", str(folder)]) == 0
    assert [c["code"] for c in yaml.safe_load(capsys.readouterr().out)["classes"]] == ["mel", "nv"]
    assert run(["taxonomy", "from", str(tmp_path / "nothing")]) == 2
