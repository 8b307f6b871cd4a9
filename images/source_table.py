"""A data folder before it is imported: its table, the columns that matter, and the file of every row.

Input: a table with the columns that matter, or a folder per class. Output: a `SourceRow` per row, with the place of its
image or the reason why there is none, and the images that no row uses. No image is decoded here. Which of the layouts
in `images.layouts` a folder has is decided there; all of them make their rows here.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from images.files import ImageIndex, Listing, folder_parts, list_folder, shown
from images.members import ImageFile
from images.table_file import Table, read_table
from records.errors import DataError
from records.ids import sha256_hex
from records.types import Confirmation, Consent, Split
from records.types.base import LINE, Plain, moment

COLUMNS: dict[str, str] = {
    "image": "image_id",
    "dx": "dx",
    "lesion": "lesion_id",
    "patient": "patient_id",
    "split": "split",
    "site": "site",
    "age": "age",
    "sex": "sex",
    "localization": "localization",
    "confirmation": "dx_type",
    "device": "device",
    "acquired": "acquired_at",
}
"""Meaning to the column that is read for it by default; the keys are those of `--columns`."""

REQUIRED = ("image", "dx")
TABLE_NAMES = ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".tab", ".jsonl", ".ndjson"})
_OTHER_TABLES = frozenset({".xlsx", ".xls", ".ods", ".parquet"})
_MARKS = {**dict.fromkeys(("1", "1.0", "1,0", "true", "yes", "x"), True),
          **dict.fromkeys(("0", "0.0", "0,0", "false", "no", ""), False)}  # fmt: skip
_EMPTY = frozenset({"", "unknown", "unk", "nan", "na", "n/a", "none", "null"})
_CONFIRMATIONS = {
    "histo": Confirmation.HISTOPATHOLOGY,
    "followup": Confirmation.FOLLOW_UP,
    # As the ISIC archive writes them.
    "serial_imaging_showing_no_change": Confirmation.FOLLOW_UP,
    "confocal_microscopy_with_consensus_dermoscopy": Confirmation.CONFOCAL,
    "single_image_expert_consensus": Confirmation.CONSENSUS,
    "single_contributor_clinical_assessment": Confirmation.SINGLE_READER,
    **{confirmation.value: confirmation for confirmation in Confirmation},
}
SPLIT_NAMES = {
    "training": Split.TRAIN, "valid": Split.VAL, "validation": Split.VAL, "dev": Split.VAL, "testing": Split.TEST,
    **{split.value: split for split in Split},
}  # fmt: skip
_SPLIT_IN_NAME = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])")
_CONTEXT = ("lesion_id", "patient_id", "site", "device", "sex", "localization")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".parquet")

_NAME = Plain(500)
"""What an image may be called; its name may be a path."""


@dataclass(frozen=True)
class SourceRow:
    """One row of the table.

    Args:
        source_id: the image's name in the table.
        path: its file, or its place in an archive; None if there is none, or if the row cannot be used.
        problem: why there is no path.
        label: as written; None if the row has no diagnosis.
        confirmation: how the diagnosis was established.
        split: the split that the table gives.
        context: lesion_id, patient_id, site, device, sex, localization: text as written, or None.
        age_years: 0 to 130.
        acquired_at: with a time zone.
    """

    source_id: str
    path: ImageFile | None
    problem: str | None
    label: str | None
    confirmation: Confirmation
    split: Split | None
    context: dict[str, str | None]
    age_years: float | None
    acquired_at: datetime | None
    code: str = "missing"
    """of `problem`, see Quarantined"""
    group: str | None = None
    """id of the group that an exported dataset version says"""
    consent: Consent | None = None
    """what an exported dataset version says, which may be less than the import does"""


@dataclass(frozen=True)
class SourceTable:
    """A table that was read.

    Args:
        path: the file.
        content: its bytes, of which an import's id is a hash.
        rows: in the table's order.
        notes: sentences about values that were left out.
        layout: one sentence: which layout the folder was taken for, and why.
        unlisted: images and archives that no row uses, and folders and links that cannot be read, with the reason.
        licences: what the source says about its licence; empty if it says nothing.
        exported_id: id of the dataset version, if it is an export of Relook; its groups and splits are kept.
    """

    path: Path
    content: bytes = field(repr=False)
    rows: list[SourceRow] = field(repr=False)
    notes: list[str]
    layout: str
    unlisted: list[str] = field(repr=False)
    licences: tuple[str, ...] = ()
    exported_id: str | None = None
    folders_may_be_classes: bool = False
    """the labels are names of folders, which may as well be those of patients or visits"""


class Files(Protocol):
    """Finds the image that a row means."""

    def find(self, name: str) -> tuple[ImageFile | None, str | None]:
        """Return (where it is, None), or (None, why there is none)."""


def read_table_folder(folder: Path, columns: Mapping[str, str] | None = None, table: Path | None = None) -> SourceTable:
    """Read the table of a data folder and find the file of every row.

    Args:
        folder: images in any depth, and a table at its top.
        columns: names of the table's columns where they differ from `COLUMNS`, for example {"dx": "diagnosis"}.
        table: the table, if it is not found by its name or by being the only one.
    Returns:
        The table.
    Raises:
        DataError: no table, no such column, no rows, or no images.
    """
    path = _find_table(folder, table)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"the table {path} cannot be read ({error.strerror})") from error
    cells = read_table(path, content)
    hot = _hot_columns(cells, columns or {})
    if hot:
        cells, columns = _with_label(cells, hot), _with_image_column(cells, columns or {})
    mapping = _map_columns(path, cells, dict(columns or {}))
    listing = list_folder(folder)
    layout = f"layout: a table with a row per image, because {shown(path.name)} has the column {mapping['dx']!r}"
    if hot:
        layout = f"layout: a table with a column of 0 and 1 per class, because {shown(path.name)} has {', '.join(hot)}"
    return source_of(path, content, cells, mapping, layout, listing, folder)


def source_of(
    path: Path,
    content: bytes,
    cells: Table,
    mapping: Mapping[str, str],
    layout: str,
    listing: Listing,
    folder: Path,
    files: Files | None = None,
) -> SourceTable:
    """Make the rows of a table that was read.

    Args:
        path: the table, or what holds it.
        content: what an import's id is a hash of.
        cells: its cells.
        mapping: meaning to column.
        layout: the sentence about the layout.
        listing: everything in the folder.
        folder: the folder.
        files: finds the images; by default among the files of the folder.
    Returns:
        The table with its rows.
    Raises:
        DataError: it has no rows, a split that is not known, or there are no images.
    """
    if not cells.length:
        raise DataError(f"the table {path} has no rows; it needs one row per image")
    index = ImageIndex(folder, listing.files)
    if files is None and not index.images:
        raise DataError(f"there are no images in {folder}; {_where_images_may_be(listing)}")
    reader = _RowReader(cells, mapping, files or index, sha256_hex(content))
    rows = list(reader.rows())
    notes = [*cells.notes, *reader.notes()]
    return SourceTable(path, content, rows, notes, layout, unlisted(folder, rows, index.images, listing))


def split_in(name: str) -> Split | None:
    """Return the split that the name of a file or folder says, such as `instances_val2017`; None if it says none."""
    found = _SPLIT_IN_NAME.search(name.lower())
    return SPLIT_NAMES[found[1]] if found else None


def _hot_columns(table: Table, given: Mapping[str, str]) -> list[str]:
    """Return the columns of a table that marks the class of each row with a 1; none if it has a column of labels."""
    named = {*COLUMNS.values(), *given.values(), "image"}
    if "dx" in given or COLUMNS["dx"] in table.columns:
        return []
    others = [name for name in table.columns if name not in named]
    marks = all(mark_of(cell) is not None for name in others for cell in table.columns[name])
    return others if len(others) > 1 and marks else []


def _with_label(table: Table, hot: Sequence[str]) -> Table:
    labels, conflicts = [], dict(table.conflicts)
    for row in range(table.length):
        marked = [name for name in hot if mark_of(table.columns[name][row])]
        if len(marked) > 1:
            conflicts.setdefault(row, f"it is marked as {' and '.join(marked)}")
        labels.append(next(iter(marked), ""))
    return replace(table, columns={**table.columns, COLUMNS["dx"]: labels}, conflicts=conflicts)


def _with_image_column(table: Table, given: Mapping[str, str]) -> dict[str, str]:
    # The truth tables of the ISIC challenges call it so.
    found = {"image": "image"} if "image" in table.columns and COLUMNS["image"] not in table.columns else {}
    return {**found, **given}


def unlisted(folder: Path, rows: Sequence[SourceRow], images: Sequence[Path], listing: Listing) -> list[str]:
    """Return a line for each image or archive that no row uses, and for each folder or link that cannot be read."""
    used = {(row.path if isinstance(row.path, Path) else row.path.archive).resolve() for row in rows if row.path}
    unused = [shown(path.relative_to(folder)) for path in images if path.resolve() not in used]
    archives = [path for path in listing.files if path.name.lower().endswith(_ARCHIVES) and path.resolve() not in used]
    unread = [(path, "it is an archive whose images are not read in this layout") for path in archives]
    listed = [*unused, *(f"{shown(path.relative_to(folder))}: {why}" for path, why in [*unread, *listing.unreadable])]
    return [_NAME.keep(one) for one in listed]


def read_class_folders(folder: Path, listing: Listing, columns: Mapping[str, str] | None = None) -> SourceTable:
    """Read a folder without a table: the folder of an image is its class, below a folder per split if there are any.

    DataError is raised if `columns` names some, or no image is in a folder.
    """
    images = ImageIndex(folder, listing.files).images
    parts = {path: folder_parts(folder, path) for path in images}
    # Archives are often packed with one folder around everything.
    skipped = 0
    while len({found[skipped] for found in parts.values() if len(found) > skipped}) == 1 and all(
        len(found) > skipped + 1 for found in parts.values()
    ):
        if next(iter(parts.values()))[skipped].lower() in SPLIT_NAMES:
            break
        skipped += 1
    parts = {path: found[skipped:] for path, found in parts.items()}
    workbooks = [path for path in listing.files if path.suffix.lower() in _OTHER_TABLES and path.parent == folder]
    if columns or workbooks or not any(parts.values()):
        other = f"; save {shown(workbooks[0].name)} as CSV" if workbooks else ""
        other = f"; {_where_images_may_be(listing)}" if not images else other
        raise DataError(
            f"there is no table in {folder}; it needs HAM10000_metadata.csv, or one CSV file with a row per image, "
            f"or a folder per class{other}"
        )
    has_splits = _below_splits(list(parts.values()))
    rows = []
    for path, found in parts.items():
        split = SPLIT_NAMES.get(found[0].lower()) if has_splits and found else None
        # An image beside the folders of the splits is in none of their classes.
        label = next(iter(found[1:] if has_splits else found), None)
        rows.append(row_of_folder(shown(path.relative_to(folder)), path, label, split))
    layout = "layout: a folder per class" + (" below a folder per split" if has_splits else "")
    layout += f", because there is no table at the top of {shown(folder)}"
    # Stands for the table: the same files are the same import.
    content = "\n".join(row.source_id for row in rows).encode()
    return SourceTable(folder, content, rows, [], layout, unlisted(folder, rows, images, listing))


def _below_splits(parts: Sequence[tuple[str, ...]]) -> bool:
    """Return whether the folders of classes lie in folders of splits; other folders may hold single images."""
    deep = [found[0].lower() in SPLIT_NAMES for found in parts if len(found) > 1]
    return all(deep) if any(deep) else all(found[0].lower() in SPLIT_NAMES for found in parts if found)


def row_of_folder(name: str, path: Path, label: str | None, split: Split | None) -> SourceRow:
    """Return the row of an image without a table; its label is the name of a folder, or None."""
    label = None if label is None else shown(label).strip()
    for text in (name, label or ""):
        try:
            _NAME.check(text)
        except ValueError as error:
            return _unusable_row(_NAME.keep(name), f"{_NAME.keep(name)}: {error}")
    context = dict.fromkeys(_CONTEXT)
    return SourceRow(
        _NAME.check(name),
        path,
        None,
        label and _NAME.check(label),
        Confirmation.SINGLE_READER,
        split,
        context,
        None,
        None,
    )


def _find_table(folder: Path, table: Path | None) -> Path:
    if table is not None:
        path = table if table.is_absolute() or table.is_file() else folder / table
        if not path.is_file():
            raise DataError(f"there is no table {table}; give the path of a CSV file with one row per image")
        return path
    for name in TABLE_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = tables_of(folder)
    if len(found) == 1:
        return found[0]
    names = ", ".join(shown(p.name) for p in found[:5])
    raise DataError(f"{folder} holds {len(found)} tables ({names}); name the right one with --table")


def tables_of(folder: Path) -> list[Path]:
    """Return the files at the top of a folder that may be its table, by name."""
    named = {folder / name for name in TABLE_NAMES if (folder / name).is_file()}
    found = {p for p in folder.iterdir() if p.suffix.lower() in TABLE_SUFFIXES and not p.name.startswith(".")}
    return sorted(named | found)


def _map_columns(path: Path, table: Table, given: dict[str, str]) -> dict[str, str]:
    """Return meaning to column, only for columns that exist."""
    unknown = sorted(set(given) - set(COLUMNS))
    if unknown:
        raise DataError(f"--columns does not take {unknown[0]!r}; it takes {', '.join(COLUMNS)}")
    have = ", ".join(table.columns)
    for what, name in given.items():
        if name not in table.columns:
            raise DataError(f"the table {path} has no column {name!r} for {what}; it has {have}")
    written = {name.casefold().replace(" ", "_"): name for name in reversed(table.columns)}
    mapping = {what: given.get(what, written.get(name, name)) for what, name in COLUMNS.items()}
    mapping |= {what: name for what, name in COLUMNS.items() if what not in given and name in table.columns}
    for what in REQUIRED:
        if mapping[what] not in table.columns:
            raise DataError(
                f"the table {path} has no column {mapping[what]!r}; it has {have}; "
                f"name the right one with --columns {what}=NAME"
            )
    return {what: name for what, name in mapping.items() if name in table.columns}


class _RowReader:
    """Reads rows, and counts the values that cannot be used."""

    def __init__(self, table: Table, mapping: Mapping[str, str], files: Files, table_hash: str) -> None:
        self._columns = {what: table.columns[name] for what, name in mapping.items()}
        self._length, self._files = table.length, files
        self._problems, self._conflicts = table.problems, table.conflicts
        self._counts: dict[str, int] = {}
        self._number_lesions(table_hash[:8])

    def _number_lesions(self, prefix: str) -> None:
        """Keep lesions apart that a table numbers anew for each patient."""
        lesions, patients = self._columns.get("lesion"), self._columns.get("patient")
        if lesions is None or patients is None:
            return
        owners: dict[str, set[str]] = {}
        for lesion, patient in zip(lesions, patients, strict=True):
            if _text(lesion) and _text(patient):
                owners.setdefault(lesion, set()).add(patient)
        shared = sum(len(found) > 1 for found in owners.values())
        if not shared:
            return
        # A number and not the patient's id, which is never stored.
        number = {patient: at for at, patient in enumerate(dict.fromkeys(patients), 1)}
        self._columns["lesion"] = [
            f"{prefix}:{number[patient]}:{lesion}" if _text(lesion) else "" for lesion, patient in
            zip(lesions, patients, strict=True)
        ]  # fmt: skip
        self._note("lesions are named alike for several patients and were told apart by patient", shared)

    def rows(self) -> Iterator[SourceRow]:
        """Yield the rows of the table."""
        for index in range(self._length):
            cell = {what: _text(values[index]) for what, values in self._columns.items()}
            source_id = self._columns["image"][index]
            conflict = self._conflicts.get(index)
            unusable = self._problems.get(index) or conflict or _first_unusable(cell)
            if unusable is not None:
                name, code = _NAME.keep(source_id) or f"row {index + 1}", "label_conflict" if conflict else "unreadable"
                yield replace(_unusable_row(name, f"row {index + 1}, {unusable}"), code=code)
                continue
            cell = {what: value if value is None else _NAME.check(value) for what, value in cell.items()}
            path, problem = self._files.find(source_id) if source_id else (None, f"row {index + 1} names no image")
            yield SourceRow(
                source_id=source_id or f"row {index + 1}",
                path=path,
                problem=problem,
                label=_NAME.check(self._columns["dx"][index]) or None,
                confirmation=self._confirmation(cell.get("confirmation"), cell["dx"]),
                split=self._split(cell.get("split")),
                context={
                    "lesion_id": cell.get("lesion"),
                    "patient_id": cell.get("patient"),
                    **{name: cell.get(name) for name in ("site", "device", "sex", "localization")},
                },
                age_years=self._age(cell.get("age")),
                acquired_at=self._time(cell.get("acquired")),
            )

    def notes(self) -> list[str]:
        """Return one sentence per kind of value that was left out."""
        return [f"{count} {text}" for text, count in self._counts.items()]

    def _note(self, text: str, count: int = 1) -> None:
        self._counts[text] = self._counts.get(text, 0) + count

    def _confirmation(self, text: str | None, label: str | None) -> Confirmation:
        if text is None:
            return Confirmation.SINGLE_READER
        known = _CONFIRMATIONS.get(text.lower().replace("-", "_").replace(" ", "_"))
        # Without a diagnosis there is nothing that the unknown method could have confirmed.
        if known is None and label is not None:
            self._note(f"diagnoses were confirmed by {text!r}, which is not known; they count as one reader's")
        return known or Confirmation.SINGLE_READER

    def _split(self, text: str | None) -> Split | None:
        if text is None:
            return None
        # An unknown split is an error and not a note: ignoring it could put held-out images into training.
        split = SPLIT_NAMES.get(text.lower())
        if split is None:
            raise DataError(
                f"the table gives the split {text!r}; it must be one of {', '.join(s.value for s in Split)}"
            )
        return split

    def _age(self, text: str | None) -> float | None:
        if text is None:
            return None
        try:
            # Spreadsheets write a decimal comma in many countries.
            years = float(text.replace(",", "."))
        except ValueError:
            years = math.nan
        if not 0 <= years <= 130:
            self._note("ages are not numbers from 0 to 130 and were left out")
            return None
        return years

    def _time(self, text: str | None) -> datetime | None:
        if text is None:
            return None
        try:
            written = datetime.fromisoformat(text)
            # Times in the ledger are aware; one without a zone is taken as UTC.
            return moment(written if written.tzinfo else written.replace(tzinfo=UTC))
        except ValueError:
            self._note("times are not ISO 8601 from 1900 to 2199 and were left out")
            return None


def _first_unusable(cell: Mapping[str, str | None]) -> str | None:
    """Return the column with a text that cannot be stored and what is wrong with it, or None."""
    for what, text in cell.items():
        try:
            (_NAME if what == "image" else LINE).check(text or "")
        except ValueError as error:
            return f"column {what}: {error}"
    return None


def _unusable_row(source_id: str, problem: str) -> SourceRow:
    empty: dict[str, str | None] = dict.fromkeys(_CONTEXT)
    nothing = Confirmation.SINGLE_READER
    return SourceRow(source_id, None, problem, None, nothing, None, empty, None, None, code="unreadable")


def mark_of(cell: str) -> bool | None:
    """Return whether a cell of a column per class marks its row; None if it is no mark."""
    return _MARKS.get(cell.lower())


def _where_images_may_be(listing: Listing) -> str:
    archives = [shown(path.name) for path in listing.files if path.name.lower().endswith(_ARCHIVES)]
    if archives:
        return f"unpack {' and '.join(archives[:3])} there, or import one archive that holds both table and images"
    return "put .jpg, .png or .webp files into it or its subfolders"


def is_blank(text: str) -> bool:
    """Return whether a cell says that nothing is known; a taxonomy may have a class of that name."""
    return _text(text) is None


def _text(value: str) -> str | None:
    return None if value.lower() in _EMPTY else value
