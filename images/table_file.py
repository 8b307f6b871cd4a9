"""A CSV table as spreadsheets and databases write it (encoding, delimiter, rows that do not fit), or JSON lines.

In: the bytes of a file. Out: the cells as text, each under its column. A row with more cells than the header has is
kept with the reason why it cannot be used, because a value in the wrong column is worse than a missing one.
"""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

from records.errors import DataError

_DELIMITERS = ",;\t|"
_MARKS = ((b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"),
          (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig"))  # fmt: skip
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")


@dataclass(frozen=True)
class Table:
    """The cells of a table.

    Args:
        columns: column name to its cells, all of the same length, without spaces around them.
        problems: row index to what is wrong with the row.
        notes: sentences about how the table was read.
        length: number of rows.
        conflicts: row index to the classes that it names, where these are several.
    """

    columns: dict[str, list[str]]
    problems: dict[int, str]
    notes: list[str]
    length: int
    conflicts: dict[int, str] = field(default_factory=dict)


def read_table(path: Path, data: bytes) -> Table:
    """Return the cells of a table; DataError if it is not a CSV table."""
    text, notes = _decoded(path, data)
    if text.lstrip().startswith("{"):
        return _json_lines(path, text, notes)
    first, _, rest = text.partition("\n")
    # Excel reads and writes this line; it is no header.
    said = first.strip().strip('"')
    delimiter = ""
    if said.lower().startswith("sep=") and len(said) <= 5:
        text, delimiter = rest, said[4:] or "\t"
    delimiter = delimiter or max(_DELIMITERS, key=_header(text).count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        # Spreadsheets end with rows that hold delimiters only.
        rows = [cells for row in reader if any(cells := [cell.strip() for cell in row])]
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV table: line {reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"{path} is not a CSV table: it is empty")
    header, *rows = rows
    while not header[-1]:
        header.pop()
    names = [name or f"column {number}" for number, name in enumerate(header, 1)]
    doubled = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if doubled is not None:
        raise DataError(f"{path} has two columns {doubled!r}; remove one of them")
    problems = {}
    for index, row in enumerate(rows):
        if any(row[len(names) :]):
            problems[index] = f"{len(row)} cells where the header has {len(names)}, so its columns are not known"
        row.extend([""] * (len(names) - len(row)))
    columns = {name: [row[at] for row in rows] for at, name in enumerate(names)}
    return Table(columns, problems, notes, len(rows))


def _json_lines(path: Path, text: str, notes: list[str]) -> Table:
    """Return the cells of a table with a JSON object per line; lists and objects in it are no cells."""
    rows: list[dict[str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not a table of JSON lines: line {number}: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"{path} is not a table of JSON lines: line {number} is no object")
        rows.append({str(key).strip(): "" if value is None else str(value).strip() for key, value in values.items()
                     if not isinstance(value, dict | list)})  # fmt: skip
    names = dict.fromkeys(name for row in rows for name in row)
    return Table({name: [row.get(name, "") for row in rows] for name in names}, {}, notes, len(rows))


def _header(text: str) -> str:
    """Return the first line that holds anything."""
    return next((line for line in text.splitlines() if line.strip()), "")


def _decoded(path: Path, data: bytes) -> tuple[str, list[str]]:
    if data.startswith(_WORKBOOKS):
        raise DataError(f"{path} is a workbook or an archive, not a CSV table; save it as `CSV UTF-8`")
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and len(data) >= 4 and 0 in (data[0], data[1]):
        # UTF-16 without a mark: every other byte of a header in Latin letters is zero.
        encoding = "utf-16-be" if data[0] == 0 else "utf-16-le"
    try:
        return data.decode(encoding), []
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise DataError(f"{path} is not a CSV table: it is not whole {encoding.upper()}") from error
    try:
        return data.decode("cp1252"), [f"{path.name} is not UTF-8 and was read as Windows-1252 (cp1252)"]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not a CSV table in UTF-8, UTF-16 or Windows-1252; save it as `CSV UTF-8`"
        ) from error
