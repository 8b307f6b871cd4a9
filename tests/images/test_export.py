"""A dataset version goes out in each form and comes in again as the same version; licences and sources go with it."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image as PillowImage

from images.export import EXPORT_ACTION, export_dataset
from images.importer import import_folder, open_dataset
from images.layouts.exported import FORMS
from records.datasets import DatasetVersion, build_version, load_dataset
from records.errors import ConfigError
from records.settings import RecordsSettings
from records.store import Store, find_images, open_store
from records.types import AuditEvent, Confirmation, ResolvedLabel, Split


@pytest.fixture(scope="module")
def version(generated: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, DatasetVersion]:
    """A home with two imports, a patient, annotators' labels, an empty split, and its newest version."""
    root = tmp_path_factory.mktemp("exported")
    folder = Path(shutil.copytree(generated, root / "data"))
    table = pd.read_csv(folder / "HAM10000_metadata.csv", dtype=str)
    held_out = table["lesion_id"].isin(table["lesion_id"].unique()[:6])
    # Without images on val, which an import of a table would draw from train.
    table = table.assign(split=held_out.map({True: "test", False: "train"}), dx_type="single_reader")
    half = len(table) // 2
    store = open_store(RecordsSettings(home=root / "home"))
    (folder / "LICENSE").write_text("\nCC BY 4.0, see the paper\n")
    table.iloc[:half].to_csv(folder / "HAM10000_metadata.csv", index=False)
    import_folder(store, folder)
    (folder / "LICENSE").unlink()
    table.iloc[half - 8 :].to_csv(folder / "HAM10000_metadata.csv", index=False)
    report = import_folder(store, folder)
    rows = load_dataset(store, report.dataset_id).split(Split.TRAIN)
    said = [
        ResolvedLabel(
            image_id=str(row.image_id),
            label="mel" if row.label != "mel" else "nv",
            confirmation=Confirmation.CONSENSUS,
            annotators=["a", "b"],
        )
        for row in rows[rows["label_rank"] > 2].head(2).itertuples()
    ]
    assert said
    return store, build_version(store, resolved=said, round_number=1, parent_id=report.dataset_id).version


@pytest.mark.parametrize("form", FORMS)
def test_reading_an_export_in_again_gives_the_same_version(
    version: tuple[Store, DatasetVersion], tmp_path: Path, form: str
) -> None:
    store, dataset = version
    written = export_dataset(store, dataset, form, tmp_path / "out")
    assert (written.dataset_id, written.images, written.notes) == (dataset.id, dataset.num_images, [])
    other = open_store(RecordsSettings(home=tmp_path / "home"))
    report = import_folder(other, tmp_path / "out")
    assert report.layout.startswith("layout: export of Relook")
    assert (report.dataset_id, report.quarantined, report.unlisted) == (dataset.id, [], [])
    assert not any("export" in note for note in report.notes)
    assert {name: count for name, count in written.splits.items() if count} == report.splits
    ids = dataset.rows["image_id"].tolist()
    for before, after in zip(find_images(store, ids), find_images(other, ids), strict=True):
        kept = ("lesion_id", "age_years", "sex", "localization", "consent", "source_id", "group_id")
        assert [getattr(before, name) for name in kept] == [getattr(after, name) for name in kept]
    assert open_dataset(other, str(tmp_path / "out")).id == dataset.id
    # Out once more, from the home that read it, in another form.
    again = export_dataset(other, load_dataset(other, dataset.id), FORMS[FORMS.index(form) - 1], tmp_path / "again")
    assert again.dataset_id == dataset.id
    assert any("CC BY 4.0" in text for text in again.licences)
    other.close()


def test_what_an_export_holds(version: tuple[Store, DatasetVersion], tmp_path: Path) -> None:
    store, dataset = version
    for form in FORMS:
        export_dataset(store, dataset, form, tmp_path / form)
    table = pd.read_csv(tmp_path / "csv" / "metadata.csv")
    assert len(table) == dataset.num_images
    assert set(table["label_source"].str.partition(":")[0]) == {"import", "annotator"}
    assert all((tmp_path / "csv" / name).is_file() for name in table["image_id"])
    licence = (tmp_path / "csv" / "LICENCE.txt").read_text()
    assert "LICENSE: CC BY 4.0, see the paper" in licence
    assert "no licence was stated" in licence
    said = json.loads((tmp_path / "parquet" / "dataset.json").read_text())
    assert (said["dataset_id"], said["images"]) == (dataset.id, dataset.num_images)
    rows = [pq.read_table(path) for path in (tmp_path / "parquet").glob("data/*.parquet")]
    assert sum(map(len, rows)) == dataset.num_images
    assert b"huggingface" in rows[0].schema.metadata
    folders = {path.parent.name for path in (tmp_path / "imagefolder" / "train").rglob("*.jpg")}
    assert folders == set(dataset.split(Split.TRAIN)["label"])
    assert list((tmp_path / "webdataset").glob("train-*.tar"))
    with store.ledger.read() as tx:
        assert tx.count(AuditEvent, where={"action": EXPORT_ACTION, "subject": dataset.id}) >= len(FORMS)
    with pytest.raises(ConfigError, match="is not empty"):
        export_dataset(store, dataset, "csv", tmp_path / "csv")
    with pytest.raises(ConfigError, match="csv, imagefolder, parquet, webdataset"):
        export_dataset(store, dataset, "xml", tmp_path / "xml")


def test_an_export_that_was_changed_is_said(version: tuple[Store, DatasetVersion], tmp_path: Path) -> None:
    store, dataset = version
    export_dataset(store, dataset, "csv", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "metadata.csv", dtype=str, keep_default_na=False)
    (tmp_path / "out" / table["image_id"].iloc[0]).unlink()
    table.loc[1, "group_id"] = "../x"
    table.to_csv(tmp_path / "out" / "metadata.csv", index=False)
    other = open_store(RecordsSettings(home=tmp_path / "home"))
    report = import_folder(other, tmp_path / "out")
    other.close()
    # Without valid groups it is a table like any other, in which a lesion has one class.
    assert {row.code for row in report.quarantined} <= {"missing", "label_conflict"}
    assert report.images + len(report.quarantined) == dataset.num_images
    assert any(f"the export holds dataset version {dataset.id[:12]}" in note for note in report.notes)


def test_metadata_of_files_in_place_stays_behind(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    exif = PillowImage.Exif()
    exif[0x010E] = "Jane Doe"
    for number in range(10):
        (folder / "mel").mkdir(parents=True, exist_ok=True)
        image = PillowImage.effect_noise((40, 40), 50 + number)
        image.convert("RGB").save(folder / "mel" / f"{number}.jpg", exif=exif)
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    dataset = load_dataset(store, import_folder(store, folder, in_place=True).dataset_id)
    written = export_dataset(store, dataset, "imagefolder", tmp_path / "out")
    store.close()
    assert written.dataset_id != dataset.id
    assert "written without it" in written.notes[0]
    assert not any(b"Jane" in path.read_bytes() for path in (tmp_path / "out").rglob("*.jpg"))
    other = open_store(RecordsSettings(home=tmp_path / "other"))
    assert import_folder(other, tmp_path / "out").dataset_id == written.dataset_id
    other.close()
