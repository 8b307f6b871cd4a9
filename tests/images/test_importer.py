"""Imports end to end: idempotent, resumable, nothing lost, nothing on two splits, labels withheld for real."""

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image as PillowImage

from images.audit import audit_dataset
from images.cache import PixelCache
from images.importer import ImportReport, import_folder, open_dataset
from images.intake import Intake
from images.synth import render, synthesize
from records import audit
from records.datasets import load_dataset
from records.errors import ConfigError, DataError, UnknownIdError
from records.frames import Frame
from records.settings import RecordsSettings
from records.store import Store, find_images, open_store, read_image
from records.types import (
    AuditEvent,
    Confirmation,
    Consent,
    DatasetRecord,
    Group,
    Image,
    Quarantined,
    SourceLabel,
    Split,
)

Change = Callable[[Callable[[pd.DataFrame], pd.DataFrame]], Path]


def images_of(store: Store) -> dict[str, Image]:
    with store.ledger.read() as tx:
        return {image.source_id or "": image for image in tx.find(Image)}


def splits_of(store: Store) -> dict[str, Split | None]:
    with store.ledger.read() as tx:
        return {group.id: group.split for group in tx.find(Group)}


def image_of(folder: Path, source_id: str) -> Path:
    return next(folder.rglob(f"{source_id}.jpg"))


def write_folder(folder: Path, rows: list[dict[str, str]], images: dict[str, bytes]) -> Path:
    folder.mkdir()
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    for name, data in images.items():
        (folder / name).write_bytes(data)
    return folder


def assert_only_masks_are_listed(report: ImportReport) -> None:
    """HAM10000's layout has a mask beside each image, which no row names."""
    assert report.unlisted
    assert all("segmentation" in name for name in report.unlisted)
    assert [note.split(" images")[0] for note in report.notes] == [str(len(report.unlisted))]


def test_everything_of_the_table_is_recorded(store: Store, generated: Path) -> None:
    table = pd.read_csv(generated / "HAM10000_metadata.csv")
    report = import_folder(store, generated)
    assert (report.images, report.lesions, report.new_images) == (len(table), 36, len(table))
    assert report.classes == table["dx"].value_counts().to_dict()
    assert report.quarantined == report.near_duplicates == report.same_bytes == []
    assert_only_masks_are_listed(report)
    images = images_of(store)
    for record in table.itertuples():
        image = images[record.image_id]
        assert image.lesion_id == record.lesion_id
        assert (image.format, image.width_px, image.height_px) == ("jpeg", 120, 90)
        assert image.consent is Consent.TRAINING
        assert image.provenance == f"import:{report.import_id}"
        assert read_image(store, image) == store.blobs.get(image.id)
    with store.ledger.read() as tx:
        labels = {label.image_id: label for label in tx.find(SourceLabel)}
        assert [e.action for e in tx.find(AuditEvent)] == ["taxonomy.remembered", "data.imported"]
    assert len(labels) == len(table)
    histo = table[table["dx_type"] == "histo"]["image_id"]
    assert all(labels[images[i].id].confirmation is Confirmation.HISTOPATHOLOGY for i in histo)
    assert audit.verify(store.ledger, store.home) == []
    json.dumps(report.as_dict(), allow_nan=False)


def test_a_second_run_changes_nothing(store: Store, generated: Path) -> None:
    first = import_folder(store, generated)
    before = (images_of(store), splits_of(store))
    second = import_folder(store, generated)
    assert (second.new_images, second.decoded) == (0, 0)
    assert second.dataset_id == first.dataset_id
    assert (second.images, second.classes, second.splits) == (first.images, first.classes, first.splits)
    assert (images_of(store), splits_of(store)) == before
    with store.ledger.read() as tx:
        assert tx.count(DatasetRecord) == 1
        assert tx.count(SourceLabel) == first.images


def test_a_killed_run_goes_on(store: Store, generated: Path) -> None:
    paths = sorted(generated.glob("HAM10000_images_part_*/*.jpg"))[:25]
    taken = list(Intake(store, (Frame(32),), in_place=False, known_hashes={}).run(paths))
    assert all(t.refusal is None for t in taken)
    assert images_of(store) == {}
    report = import_folder(store, generated, frames=(Frame(32),))
    assert report.decoded == report.images - 25
    hashes = {image.id: image.perceptual_hash for image in images_of(store).values()}
    assert all(hashes[t.image_id] == t.perceptual_hash for t in taken)


def test_equal_inputs_give_equal_datasets(tmp_path: Path, generated: Path) -> None:
    reports = []
    for name, in_place in (("one", False), ("two", True)):
        copy = Path(shutil.copytree(generated, tmp_path / f"data-{name}"))
        store = open_store(RecordsSettings(home=tmp_path / name))
        reports.append(import_folder(store, copy, in_place=in_place))
        store.close()
    assert reports[0].dataset_id == reports[1].dataset_id
    store = open_store(RecordsSettings(home=tmp_path / "three", split_salt="another"))
    assert import_folder(store, generated).dataset_id != reports[0].dataset_id
    store.close()


def test_no_lesion_is_on_two_splits(store: Store, generated: Path) -> None:
    report = import_folder(store, generated)
    dataset = load_dataset(store, report.dataset_id)
    lesions = [image.lesion_id for image in find_images(store, dataset.rows["image_id"].tolist())]
    assert (dataset.rows.groupby(lesions)["split"].nunique() == 1).all()
    assert set(dataset.rows["split"]) == {split.value for split in Split}


def test_adding_images_never_moves_a_group(store: Store, change_table: Change, generated: Path) -> None:
    half = change_table(lambda table: table[table.index % 2 == 0])
    import_folder(store, half)
    before = splits_of(store)
    groups_before = {name: image.group_id for name, image in images_of(store).items()}
    report = import_folder(store, generated)
    after = splits_of(store)
    assert {group_id: after[group_id] for group_id in before} == before
    assert {n: i.group_id for n, i in images_of(store).items() if n in groups_before} == groups_before
    assert len(after) > len(before)
    assert report.decoded == report.images - len(groups_before)
    by_lesion: dict[str | None, set[str | None]] = {}
    for image in images_of(store).values():
        by_lesion.setdefault(image.lesion_id, set()).add(image.group_id)
    assert {len(group_ids) for group_ids in by_lesion.values()} == {1}
    assert audit_dataset(store, load_dataset(store, report.dataset_id)).leaked_lesions == 0


def test_in_place_copies_nothing(store: Store, copied: Path) -> None:
    import_folder(store, copied, in_place=True)
    assert not list(store.home.blobs.rglob("*"))
    for name, image in images_of(store).items():
        assert image.uri == image_of(copied, name).resolve().as_uri()
        assert read_image(store, image) == image_of(copied, name).read_bytes()


def test_metadata_is_stripped_unless_in_place(store: Store, tmp_path: Path) -> None:
    block = PillowImage.Exif()
    block[0x010F] = "Camera of Dr. Somebody"
    out = io.BytesIO()
    PillowImage.open(io.BytesIO(render("nv", seed=1))).save(out, "JPEG", exif=block)
    assert b"Somebody" in out.getvalue()
    folder = write_folder(tmp_path / "data", [{"image_id": "a", "dx": "nv"}], {"a.jpg": out.getvalue()})
    import_folder(store, folder)
    stored = read_image(store, images_of(store)["a"])
    assert b"Somebody" not in stored
    assert len(stored) < len(out.getvalue())


def test_what_cannot_be_used_is_quarantined_and_the_rest_goes_on(store: Store, change_table: Change) -> None:
    def spoil(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[0, "dx"] = "zebra"
        table.loc[len(table)] = ["HAM_X", "ISIC_lost", "nv", "histo", "", "", ""]
        return table

    folder = change_table(spoil)
    table = pd.read_csv(folder / "HAM10000_metadata.csv")
    cut, text = image_of(folder, table.image_id[4]), image_of(folder, table.image_id[5])
    cut.write_bytes(cut.read_bytes()[:700])
    text.write_text("not an image")
    report = import_folder(store, folder)
    codes = {q.source_id: q.code for q in report.quarantined}
    lesions = table.lesion_id[table.image_id.isin([table.image_id[4], table.image_id[5]])]
    assert lesions.notna().all()
    assert codes == {
        table.image_id[0]: "unknown_class", "ISIC_lost": "missing", cut.stem: "unreadable", text.stem: "unreadable",
    }  # fmt: skip
    assert all(q.source_id in q.reason for q in report.quarantined)
    assert report.images == len(table) - 4
    found = audit_dataset(store, load_dataset(store, report.dataset_id))
    assert (found.quarantined, found.refused) == (4, {"missing": 1, "unknown_class": 1, "unreadable": 2})

    # The image is mended and the import is run again: only it is decoded, and only it leaves the count.
    cut.write_bytes(render("nv", seed=77))
    again = import_folder(store, folder)
    assert (again.new_images, again.decoded) == (1, 1)
    with store.ledger.read() as tx:
        assert tx.count(Quarantined) == 4
    assert audit_dataset(store, load_dataset(store, again.dataset_id)).quarantined == 3


def test_a_folder_with_nothing_usable_is_refused(store: Store, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", [{"image_id": "a", "dx": "zebra"}], {"a.jpg": b"x"})
    with pytest.raises(DataError, match=r"none of the 1 rows of .* can be used; first: a has the class 'zebra'"):
        import_folder(store, folder)
    assert images_of(store) == {}


def test_same_bytes_under_two_names_are_one_image(store: Store, tmp_path: Path) -> None:
    one, other, third = (render("nv", seed=s) for s in (1, 2, 3))
    rows = [
        {"image_id": "a", "dx": "nv", "lesion_id": "L1"},
        {"image_id": "b", "dx": "nv", "lesion_id": "L2"},
        {"image_id": "c", "dx": "nv", "lesion_id": "L2"},
        {"image_id": "d", "dx": "mel", "lesion_id": "L3"},
        {"image_id": "e", "dx": "nv", "lesion_id": "L4"},
    ]
    contents = {"a.jpg": one, "b.jpg": one, "c.jpg": other, "d.jpg": third, "e.jpg": third}
    report = import_folder(store, write_folder(tmp_path / "data", rows, contents))
    assert report.same_bytes == [("b", "a")]
    assert {(q.source_id, q.code) for q in report.quarantined} == {("d", "label_conflict"), ("e", "label_conflict")}
    images = images_of(store)
    assert sorted(images) == ["a", "c"]
    # `a` is also an image of L2, so that lesion's other image belongs to its group.
    assert images["a"].group_id == images["c"].group_id


def test_patients_connect_lesions_and_are_stored_as_a_hash(store: Store, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    rows = [{"pic": n, "dx": "nv", "mole": n, "who": w} for n, w in zip(names, ["P-17", "P-17", "P-18"], strict=True)]
    contents = {f"{n}.jpg": render("nv", seed=k) for k, n in enumerate(names)}
    folder = write_folder(tmp_path / "data", rows, contents)
    import_folder(store, folder, columns={"image": "pic", "lesion": "mole", "patient": "who"})
    images = images_of(store)
    assert images["a"].group_id == images["b"].group_id != images["c"].group_id
    assert images["a"].patient_hash == images["b"].patient_hash != images["c"].patient_hash
    assert b"P-17" not in (store.home.root / "ledger.db").read_bytes()


def test_near_duplicates_join_unless_diagnoses_differ(store: Store, tmp_path: Path) -> None:
    def again(data: bytes) -> bytes:
        out = io.BytesIO()
        PillowImage.open(io.BytesIO(data)).save(out, "JPEG", quality=70)
        return out.getvalue()

    first, second = render("mel", seed=1, number=1), render("nv", seed=1, number=2)
    rows = [{"image_id": n, "dx": dx} for n, dx in [("a", "mel"), ("b", "mel"), ("c", "nv"), ("d", "bkl")]]
    contents = {"a.jpg": first, "b.jpg": again(first), "c.jpg": second, "d.jpg": again(second)}
    report = import_folder(store, write_folder(tmp_path / "data", rows, contents))
    images = images_of(store)
    assert images["a"].group_id == images["b"].group_id
    assert images["c"].group_id != images["d"].group_id
    name_of = {image.id: name for name, image in images.items()}
    found = {tuple(sorted((name_of[p.first], name_of[p.second]))): p.same_diagnosis for p in report.near_duplicates}
    assert found == {("a", "b"): True, ("c", "d"): False}

    # A later image is compared with those that are here already.
    late = write_folder(tmp_path / "late", [{"image_id": "e", "dx": "mel"}], {"e.jpg": again(again(first))})
    assert len(import_folder(store, late).near_duplicates) == 2
    assert images_of(store)["e"].group_id == images["a"].group_id


def test_a_newcomer_that_links_two_splits_is_named_and_left_out(store: Store, tmp_path: Path) -> None:
    rows = [{"image_id": f"p{n}", "dx": "nv", "lesion_id": f"L{n}", "patient_id": f"P{n}"} for n in range(20)]
    contents = {f"p{n}.jpg": render("nv", seed=5, number=n, width_px=80) for n in range(21)}
    import_folder(store, write_folder(tmp_path / "data", rows, contents))
    split_of = splits_of(store)
    images = images_of(store)
    splits = {n: split_of[images[f"p{n}"].group_id or ""] for n in range(20)}
    one, other = next((a, b) for a in range(20) for b in range(20) if splits[a] != splits[b])
    late = [{"image_id": "p20", "dx": "nv", "lesion_id": f"L{one}", "patient_id": f"P{other}"}]
    report = import_folder(store, write_folder(tmp_path / "late", late, {"p20.jpg": contents["p20.jpg"]}))
    assert [(q.source_id, q.code) for q in report.quarantined] == [("p20", "links_two_splits")]
    assert images_of(store)["p20"].group_id is None
    assert splits_of(store) == split_of
    assert images_of(store)["p20"].id not in set(load_dataset(store, report.dataset_id).rows["image_id"])


def test_an_equally_strong_label_of_another_import_is_a_conflict(store: Store, tmp_path: Path) -> None:
    image = {"a.jpg": render("nv", seed=1)}
    import_folder(store, write_folder(tmp_path / "x", [{"image_id": "a", "dx": "nv", "dx_type": "consensus"}], image))
    equal = write_folder(tmp_path / "y", [{"image_id": "a", "dx": "mel", "dx_type": "consensus"}], image)
    refused = import_folder(store, equal).quarantined
    assert [(q.code, q.reason) for q in refused] == [("label_conflict", "a is mel here and was imported as nv before")]
    stronger = write_folder(tmp_path / "z", [{"image_id": "a", "dx": "mel", "dx_type": "histo"}], image)
    report = import_folder(store, stronger)
    assert report.quarantined == []
    assert load_dataset(store, report.dataset_id).rows["label"].tolist() == ["mel"]


def test_withheld_labels_are_really_absent(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    synthesize(folder, lesions=60, seed=8, width_px=80)
    truth = pd.read_csv(folder / "HAM10000_metadata.csv").set_index("image_id")["dx"]
    report = import_folder(store, folder, withhold_share=0.25)
    withheld = report.withheld
    assert list(withheld.columns) == ["image_id", "source_id", "group_id", "label"]
    assert 0 < len(withheld) < report.splits["train"]
    assert (truth[withheld["source_id"]].to_numpy() == withheld["label"].to_numpy()).all()
    assert {splits_of(store)[g] for g in withheld["group_id"]} == {Split.TRAIN}
    with store.ledger.read() as tx:
        labelled = {label.image_id for label in tx.find(SourceLabel)}
    groups = {image.id: image.group_id for image in images_of(store).values()}
    assert not labelled & set(withheld["image_id"])
    assert len(labelled) == len(groups) - len(withheld)
    # Whole groups: no other image of a withheld lesion gives the answer away.
    assert {groups[i] for i in labelled}.isdisjoint(withheld["group_id"])
    dataset = load_dataset(store, report.dataset_id)
    assert set(dataset.rows["image_id"]) == labelled
    # Neither the ledger nor the machine-readable report tells.
    assert report.as_dict()["withheld"] == len(withheld)
    again = import_folder(store, folder, withhold_share=0.25)
    assert again.withheld.equals(withheld)
    assert again.dataset_id == report.dataset_id
    told = import_folder(store, folder)
    assert told.withheld.empty
    assert load_dataset(store, told.dataset_id).num_images == report.images


def test_withheld_share_has_a_range(store: Store, generated: Path) -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="from 0 to below 1"):
            import_folder(store, generated, withhold_share=share)


def test_a_given_split_is_kept(store: Store, change_table: Change) -> None:
    def split(table: pd.DataFrame) -> pd.DataFrame:
        fold = table["lesion_id"].map({lesion: n % 4 for n, lesion in enumerate(sorted(set(table["lesion_id"])))})
        return table.assign(split=np.where(fold == 0, "test", "train"))

    folder = change_table(split)
    report = import_folder(store, folder)
    table = pd.read_csv(folder / "HAM10000_metadata.csv")
    split_of = splits_of(store)
    splits = {name: split_of[image.group_id or ""] for name, image in images_of(store).items()}
    assert all((splits[r.image_id] is Split.TEST) == (r.split == "test") for r in table.itertuples())
    assert_only_masks_are_listed(report)
    assert report.splits["train"] > 0


def test_images_without_a_diagnosis_wait_for_one(store: Store, tmp_path: Path) -> None:
    rows = [{"image_id": n, "dx": dx, "lesion_id": n} for n, dx in [("a", "nv"), ("b", "")]]
    contents = {"a.jpg": render("nv", seed=1), "b.jpg": render("nv", seed=2)}
    report = import_folder(store, write_folder(tmp_path / "data", rows, contents))
    assert (report.images, report.unlabelled, report.quarantined) == (2, 1, [])
    images = images_of(store)
    assert splits_of(store)[images["b"].group_id or ""] is None
    assert load_dataset(store, report.dataset_id).rows["image_id"].tolist() == [images["a"].id]
    pool = write_folder(tmp_path / "pool", [{"image_id": "c", "dx": ""}], {"c.jpg": render("mel", seed=3)})
    assert import_folder(store, pool).unlabelled == 1


def test_erased_images_do_not_come_back(store: Store, tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "data",
        [{"image_id": "a", "dx": "nv"}, {"image_id": "b", "dx": "nv"}],
        {"a.jpg": render("nv", seed=1), "b.jpg": render("nv", seed=2)},
    )
    import_folder(store, folder)
    image = images_of(store)["a"]
    with store.ledger.begin() as tx:
        tx.update(Image, image.id, erased_at=image.created_at)
    store.blobs.delete(image.id)
    report = import_folder(store, folder)
    assert [(q.source_id, q.code) for q in report.quarantined] == [("a", "erased")]
    assert not store.blobs.has(image.id)


def test_several_sides_are_cached_at_once(store: Store, generated: Path) -> None:
    report = import_folder(store, generated, frames=(Frame(32), Frame(48)))
    for side_px in (32, 48, 64):
        cache = PixelCache(store.home.cache, Frame(side_px))
        assert len(cache) == report.images
        assert cache.missing([image.id for image in images_of(store).values()]) == []


def test_data_is_opened_by_folder_id_or_newest(store: Store, generated: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data yet"):
        open_dataset(store, None)
    with pytest.raises(DataError, match="there is no data folder"):
        open_dataset(store, str(tmp_path / "nowhere"))
    imported = open_dataset(store, str(generated))
    assert open_dataset(store, imported.id[:10]).id == imported.id
    assert open_dataset(store, None).id == imported.id
    with store.ledger.read() as tx:
        events = tx.count(AuditEvent)
    assert open_dataset(store, str(generated)).id == imported.id
    with store.ledger.read() as tx:
        assert tx.count(AuditEvent) == events
    with pytest.raises(UnknownIdError, match="relook data versions"):
        open_dataset(store, "0123456789")


DUPLICATES = [("ISIC_0024366", "ISIC_0029861"), ("ISIC_0024777", "ISIC_0029938")]


def assert_each_lesion_has_one_split_and_label(store: Store, report: ImportReport) -> pd.Series:
    """Return the lesions in the order of the version's rows."""
    dataset = load_dataset(store, report.dataset_id)
    lesions = pd.Series([i.lesion_id for i in find_images(store, dataset.rows["image_id"].tolist())])
    assert lesions.notna().all()
    assert (dataset.rows["split"].groupby(lesions).nunique() == 1).all()
    assert (dataset.rows["label"].groupby(lesions).nunique() == 1).all()
    return lesions


def test_every_tenth_lesion_of_ham10000(store: Store, ham10000: Path, tmp_path: Path) -> None:
    """The short form of the next test: real files, and the exact duplicates among them."""
    whole = pd.read_csv(ham10000 / "HAM10000_metadata.csv")
    twice = whole.loc[whole["image_id"].isin([name for pair in DUPLICATES for name in pair]), "lesion_id"]
    table = whole[whole["lesion_id"].isin({*sorted(whole["lesion_id"].unique())[::10], *twice})]
    folder = tmp_path / "tenth" / "HAM10000_images_part_1"
    folder.mkdir(parents=True)
    files = {path.stem: path for path in ham10000.glob("HAM10000_images_part_*/*.jpg")}
    for name in table["image_id"]:
        (folder / f"{name}.jpg").symlink_to(files[name])
    table.to_csv(folder.parent / "HAM10000_metadata.csv", index=False)
    report = import_folder(store, folder.parent, in_place=True)
    assert (report.images, report.lesions) == (len(table) - len(DUPLICATES), table["lesion_id"].nunique())
    assert (report.quarantined, report.unlisted, report.same_bytes) == ([], [], DUPLICATES)
    assert_each_lesion_has_one_split_and_label(store, report)
    found = audit_dataset(store, load_dataset(store, report.dataset_id))
    assert (found.leaked_lesions, found.label_conflicts, found.quarantined) == (0, 0, 0)
    assert found.random_split.leaked_lesions > 100


@pytest.mark.soak
def test_all_of_ham10000(store: Store, ham10000: Path) -> None:
    """Every lesion on one split, two exact duplicates, nothing lost, in the time that is promised."""
    started = time.process_time()
    report = import_folder(store, ham10000, in_place=True)
    # Processor time, so that a busy machine fails no test; two idle cores need less than this on the clock.
    assert time.process_time() - started < 60
    assert (report.images, report.lesions, report.decoded) == (10_013, 7_470, 10_015)
    assert report.quarantined == []
    assert_only_masks_are_listed(report)
    assert report.same_bytes == DUPLICATES
    lesions = assert_each_lesion_has_one_split_and_label(store, report)
    dataset = load_dataset(store, report.dataset_id)
    table = pd.read_csv(ham10000 / "HAM10000_metadata.csv")
    for code, count in table.groupby("dx")["lesion_id"].nunique().items():
        per_side = lesions[dataset.rows["label"] == code].groupby(dataset.rows["split"]).nunique()
        assert per_side["train"] / count == pytest.approx(0.58, abs=0.02), code
        assert per_side["calibration"] / count == pytest.approx(0.12, abs=0.02), code
    found = audit_dataset(store, dataset)
    assert (found.leaked_lesions, found.label_conflicts, found.quarantined) == (0, 0, 0)
    assert found.random_split.leaked_lesions > 1_000
    assert 0.2 < found.random_split.leaked_test_share < 0.4
    assert 0 < found.near_duplicate_pairs < 200
