"""Each layout is recognised by itself: a generated miniature of every one, and archives that cannot be trusted."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PillowImage

from images.importer import import_folder, open_dataset
from images.layouts import LAYOUTS, read_source
from images.source_table import SourceTable
from records.errors import ConfigError, DataError
from records.settings import RecordsSettings
from records.store import open_store


def photo(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    PillowImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo(sum(name.encode())))


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def tar(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def isic_archive(folder: Path) -> None:
    put(folder, "ISIC_1.jpg", "ISIC_2.jpg", "ISIC_3.jpg")
    write(
        folder, "metadata.csv",
        "isic_id,attribution,copyright_license,age_approx,anatom_site_general,diagnosis_1,diagnosis_3,"
        "diagnosis_confirm_type,sex,lesion_id,patient_id\n"
        'ISIC_1,A,CC-0,55.0,head/neck,Malignant,"Melanoma, NOS",histopathology,male,IL_1,IP_1\n'
        "ISIC_2,A,CC-BY-NC,40.0,back,Benign,Nevus,serial imaging showing no change,female,IL_2,IP_2\n"
        "ISIC_3,A,CC-0,,,Benign,,single image expert consensus,,IL_3,IP_2\n",
    )  # fmt: skip


def isic_2018(folder: Path) -> None:
    put(folder, "ISIC2018_Task3_Training_Input/ISIC_1.jpg", "ISIC2018_Task3_Test_Input/ISIC_2.jpg")
    head = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
    write(folder, "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv",
          head + "ISIC_1,1.0,0.0,0.0,0.0,0.0,0.0,0.0\n")  # fmt: skip
    write(folder, "ISIC2018_Task3_Training_GroundTruth/LesionGroupings.csv",
          "image,lesion_id,diagnosis_confirm_type\nISIC_1,HAM_7,histopathology\n")  # fmt: skip
    write(folder, "ISIC2018_Task3_Test_GroundTruth/ISIC2018_Task3_Test_GroundTruth.csv",
          head + "ISIC_2,0.0,1.0,0.0,0.0,0.0,0.0,0.0\n")  # fmt: skip


def isic_2019(folder: Path) -> None:
    put(folder, "in/ISIC_1.jpg", "in/ISIC_2.jpg", "in/ISIC_3.jpg")
    write(folder, "ISIC_2019_Training_GroundTruth.csv",
          "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\nISIC_1,1.0,0,0,0,0,0,0,0,0\nISIC_2,0,0,0,0,0,0,0,0,1.0\n"
          "ISIC_3,1,1,0,0,0,0,0,0,0\n")  # fmt: skip
    write(folder, "ISIC_2019_Training_Metadata.csv",
          "image,age_approx,anatom_site_general,lesion_id,sex\nISIC_1,55.0,back,MSK_1,male\n")  # fmt: skip


def isic_2020(folder: Path) -> None:
    put(folder, "train/ISIC_1.jpg", "train/ISIC_2.jpg")
    write(folder, "train.csv",
          "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target\n"
          "ISIC_1,IP_1,male,45.0,torso,melanoma,malignant,1\nISIC_2,IP_2,female,50.0,torso,nevus,benign,0\n",
          )  # fmt: skip


def isic_2017(folder: Path) -> None:
    put(folder, "ISIC_1.jpg", "ISIC_2.jpg")
    write(folder, "truth.csv", "image_id,melanoma,seborrheic_keratosis\nISIC_1,1.0,0.0\nISIC_2,0.0,0.0\n")


def pad_ufes(folder: Path) -> None:
    put(folder, "imgs_part_1/PAT_1_2_3.png", "imgs_part_2/PAT_4_2_6.png")
    write(folder, "metadata.csv",
          "patient_id,lesion_id,smoke,age,gender,region,diagnostic,biopsed,img_id\n"
          "PAT_1,2,False,8,FEMALE,ARM,NEV,False,PAT_1_2_3.png\nPAT_4,2,,55,MALE,NECK,MEL,True,PAT_4_2_6.png\n",
          )  # fmt: skip


def fitzpatrick(folder: Path) -> None:
    put(folder, "images/0a1b.jpg", "images/2c3d.jpg")
    write(folder, "fitzpatrick17k.csv",
          ",md5hash,fitzpatrick_scale,label,nine_partition_label,three_partition_label,qc,url\n"
          "0,0a1b,3,melanoma,malignant melanoma,malignant,,http://a\n1,2c3d,1,nevus,nevus,benign,,http://b\n",
          )  # fmt: skip


def hugging_face_folder(folder: Path) -> None:
    put(folder, "a/1.png", "a/2.png")
    write(folder, "metadata.csv", "file_name,label\na/1.png,mel\na/2.png,nv\n")


def image_folder(folder: Path) -> None:
    put(folder, "train/mel/1.jpg", "val/nv/2.jpg")


def parquet(folder: Path) -> None:
    for split, labels in {"train": [0, 1], "test": [1, -1]}.items():
        images = [{"bytes": photo(10 * len(split) + at), "path": f"{at}.jpg"} for at in range(2)]
        table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
        features = {"label": {"names": ["mel", "nv"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        (folder / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")


def coco(folder: Path) -> None:
    put(folder, "train2017/1.jpg", "val2017/1.jpg", "train2017/both.jpg", "train2017/none.jpg", "extra.jpg")
    categories = [{"id": 3, "name": "mel"}, {"id": 5, "name": "nv"}]
    licenses = [{"id": 1, "name": "CC BY 4.0", "url": "x"}]
    said: dict[str, Any] = {
        "train": {
            "images": [{"id": at, "file_name": f"{name}.jpg"} for at, name in enumerate(["1", "both", "none"])],
            "annotations": [
                {"id": 1, "image_id": 0, "category_id": 3}, {"id": 2, "image_id": 0, "category_id": 3},
                {"id": 3, "image_id": 1, "category_id": 3}, {"id": 4, "image_id": 1, "category_id": 5},
            ],
        },
        "val": {"images": [{"id": 0, "file_name": "1.jpg"}], "annotations": [{"image_id": 0, "category_id": 5}]},
    }  # fmt: skip
    for split, part in said.items():
        document = json.dumps({**part, "categories": categories, "licenses": licenses})
        write(folder, f"annotations/instances_{split}2017.json", document)


def webdataset(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tar(folder / "train-000000.tar", ("a.jpg", photo(1)), ("a.cls", b"mel"), ("b.png", photo(2, "PNG")),
        ("b.json", b'{"label": "nv", "age": 40}'))  # fmt: skip
    tar(folder / "val-000000.tar", ("a.jpg", photo(3)), ("a.cls", b"nv\n"), ("c.jpg", photo(4)))


def datumaro_document(**labels: Any) -> str:
    names = [{"name": "lesion"}, {"name": "mel", "parent": "lesion"}, {"name": "nv", "parent": "lesion"}]
    items = [
        {"id": "a", "annotations": [{"type": "label", "label_id": 0}, {"type": "label", "label_id": 1}],
         "image": {"path": "a.jpg"}},
        {"id": "b", "annotations": [{"type": "bbox", "label_id": 2, "bbox": [0, 0, 1, 1]}]},
        {"id": "c", "annotations": [{"type": "label", "label_id": 1}, {"type": "label", "label_id": 2}]},
    ]  # fmt: skip
    categories = {"label": {"labels": names, **labels}}
    return json.dumps({"dm_format_version": "1.0", "info": {}, "categories": categories, "items": items})


def datumaro(folder: Path) -> None:
    put(folder, "images/train/a.jpg", "images/train/b.jpg", "images/train/c.jpg")
    write(folder, "annotations/train.json", datumaro_document())


def geti(folder: Path) -> None:
    put(folder, "images/default/a.jpg", "images/default/b.jpg", "images/default/c.jpg")
    groups = [{"name": "Kind of lesion", "group_type": "exclusive", "labels": ["mel", "nv"]}]
    write(folder, "annotations/default.json", datumaro_document(label_groups=groups))


MINIATURES: list[tuple[str, Callable[[Path], None], list[str | None], set[str | None]]] = [
    ("isic-archive", isic_archive, ["Melanoma, NOS", "Nevus", "Benign"], {None}),
    ("isic-challenge", isic_2018, ["NV", "MEL"], {"train", "test"}),
    ("isic-challenge", isic_2019, ["MEL", "UNK", "label_conflict"], {None}),
    ("isic-2020", isic_2020, ["melanoma", "nevus"], {None}),
    ("isic-2017", isic_2017, ["melanoma", "nevus"], {None}),
    ("pad-ufes-20", pad_ufes, ["NEV", "MEL"], {None}),
    ("fitzpatrick17k", fitzpatrick, ["melanoma", "nevus"], {None}),
    ("huggingface-images", hugging_face_folder, ["mel", "nv"], {None}),
    ("folders", image_folder, ["mel", "nv"], {"train", "val"}),
    ("parquet", parquet, ["nv", None, "mel", "nv"], {"train", "test"}),
    ("coco", coco, ["mel", "label_conflict", None, "nv"], {"train", "val"}),
    ("webdataset", webdataset, ["mel", "nv", "nv", None], {"train", "val"}),
    ("datumaro", datumaro, ["mel", "nv", "label_conflict"], {"train"}),
    ("geti", geti, ["mel", "nv", "label_conflict"], {None}),
]


def found(source: SourceTable) -> list[str | None]:
    return [row.label if row.problem is None else row.code for row in source.rows]


@pytest.mark.parametrize(("name", "make", "expected", "splits"), MINIATURES)
def test_a_layout_is_recognised_and_read(
    tmp_path: Path, name: str, make: Callable[[Path], None], expected: list[str | None], splits: set[str | None]
) -> None:
    make(tmp_path)
    source = read_source(tmp_path)
    assert source.layout.startswith("layout: ")
    assert ", because " in source.layout
    assert found(source) == expected
    assert {row.split for row in source.rows if row.problem is None} == splits
    # Forced, it is read in the same way.
    again = read_source(tmp_path, layout=name)
    assert (again.content, found(again)) == (source.content, expected)
    for row in source.rows:
        assert row.path is None or len(row.path.read_bytes()) > 100
    unlisted: dict[Any, list[str]] = {
        coco: ["extra.jpg", "train2017/both.jpg"], datumaro: ["images/train/c.jpg"],
        geti: ["images/default/c.jpg"], isic_2019: ["in/ISIC_3.jpg"],
    }  # fmt: skip
    assert source.unlisted == unlisted.get(make, [])


def test_what_tables_say_beside_the_class_is_read(tmp_path: Path) -> None:
    for make in (isic_archive, isic_2018, isic_2019, pad_ufes):
        make(tmp_path / make.__name__)
    archive = read_source(tmp_path / "isic_archive")
    assert [row.confirmation.value for row in archive.rows] == ["histopathology", "follow_up", "consensus"]
    assert archive.rows[0].context["localization"] == "head/neck"
    assert archive.licences == ("CC-0", "CC-BY-NC")
    first = read_source(tmp_path / "isic_2018").rows[1]
    assert (first.context["lesion_id"], first.confirmation.value) == ("HAM_7", "histopathology")
    joined = read_source(tmp_path / "isic_2019").rows[0]
    assert (joined.age_years, joined.context["sex"]) == (55.0, "male")
    pad = read_source(tmp_path / "pad_ufes")
    assert [row.confirmation.value for row in pad.rows] == ["consensus", "histopathology"]
    # Both patients have a lesion called 2, and no patient's id is in what tells them apart.
    lesions = [str(row.context["lesion_id"]) for row in pad.rows]
    assert len(set(lesions)) == 2
    assert not any("PAT" in lesion for lesion in lesions)
    assert any("told apart by patient" in note for note in pad.notes)


def test_columns_replace_those_of_a_known_table(tmp_path: Path) -> None:
    fitzpatrick(tmp_path)
    source = read_source(tmp_path, {"dx": "three_partition_label"})
    assert found(source) == ["malignant", "benign"]
    assert "Fitzpatrick17k" in source.layout


def test_of_two_layouts_the_more_specific_is_taken_and_the_other_is_named(tmp_path: Path) -> None:
    coco(tmp_path)
    fitzpatrick(tmp_path)
    source = read_source(tmp_path)
    assert source.layout.startswith("layout: COCO, because ")
    assert source.layout.endswith("it fits fitzpatrick17k, too, which --layout fitzpatrick17k would take")
    assert "images/0a1b.jpg" in source.unlisted
    assert found(read_source(tmp_path, layout="fitzpatrick17k")) == ["melanoma", "nevus"]
    with pytest.raises(DataError, match="is not in the layout 'geti'"):
        read_source(tmp_path, layout="geti")
    with pytest.raises(ConfigError, match=", ".join(list(LAYOUTS)[:3])):
        read_source(tmp_path, layout="voc")


def test_archives_that_cannot_be_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as archive:
        for name, data in (("good.jpg", photo(1)), ("good.cls", b"mel"), ("../out.jpg", photo(2)),
                           ("/abs.jpg", photo(3)), ("C:\\x.jpg", photo(4)), ("good.png", photo(5, "PNG"))):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    # A header that states more than there is, and a compressed archive of zeros.
    huge = tarfile.TarInfo("bomb.jpg")
    huge.size = 2**40
    (folder / "bomb.tar").write_bytes(huge.tobuf() + bytes(1024))
    with tarfile.open(folder / "more.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("z.jpg")
        info.size = 2**20
        archive.addfile(info, io.BytesIO(bytes(2**20)))
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    report = import_folder(store, folder)
    store.close()
    assert report.classes == {"mel": 1}
    reasons = {row.source_id: row.reason for row in report.quarantined}
    assert "its name leads out of the archive" in reasons["train-0.tar/../out.jpg"]
    assert "its name leads out of the archive" in reasons["train-0.tar//abs.jpg"]
    assert "its name leads out of the archive" in reasons["train-0.tar/C:\\x.jpg"]
    assert "it is a link" in reasons["train-0.tar/link.jpg"]
    assert "it has more than 256 MB" in reasons["bomb.tar/bomb.jpg"]
    listed = "\n".join(report.unlisted)
    for name in ("more.tar.gz: it is an archive", "train-0.tar/good.png: another image", "bomb.tar: "):
        assert name in listed
    assert not (tmp_path / "out.jpg").exists()


@pytest.mark.parametrize("make", [parquet, webdataset, coco])
def test_an_import_of_a_layout_is_found_again(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "data")
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    report = import_folder(store, tmp_path / "data")
    assert report.classes == ({"mel": 1, "nv": 2} if make is not coco else {"mel": 1, "nv": 1})
    assert report.images + len(report.quarantined) == 4
    assert open_dataset(store, str(tmp_path / "data")).id == report.dataset_id
    if make is not coco:
        with pytest.raises(DataError, match="inside archives"):
            import_folder(store, tmp_path / "data", in_place=True)
    store.close()


@pytest.mark.parametrize(
    "table",
    [
        "image_id,melanoma,seborrheic_keratosis\ni0,0.7,0.3\n",
        "image,MEL,NV,BCC\ni0,0.98,0.01,0.01\n",
        "isic_id,MEL,NV\ni0,1,0\ni1,0.5,0.5\n",
    ],
)
def test_columns_of_probabilities_are_not_taken_for_marks(tmp_path: Path, table: str) -> None:
    (tmp_path / "scores.csv").write_text(table)
    with pytest.raises(DataError, match="has no column"):
        read_source(tmp_path)


def test_parquet_files_with_plain_bytes_lists_of_classes_and_one_name_twice(tmp_path: Path) -> None:
    said = [["mel", None], ["mel", "nv"], None]
    pq.write_table(pa.table({"image": [photo(1), photo(2), photo(3)], "label": said}), tmp_path / "a.parquet")
    paths = [{"bytes": photo(seed), "path": "same.jpg"} for seed in (4, 5)]
    pq.write_table(pa.table({"image": paths, "label": ["nv", "mel"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"name": ["x"], "score": [0.5]}), tmp_path / "figures.parquet")
    source = read_source(tmp_path)
    assert found(source) == ["mel", "label_conflict", None, "nv", "mel"]
    assert [row.source_id for row in source.rows][3:] == ["b.parquet/same.jpg", "b.parquet/same.jpg#2"]
    assert [row.path.read_bytes() for row in source.rows if row.path] == [photo(seed) for seed in (1, 3, 4, 5)]
    assert "has the classes mel and nv, and an image has one here" in str(source.rows[1].problem)


def test_shards_with_texts_that_say_no_class(tmp_path: Path) -> None:
    large = b'"' + b"x" * 2**20 + b'"'
    tar(tmp_path / "shard.tar", ("a.jpg", photo(1)), ("a.json", b'["mel"]'), ("b.jpg", photo(2)), ("b.json", large),
        ("c.jpg", photo(3)), ("c.cls", b"\xff\xfe"), ("d.cls", b"nv"),
        ("e.jpg", photo(4)), ("e.jpg", photo(5)))  # fmt: skip
    with tarfile.open(tmp_path / "shard.tar", "a") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"f{int(kind)}.jpg")
            info.type = kind
            archive.addfile(info)
    tar(tmp_path / "notes.tar", *[(f"{number}.txt", b"a note") for number in range(300)])
    tar(tmp_path / "few.tar", ("one.txt", b"a note"))
    source = read_source(tmp_path)
    reasons = {row.source_id: row.problem for row in source.rows}
    assert {name: reason for name, reason in reasons.items() if reason is None} == {
        f"shard.tar/{name}": None for name in ("a.jpg", "e.jpg", "e.jpg#2")
    }
    assert found(source)[0] is None, "a list says no class"
    assert "b.json has more than 1 MB" in str(reasons["shard.tar/b.jpg"])
    assert "c.cls is not UTF-8 text" in str(reasons["shard.tar/c.jpg"])
    assert "it is not a regular file" in str(reasons["shard.tar/f6.jpg"])


def test_tar_files_without_images_are_no_shards(tmp_path: Path) -> None:
    tar(tmp_path / "notes.tar", *[(f"{number}.txt", b"a note") for number in range(300)])
    tar(tmp_path / "few.tar", ("one.txt", b"a note"))
    with pytest.raises(DataError, match="is not in the layout 'webdataset'"):
        read_source(tmp_path, layout="webdataset")


def test_a_known_table_takes_only_columns_that_there_are(tmp_path: Path) -> None:
    fitzpatrick(tmp_path)
    with pytest.raises(DataError, match="--columns does not take 'colour'; it takes image, dx"):
        read_source(tmp_path, {"colour": "three_partition_label"})
