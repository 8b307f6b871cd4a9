"""Few lesions: no split stays empty, shares are within one lesion of the wanted, and a redraw is possible once."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli import run
from images.importer import ImportReport, import_folder
from images.synth import render
from records import audit
from records.datasets import load_dataset, redraw_splits
from records.errors import RefusedError, UnknownIdError
from records.grouping import SPLIT_SHARES, draw_stratified
from records.store import Store
from records.types import AuditEvent, DatasetRecord, Group, Split

CLASSES = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]


def check(sizes: list[int], salt: str) -> None:
    class_of = {f"{code} {n}": str(code) for code, size in enumerate(sizes) for n in range(size)}
    drawn = draw_stratified(class_of, salt)
    assert set(drawn) == set(class_of)
    totals, cells = Counter(drawn.values()), Counter((class_of[group], split) for group, split in drawn.items())
    if len(class_of) >= len(Split):
        assert set(totals) == set(Split)
    # Five to seven lesions are too few for both: train gives up what the other splits need.
    if not 5 <= len(class_of) < 8:
        for split, share in SPLIT_SHARES.items():
            assert abs(totals[split] - share * len(class_of)) < 1
            for code, size in enumerate(sizes):
                assert abs(cells[str(code), split] - share * size) < 1


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 12), classes=st.integers(1, 30), salt=st.text(min_size=1, max_size=4))
def test_even_classes(k: int, classes: int, salt: str) -> None:
    check([k] * classes, salt)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.one_of(st.integers(1, 9), st.integers(1, 400)), min_size=1, max_size=12), salt=st.just("s"))
def test_uneven_classes(sizes: list[int], salt: str) -> None:
    check(sizes, salt)


@pytest.mark.parametrize(("k", "classes"), [(2, 7), (3, 7), (5, 20), (8, 2), (1, 300), (5, 1)])
def test_named_sizes(k: int, classes: int) -> None:
    check([k] * classes, "relook")


def fill(store: Store, folder: Path, per_class: int, *, split: str = "") -> ImportReport:
    folder.mkdir()
    rows = []
    for place, code in enumerate(CLASSES):
        for n in range(per_class):
            name = f"{code}{n}"
            (folder / f"{name}.jpg").write_bytes(render(code, seed=100 * place + n))
            rows.append({"image_id": name, "dx": code, "lesion_id": name, "split": split})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return import_folder(store, folder)


@pytest.mark.parametrize("per_class", [1, 2, 3])
def test_an_import_of_few_lesions_fills_every_split(store: Store, tmp_path: Path, per_class: int) -> None:
    report = fill(store, tmp_path / "data", per_class)
    assert set(report.splits) == {split.value for split in Split}
    assert not any("no labelled image" in note for note in report.notes)


def test_an_empty_split_is_said(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(render("nv", seed=n))
    (folder / "table.csv").write_text("image_id,dx\n0,nv\n1,nv\n2,mel\n")
    report = import_folder(store, folder)
    missing = [split.value for split in Split if split.value not in report.splits]
    assert any(f"no labelled image is on the splits {', '.join(missing)}" in note for note in report.notes)


def splits_of(store: Store) -> dict[str, Split | None]:
    with store.ledger.read() as tx:
        return {group.id: group.split for group in tx.find(Group)}


def test_a_redraw_before_training_gives_what_one_import_would_have_given(store: Store, tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    (first / "a.jpg").write_bytes(render("nv", seed=999))
    (first / "table.csv").write_text("image_id,dx,lesion_id\na,nv,alone\n")
    old = import_folder(store, first)
    later = fill(store, tmp_path / "data", 3)
    before = splits_of(store)
    # A split is drawn once: the second import left the first one's group where it was.
    assert import_folder(store, first).dataset_id == later.dataset_id
    assert splits_of(store) == before
    built = redraw_splits(store)
    class_of = dict(zip(built.version.rows["group_id"], built.version.rows["label"], strict=True))
    assert splits_of(store) == draw_stratified(class_of, store.settings.split_salt)
    assert built.version.empty_splits == ()
    # Nobody can train on the earlier splits and be judged on the later ones.
    with pytest.raises(UnknownIdError):
        load_dataset(store, old.dataset_id)
    assert [path.name for path in store.home.datasets.iterdir()] == [built.version.id]
    with store.ledger.read() as tx:
        assert [record.id for record in tx.find(DatasetRecord)] == [built.version.id]
        assert [e.action for e in tx.find(AuditEvent, order_by=("number",))][-1] == "data.redrawn"
    assert audit.verify(store.ledger, store.home) == []


def test_no_redraw_after_a_training(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path / "data", 2)
    before = splits_of(store)
    (store.home.runs / "train-0123").mkdir()
    with pytest.raises(RefusedError, match="after a training or a search"):
        redraw_splits(store)
    assert splits_of(store) == before


def test_no_redraw_of_given_splits(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path / "data", 2, split="train")
    with pytest.raises(RefusedError, match="a table gave these splits"):
        redraw_splits(store)


def test_the_verb(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = fill(store, tmp_path / "data", 1)
    monkeypatch.setenv("RELOOK_HOME", str(store.home.root))
    assert run(["data", "split", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["dataset_id"] == report.dataset_id
    assert shown["splits"]["val"] == {"images": 1, "groups": 1}
    assert run(["data", "split", "--redraw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown
    (store.home.runs / "search").mkdir()
    assert run(["data", "split", "--redraw"]) == 2
