"""Whatever describes or packs the images of a folder: each is imported, quarantined or listed, by its name."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from images.importer import ImportReport, import_folder
from records.errors import DataError
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Image

HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)
LABELS = ["mel", "NV", "Melanoma", " bcc ", "alien", "", "unknown"]
_FOLDER = st.sampled_from(["", "a/", "train/", "test/mel/", "Ä ö/"])
_STEM = st.sampled_from(["x", "X", "y.z", "é", "q_1", "a b"])
_SUFFIX = st.sampled_from([".jpg", ".JPG", ".png", ".jpeg", ".heic", ".bmp", ".webp"])
_KIND = st.sampled_from(["JPEG", "JPEG", "JPEG", "PNG", "BMP", "cut", "heic"])
IMAGES = st.lists(
    st.tuples(_FOLDER, _STEM, _SUFFIX, _KIND, st.sampled_from(LABELS), st.integers(0, 6)), min_size=1, max_size=9
)

Named = dict[str, tuple[bytes, str]]
"""Name of an image to its bytes and its label."""


def photo(seed: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    PillowImage.fromarray(pixels).save(buffer, "JPEG" if kind == "cut" else kind)
    return buffer.getvalue()[:-120] if kind == "cut" else buffer.getvalue()


def drawn(images: list[tuple[str, str, str, str, str, int]]) -> Named:
    made: Named = {}
    for folder, stem, suffix, kind, label, seed in images:
        made.setdefault(f"{folder}{stem}{suffix}", (HEIC if kind == "heic" else photo(seed, kind), label))
    return made


def put(folder: Path, images: Named) -> None:
    for name, (data, _) in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def as_coco(folder: Path, images: Named, said: list[str]) -> list[str]:
    put(folder, images)
    labels = sorted({images[name][1] for name in said})
    document = {
        "images": [{"id": at, "file_name": name} for at, name in enumerate(said)],
        "annotations": [
            {"id": at, "image_id": at, "category_id": labels.index(images[name][1])} for at, name in enumerate(said)
        ],
        "categories": [{"id": at, "name": label} for at, label in enumerate(labels)],
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return list(images)


def as_datumaro(folder: Path, images: Named, said: list[str]) -> list[str]:
    put(folder, images)
    labels = sorted({images[name][1] for name in said})
    items = []
    for name in said:
        mark = {"type": "label", "label_id": labels.index(images[name][1])}
        items.append({"id": name, "image": {"path": name}, "annotations": [mark]})
    document = {"items": items, "categories": {"label": {"labels": [{"name": label} for label in labels]}}}
    (folder / "annotations.json").write_text(json.dumps(document))
    return list(images)


def as_shards(folder: Path, images: Named, said: list[str]) -> list[str]:
    with tarfile.open(folder / "shard-0.tar", "w") as archive:
        for name in said:
            data, label = images[name]
            key = name.rpartition("/")[0] + "/" * ("/" in name) + name.rpartition("/")[2].partition(".")[0]
            for member, content in ((name, data), (f"{key}.cls", label.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    put(folder, {name: images[name] for name in images if name not in said})
    return [f"shard-0.tar/{name}" if name in said else name for name in images]


def as_parquet(folder: Path, images: Named, said: list[str]) -> list[str]:
    rows = {
        "image": [{"bytes": images[name][0], "path": name} for name in said],
        "label": [images[name][1] or None for name in said],
    }
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows["image"], kind), "label": pa.array(rows["label"], pa.string())})
    pq.write_table(table, folder / "data.parquet", row_group_size=3)
    put(folder, {name: images[name] for name in images if name not in said})
    return [f"data.parquet/{name}" if name in said else name for name in images]


def as_table(folder: Path, images: Named, said: list[str]) -> list[str]:
    put(folder, images)
    lines = ["image_id\tdx", *(f"{name}\t{images[name][1]}" for name in said)]
    (folder / "labels.tsv").write_text("\n".join(lines) + "\n")
    return list(images)


FORMS = {"coco": as_coco, "datumaro": as_datumaro, "shards": as_shards, "parquet": as_parquet, "table": as_table}


def accounted(store: Store, report: ImportReport) -> list[str]:
    with store.ledger.read() as tx:
        imported = [image.source_id or "" for image in tx.find(Image)]
    again = [name for name, _ in report.same_bytes]
    return [*imported, *again, *(row.source_id for row in report.quarantined), *report.unlisted]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(images=IMAGES, kept=st.integers(1, 9), form=st.sampled_from(sorted(FORMS)), packed=st.booleans())
def test_each_image_is_imported_quarantined_or_listed(
    tmp_path_factory: pytest.TempPathFactory, images: list[Any], kept: int, form: str, packed: bool
) -> None:
    root = tmp_path_factory.mktemp("packed")
    folder = root / "data"
    folder.mkdir()
    made = drawn(images)
    names = FORMS[form](folder, made, list(made)[:kept])
    place = folder
    if packed:
        place = root / "data.zip"
        with zipfile.ZipFile(place, "w") as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(folder))
    store = open_store(RecordsSettings(home=root / "home"))
    sentence = None
    try:
        report = import_folder(store, place)
        lines = accounted(store, report)
        for name in names:
            # A line of what is not used may go on with the reason.
            assert any(line == name or line.startswith(f"{name}:") for line in lines), (name, lines)
        assert report.images + len(report.same_bytes) + len(report.quarantined) + len(report.unlisted) >= len(names)
        assert report.unlabelled + sum(report.classes.values()) == report.images
    except DataError as error:
        sentence = str(error)
    finally:
        store.close()
    # If nothing at all can be used, the sentence says why.
    assert sentence is None or ("\n" not in sentence and len(sentence) > 20)
