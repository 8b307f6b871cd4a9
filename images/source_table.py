"""A data folder before it is imported: its table, the columns that matter, and the file of every row.

Input: HAM10000's official layout, or any folder of images with a table. Output: a `SourceRow` per row, with a path or
the reason why there is none. No image is opened here.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from records.errors import DataError
from records.images import IMAGE_SUFFIXES
from records.types import Confirmation, Split
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

_TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".tab"})
_EMPTY = frozenset({"", "unknown", "nan", "na", "n/a", "none", "null"})
_CONFIRMATIONS = {
    "histo": Confirmation.HISTOPATHOLOGY,
    "followup": Confirmation.FOLLOW_UP,
    **{confirmation.value: confirmation for confirmation in Confirmation},
}
_SPLITS = {
    "training": Split.TRAIN, "valid": Split.VAL, "validation": Split.VAL, "testing": Split.TEST,
    **{split.value: split for split in Split},
}  # fmt: skip


_NAME = Plain(500)
"""What an image may be called; its name may be a path."""


@dataclass(frozen=True)
class SourceRow:
    """One row of the table.

    Args:
        source_id: the image's name in the table.
        path: its file; None if there is none, or if the row cannot be used.
        problem: why there is no path.
        label: as written; None if the row has no diagnosis.
        confirmation: how the diagnosis was established.
        split: the split that the table gives.
        context: lesion_id, patient_id, site, device, sex, localization: text as written, or None.
        age_years: 0 to 130.
        acquired_at: with a time zone.
    """

    source_id: str
    path: Path | None
    problem: str | None
    label: str | None
    confirmation: Confirmation
    split: Split | None
    context: dict[str, str | None]
    age_years: float | None
    acquired_at: datetime | None
    code: str = "missing"
    """of `problem`, see Quarantined"""


@dataclass(frozen=True)
class SourceTable:
    """A table that was read.

    Args:
        path: the file.
        content: its bytes, of which an import's id is a hash.
        rows: in the table's order.
        notes: sentences about values that were left out.
    """

    path: Path
    content: bytes = field(repr=False)
    rows: list[SourceRow] = field(repr=False)
    notes: list[str]


def read_source(folder: Path, columns: Mapping[str, str] | None = None, table: Path | None = None) -> SourceTable:
    """Read the table of a data folder and find the file of every row.

    Args:
        folder: images in any depth, and a table at its top.
        columns: names of the table's columns where they differ from `COLUMNS`, for example {"dx": "diagnosis"}.
        table: the table, if it is not found by its name or by being the only one.
    Returns:
        The table.
    Raises:
        DataError: no folder, no table, no such column, no rows, or no images.
    """
    if not folder.is_dir():
        raise DataError(f"there is no data folder {folder}; give a folder with images and a table")
    path = _find_table(folder, table)
    frame = _read_frame(path)
    mapping = _map_columns(path, frame, dict(columns or {}))
    if frame.empty:
        raise DataError(f"the table {path} has no rows; it needs one row per image")
    files = _Files(folder)
    if not files.by_stem:
        raise DataError(f"there are no images in {folder}; put .jpg, .png or .webp files into it or its subfolders")
    reader = _RowReader(frame, mapping, files)
    rows = list(reader.rows())
    return SourceTable(path, path.read_bytes(), rows, reader.notes())


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
    if not found:
        raise DataError(
            f"there is no table in {folder}; it needs HAM10000_metadata.csv, or one CSV file with a row per image"
        )
    names = ", ".join(p.name for p in found[:5])
    raise DataError(f"{folder} holds {len(found)} tables ({names}); name the right one with --table")


def tables_of(folder: Path) -> list[Path]:
    """Return the files at the top of a folder that may be its table, by name."""
    named = {folder / name for name in TABLE_NAMES if (folder / name).is_file()}
    found = {p for p in folder.iterdir() if p.suffix.lower() in _TABLE_SUFFIXES and not p.name.startswith(".")}
    return sorted(named | found)


def _read_frame(path: Path) -> pd.DataFrame:
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        # Tables of spreadsheets use semicolons in some countries; the header tells which separator is meant.
        separator = max(",;\t", key=header.count)
        # Everything as text: pandas would turn ids such as 0012 into numbers, and NA into a missing value.
        # Spreadsheets write a byte order mark, which utf-8-sig removes.
        frame = pd.read_csv(
            path, sep=separator, dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig"
        )
    except ValueError as error:
        raise DataError(f"{path} is not a table in UTF-8 CSV: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise DataError(f"the table {path} cannot be read ({error.strerror})") from error
    frame = frame.rename(columns=lambda name: str(name).strip())
    if not frame.columns.is_unique:
        doubled = frame.columns[frame.columns.duplicated()][0]
        raise DataError(f"{path} has two columns {doubled!r}; remove one of them")
    return frame


def _map_columns(path: Path, frame: pd.DataFrame, given: dict[str, str]) -> dict[str, str]:
    """Return meaning to column, only for columns that exist."""
    unknown = sorted(set(given) - set(COLUMNS))
    if unknown:
        raise DataError(f"--columns does not take {unknown[0]!r}; it takes {', '.join(COLUMNS)}")
    have = ", ".join(map(str, frame.columns))
    for what, name in given.items():
        if name not in frame.columns:
            raise DataError(f"the table {path} has no column {name!r} for {what}; it has {have}")
    mapping = {what: given.get(what, name) for what, name in COLUMNS.items()}
    for what in REQUIRED:
        if mapping[what] not in frame.columns:
            raise DataError(
                f"the table {path} has no column {mapping[what]!r}; it has {have}; "
                f"name the right one with --columns {what}=NAME"
            )
    return {what: name for what, name in mapping.items() if name in frame.columns}


class _Files:
    """The images of a folder, indexed by the ways a table may name them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_stem: dict[str, list[Path]] = {}
        self.by_name: dict[str, list[Path]] = {}
        for path in self._walk(str(folder)):
            self.by_stem.setdefault(path.stem, []).append(path)
            self.by_name.setdefault(path.name, []).append(path)

    def _walk(self, folder: str) -> Iterator[Path]:
        """Yield the images in a fixed order, so that equal folders give equal imports."""
        # scandir, since asking for the type of each of 10,000 entries would be a system call each.
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from self._walk(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(entry.path)

    def find(self, source_id: str) -> tuple[Path | None, str | None]:
        """Return (path, None), or (None, why there is none)."""
        try:
            return self._find(source_id)
        except (OSError, RuntimeError) as error:  # a name that is too long, a link that leads to itself
            return None, f"{source_id} cannot be read ({getattr(error, 'strerror', error)})"

    def _find(self, source_id: str) -> tuple[Path | None, str | None]:
        # A name in a table may be a path, but never one that leaves the folder.
        if "/" in source_id:
            # Resolved, so that neither `..` nor a symbolic link leads out of the folder.
            path = (self.folder / source_id).resolve()
            if not path.is_relative_to(self.folder.resolve()):
                return None, f"{source_id} lies outside {self.folder}"
            return (path, None) if path.is_file() else (None, f"there is no file {source_id} in {self.folder}")
        found = self.by_name.get(source_id) or self.by_stem.get(source_id) or []
        if not found:
            return None, f"there is no image named {source_id} in {self.folder}"
        # Several files of one name are no problem if they are the same image.
        if len(found) > 1 and len({path.read_bytes() for path in found}) > 1:
            names = " and ".join(str(path.relative_to(self.folder)) for path in found[:2])
            return None, f"{source_id} could be {names}; write the path into the table"
        return found[0], None


class _RowReader:
    """Reads rows, and counts the values that cannot be used."""

    def __init__(self, frame: pd.DataFrame, mapping: Mapping[str, str], files: _Files) -> None:
        self._columns = {what: frame[name].str.strip().tolist() for what, name in mapping.items()}
        self._length, self._files = len(frame), files
        self._counts: dict[str, int] = {}

    def rows(self) -> Iterator[SourceRow]:
        """Yield the rows of the table."""
        for index in range(self._length):
            cell = {what: _text(values[index]) for what, values in self._columns.items()}
            source_id = self._columns["image"][index]
            unusable = _first_unusable(cell)
            if unusable is not None:
                yield _unusable_row(_NAME.keep(source_id) or f"row {index + 1}", f"row {index + 1}, {unusable}")
                continue
            cell = {what: value if value is None else _NAME.check(value) for what, value in cell.items()}
            path, problem = self._files.find(source_id) if source_id else (None, f"row {index + 1} names no image")
            yield SourceRow(
                source_id=source_id or f"row {index + 1}",
                path=path,
                problem=problem,
                label=cell["dx"],
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

    def _note(self, text: str) -> None:
        self._counts[text] = self._counts.get(text, 0) + 1

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
        split = _SPLITS.get(text.lower())
        if split is None:
            raise DataError(
                f"the table gives the split {text!r}; it must be one of {', '.join(s.value for s in Split)}"
            )
        return split

    def _age(self, text: str | None) -> float | None:
        if text is None:
            return None
        try:
            years = float(text)
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
    empty = dict.fromkeys(("lesion_id", "patient_id", "site", "device", "sex", "localization"))
    nothing = Confirmation.SINGLE_READER
    return SourceRow(source_id, None, problem, None, nothing, None, empty, None, None, code="unreadable")


def _text(value: str) -> str | None:
    return None if value.lower() in _EMPTY else value
