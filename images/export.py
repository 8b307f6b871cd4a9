"""Write a dataset version for other tools: a table, a folder per class, parquet files, or WebDataset shards.

    relook data export VERSION --format csv|imagefolder|parquet|webdataset

Output: a folder with the images, their splits, labels and label sources, the taxonomy, the licences of the sources, and
`dataset.json`, which is written last. Importing the folder gives a dataset version of the same id. Images outside the
home are reached by no erasure, so every export is audited.
"""

import csv
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
import yaml
from rich.progress import Progress

from images.import_plan import IMPORT_ACTION
from images.layouts.exported import DESCRIPTION, FORMS, MARK, TABLE
from records import audit
from records.datasets import DatasetVersion, content_id
from records.durable import make_folders, write_file
from records.errors import ConfigError
from records.ids import sha256_hex
from records.images import strip_metadata
from records.ledger.tables import TABLES
from records.store import Store, find_images, read_image
from records.types import LABEL_RANK, AuditEvent, Confirmation, Image, SourceLabel, Split

EXPORT_ACTION = "data.exported"
"""Action of the audit event; its subject is the dataset version's id."""

LICENCE_FILE, TAXONOMY_FILE = "LICENCE.txt", "taxonomy.yaml"
_SUFFIXES = {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}
_IMAGES_PER_FILE = 1_000  # of a split, which are in memory until their file is written
_IMAGES_PER_ROW_GROUP = 200
_NOT_IN_FOLDERS = re.compile(r"[^\w.-]")
_NO_LICENCE = "no licence was stated; ask whoever the images came from"


@dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Args:
        folder: what was written.
        form: csv, imagefolder, parquet or webdataset.
        dataset_id: the id that importing the folder gives.
        images: number of images.
        splits: images per split.
        licences: what the sources said about their licences.
        notes: sentences about images that differ from those in the version.
    """

    folder: Path
    form: str
    dataset_id: str
    images: int
    splits: dict[str, int]
    licences: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class _Item:
    """An image as it is written: its cells by column name, its file name and its bytes."""

    cells: dict[str, str]
    name: str
    data: bytes


def export_dataset(
    store: Store, dataset: DatasetVersion, form: str, folder: Path, *, progress: Progress | None = None
) -> ExportReport:
    """Write a dataset version into a folder.

    Args:
        store: holds the images.
        dataset: the version.
        form: one of `layouts.exported.FORMS`.
        folder: empty or missing.
        progress: gets a bar.
    Returns:
        The report.
    Raises:
        ConfigError: there is no such form, or the folder holds something.
        DataError: the file of an image that was imported in place is gone.
    """
    if form not in FORMS:
        raise ConfigError(f"there is no format {form!r}; --format takes {', '.join(FORMS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; give --out an empty or a new folder")
    make_folders(folder, sync=False)
    images = find_images(store, dataset.rows["image_id"].tolist())
    changed: dict[str, str] = {}
    _WRITERS[form](folder, dataset, _items(store, dataset, images, changed, progress))
    # In-place files keep metadata that an export leaves out, and other bytes are another image.
    rows = dataset.rows.assign(image_id=dataset.rows["image_id"].replace(changed))
    rows = rows.sort_values("image_id", ignore_index=True)
    report = ExportReport(
        folder=folder,
        form=form,
        dataset_id=content_id(rows, dataset.taxonomy_hash),
        images=len(rows),
        splits={split.value: int((rows["split"] == split.value).sum()) for split in Split},
        licences=_write_licences(store, folder, images),
        notes=[f"{len(changed)} images were imported in place with metadata and are written without it, as new images"]
        if changed
        else [],
    )
    taxonomy = yaml.safe_dump(store.taxonomy.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_file(folder / TAXONOMY_FILE, taxonomy, sync=False)
    said = {**report.as_dict(), MARK: 1, "taxonomy_hash": dataset.taxonomy_hash}
    del said["folder"], said["notes"]
    write_file(folder / DESCRIPTION, json.dumps(said, indent=2, ensure_ascii=False) + "\n", sync=False)
    with store.ledger.begin() as tx:
        details = {"form": form, "images": len(rows), "id_of_export": report.dataset_id}
        audit.append(tx, actor="local", action=EXPORT_ACTION, subject=dataset.id, details=details)
    return report


def _items(
    store: Store, dataset: DatasetVersion, images: Sequence[Image], changed: dict[str, str], progress: Progress | None
) -> Iterator[_Item]:
    """Yield the images in the order of the version; `changed` collects the ids that differ in the export."""
    confirmations = _confirmations(store, dataset.rows)
    task = progress.add_task("Writing images", total=len(images)) if progress else None
    for image, row in zip(images, dataset.rows.to_dict("records"), strict=True):
        data = strip_metadata(read_image(store, image))
        image_id = sha256_hex(data)
        if image_id != image.id:
            changed[image.id] = image_id
        cells = {
            "dx": row["label"],
            "dx_type": confirmations[image.id],
            "split": row["split"],
            "lesion_id": image.lesion_id,
            # The salted hash: it links the images of a patient, and the id itself is not stored.
            "patient_id": image.patient_hash,
            "age": image.age_years,
            "sex": image.sex,
            "localization": image.localization,
            "site": image.site,
            "device": image.device,
            "acquired_at": image.acquired_at.isoformat() if image.acquired_at else None,
            "group_id": row["group_id"],
            "label_source": row["label_source"],
            "label_rank": row["label_rank"],
            "source_id": image.source_id,
            "consent": image.consent.value,
        }
        texts = {name: "" if value is None else str(value) for name, value in cells.items()}
        yield _Item(texts, image_id + _SUFFIXES[image.format], data)
        if progress and task is not None:
            progress.advance(task)


def _confirmations(store: Store, rows: pd.DataFrame) -> dict[str, str]:
    """Return how the label of each image was established: as it was imported, else what has its rank."""
    table = TABLES[SourceLabel].c
    with store.ledger.read() as tx:
        query = sa.select(table.image_id, table.label, table.source, table.confirmation)
        said = {(i, label, source): Confirmation(c) for i, label, source, c in tx.connection.execute(query)}
    of_rank = {rank: confirmation for confirmation, rank in reversed(LABEL_RANK.items())}
    found: dict[str, str] = {}
    columns = (rows[name].tolist() for name in ("image_id", "label", "label_source", "label_rank"))
    for image_id, label, source, rank in zip(*columns, strict=True):
        imported = said.get((image_id, label, source))
        found[image_id] = imported if imported and LABEL_RANK[imported] == rank else of_rank[rank]
    return found


@dataclass(frozen=True)
class SourceOfImages:
    """What is known about where some images came from.

    Args:
        provenance: as of the images.
        images: how many.
        reading: how their import read its source; empty if that is unknown.
        licences: what the source said about its licence; empty if it said nothing.
    """

    provenance: str
    images: int
    reading: str
    licences: tuple[str, ...]


def sources_of(store: Store, images: Sequence[Image]) -> list[SourceOfImages]:
    """Return the sources of images, with the licences that they stated when they were imported."""
    with store.ledger.read() as tx:
        events = tx.find(AuditEvent, where={"action": IMPORT_ACTION}, order_by=("number",))
    details = {f"import:{event.subject}": event.details for event in events}
    found = []
    for provenance, count in sorted(Counter(image.provenance for image in images).items()):
        of_import = details.get(provenance, {})
        said = tuple(str(text) for text in of_import.get("licences", ()))
        found.append(SourceOfImages(provenance, count, str(of_import.get("reading") or ""), said))
    return found


def _write_licences(store: Store, folder: Path, images: Sequence[Image]) -> list[str]:
    """Write which licences the sources stated when they were imported, and return them."""
    lines, stated = [], dict[str, None]()
    for source in sources_of(store, images):
        stated.update(dict.fromkeys(source.licences))
        read = f", {source.reading}" if source.reading else ""
        lines += [f"{source.provenance}: {source.images} images{read}"]
        lines += [f"  {text}" for text in source.licences or [_NO_LICENCE]]
    head = f"Licences that the sources state: {'; '.join(stated) or 'none was stated'}"
    text = "\n".join([head, "", *lines, "", "Relook records what a source states and checks no licence.", ""])
    write_file(folder / LICENCE_FILE, text, sync=False)
    return list(stated)


# ---------------------------------------------------------------- forms


def _write_csv(folder: Path, dataset: DatasetVersion, items: Iterator[_Item]) -> None:
    _write_table(folder, items, lambda item: f"images/{item.name}")


def _write_imagefolder(folder: Path, dataset: DatasetVersion, items: Iterator[_Item]) -> None:
    def place(item: _Item) -> str:
        return f"{item.cells['split']}/{_NOT_IN_FOLDERS.sub('_', item.cells['dx'])}/{item.name}"

    _write_table(folder, items, place)


def _write_table(folder: Path, items: Iterator[_Item], place: Callable[[_Item], str]) -> None:
    out = io.StringIO()
    writer = None
    for item in items:
        name = place(item)
        make_folders((folder / name).parent, sync=False)
        write_file(folder / name, item.data, sync=False)
        if writer is None:
            writer = csv.DictWriter(out, ["image_id", *item.cells], lineterminator="\n")
            writer.writeheader()
        writer.writerow({"image_id": name, **item.cells})
    write_file(folder / TABLE, out.getvalue(), sync=False)


def _write_parquet(folder: Path, dataset: DatasetVersion, items: Iterator[_Item]) -> None:
    for split, number, total, part in _files(dataset, items):
        make_folders(folder / "data", sync=False)
        path = folder / "data" / f"{split}-{number:05d}-of-{total:05d}.parquet"
        pq.write_table(_table_of(part), path, row_group_size=_IMAGES_PER_ROW_GROUP)


def _table_of(batch: Sequence[_Item]) -> pa.Table:
    names = [name for name in batch[0].cells if name != "dx"]
    features = {"image": {"_type": "Image"}, **{n: {"dtype": "string", "_type": "Value"} for n in ("label", *names)}}
    columns: dict[str, Any] = {
        "image": pa.array([{"bytes": item.data, "path": item.name} for item in batch]),
        "label": pa.array([item.cells["dx"] for item in batch], pa.string()),
        **{name: pa.array([item.cells[name] or None for item in batch], pa.string()) for name in names},
    }
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _write_webdataset(folder: Path, dataset: DatasetVersion, items: Iterator[_Item]) -> None:
    for split, number, _, part in _files(dataset, items):
        with tarfile.open(folder / f"{split}-{number:06d}.tar", "w") as archive:
            for item in part:
                key = item.name.partition(".")[0]
                document = json.dumps({"label": item.cells["dx"], **item.cells}, ensure_ascii=False)
                texts = {f"{key}.cls": item.cells["dx"], f"{key}.json": document}
                for name, data in {item.name: item.data, **{n: text.encode() for n, text in texts.items()}}.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def _files(dataset: DatasetVersion, items: Iterator[_Item]) -> Iterator[tuple[str, int, int, list[_Item]]]:
    """Yield (split, number, number of files of the split, its images): each file holds images of one split."""
    left = Counter(dataset.rows["split"])
    totals = {split: -(-count // _IMAGES_PER_FILE) for split, count in left.items()}
    waiting: dict[str, list[_Item]] = {split: [] for split in left}
    number: Counter[str] = Counter()
    for item in items:
        split = item.cells["split"]
        waiting[split].append(item)
        left[split] -= 1
        if len(waiting[split]) == _IMAGES_PER_FILE or not left[split]:
            yield split, number[split], totals[split], waiting[split]
            number[split] += 1
            waiting[split] = []


_WRITERS: dict[str, Callable[[Path, DatasetVersion, Iterator[_Item]], None]] = {
    "csv": _write_csv,
    "imagefolder": _write_imagefolder,
    "parquet": _write_parquet,
    "webdataset": _write_webdataset,
}
