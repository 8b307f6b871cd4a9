"""The audit: hand-made leaks are counted, a random split shows what it would have done."""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from images.audit import audit_dataset, count_leaked, split_at_random
from images.audit_page import write_audit_page
from images.importer import import_folder
from records.datasets import load_dataset
from records.store import Store, find_images
from records.types import Split

KEYS = {
    "images", "lesions", "classes", "splits", "leaked_lesions", "near_duplicate_pairs", "label_conflicts",
    "quarantined", "random_split",
}  # fmt: skip


def test_leaks_are_counted_by_hand() -> None:
    lesions = pd.Series(["a", "a", "b", "b", "c", "d", "d"])
    splits = pd.Series(["train", "test", "val", "val", "gate", "train", "gate"])
    assert count_leaked(lesions, splits) == 2
    assert count_leaked(lesions, pd.Series(["train"] * 7)) == 0


def test_a_random_split_keeps_the_shares_and_leaks() -> None:
    lesions = pd.Series([f"L{n // 2}" for n in range(2000)])
    split = split_at_random(lesions)
    assert split.test_images == 200
    assert split == split_at_random(lesions)
    # The other image of a test image's lesion is trained on with probability 0.58.
    assert split.leaked_test_share == pytest.approx(0.58, abs=0.1)
    assert split.leaked_test_images == round(split.leaked_test_share * 200)
    # Both images land on one split with probability 0.3808.
    assert split.leaked_lesions == pytest.approx(1000 * (1 - 0.3808), abs=60)
    singles = split_at_random(pd.Series([f"L{n}" for n in range(100)]))
    assert (singles.leaked_lesions, singles.leaked_test_share) == (0, 0.0)


def test_the_report_of_an_import(store: Store, generated: Path) -> None:
    report = import_folder(store, generated)
    found = audit_dataset(store, load_dataset(store, report.dataset_id))
    assert set(found.model_dump()) >= KEYS
    assert (found.images, found.lesions, found.leaked_lesions) == (report.images, report.lesions, 0)
    assert list(found.classes) == list(store.taxonomy.codes)
    assert {code: count for code, count in found.classes.items() if count} == report.classes
    assert sum(found.splits.values()) == report.images
    assert sum(found.split_lesions.values()) == report.lesions
    assert (found.label_conflicts, found.quarantined, found.near_duplicate_pairs) == (0, 0, 0)


def test_planted_leaks_and_conflicts_are_found(store: Store, generated: Path) -> None:
    dataset = load_dataset(store, import_folder(store, generated).dataset_id)
    rows = dataset.rows.copy()
    lesions = pd.Series([i.lesion_id for i in find_images(store, rows["image_id"].tolist())])
    moved, relabelled = lesions[lesions.duplicated()].unique()[:2]
    first = {lesion: lesions[lesions == lesion].index[0] for lesion in (moved, relabelled)}
    rows.loc[first[moved], "split"] = next(s.value for s in Split if s.value != rows.loc[first[moved], "split"])
    rows.loc[first[relabelled], "label"] = next(
        c for c in store.taxonomy.codes if c != rows.loc[first[relabelled], "label"]
    )
    found = audit_dataset(store, replace(dataset, rows=rows))
    assert (found.leaked_lesions, found.label_conflicts) == (1, 1)
    assert found.conflicts[0].startswith(f"lesion {relabelled} has the classes ")


def test_what_would_go_wrong_is_said_on_one_page(store: Store, generated: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(generated, tmp_path / "data"))
    table = pd.read_csv(folder / "HAM10000_metadata.csv", dtype=str)
    table.loc[0, "dx"] = "melanom"
    table = table.drop(columns="localization")
    table.loc[1:4, "age"] = ""
    table.to_csv(folder / "HAM10000_metadata.csv", index=False)
    dataset = load_dataset(store, import_folder(store, folder).dataset_id)
    rows = dataset.rows.assign(split=dataset.rows["split"].replace("gate", "train"))
    report = audit_dataset(store, replace(dataset, rows=rows))
    said = "\n".join(report.problems)
    for sentence in (
        "no image is on the splits gate",
        "classes under 10 lesions",
        "'melanom', which is no class, and class mel (--labels 'melanom=mel' takes it)",
        "rows of imports were not used: ",
        "localization 100%",
    ):
        assert sentence in said
    assert (report.formats, report.missing["localization"]) == ({"jpeg": len(rows)}, 1.0)
    assert 0 < report.missing["age_years"] < 1
    assert sum(report.class_lesions.values()) >= report.lesions
    write_audit_page(store, dataset, report, tmp_path / "audit.html")
    html = (tmp_path / "audit.html").read_text()
    assert html.count("data:image/png;base64,") > 10
    assert "no image is on the splits gate" in html
    assert "&#39;melanom&#39;" in html
