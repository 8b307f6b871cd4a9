"""A table of what is known about images beside their pixels: a row per image with age, sex, body site and the like.

In: a CSV table as `images.source_table` reads it, without diagnoses. Out: the context of a file by its name.
"""

from dataclasses import dataclass, field
from pathlib import Path, PurePath

from images.source_table import COLUMNS as USUAL
from images.source_table import is_blank
from images.table_file import Table, read_table
from records.context import COLUMNS, Value
from records.errors import DataError
from records.ids import sha256_hex
from records.types.base import LINE

_NAMES = (USUAL["image"], "image", "file")
_OLDEST_YEARS = 130.0


@dataclass(frozen=True)
class ContextTable:
    """Context by image.

    Args:
        rows: the name in the table to its context, by column.
        hash: of the file.
    """

    rows: dict[str, dict[str, Value]] = field(repr=False)
    hash: str

    def of(self, name: str) -> dict[str, Value]:
        """Return the context of a file: by its path in the folder, its name, or its name without suffix."""
        path = PurePath(name)
        return next((self.rows[key] for key in (path.as_posix(), path.name, path.stem) if key in self.rows), {})


def read_context_table(path: Path) -> ContextTable:
    """Read a table of context.

    Args:
        path: with a column image_id, image or file, and at least one column of context.
    Returns:
        The table.
    Raises:
        DataError: it cannot be read, a column is missing, an image is listed twice, or a value cannot be used.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the table of context {path} cannot be read ({error.strerror})") from error
    table = read_table(path, data)
    have = ", ".join(table.columns)
    named = next((name for name in _NAMES if name in table.columns), None)
    if named is None:
        raise DataError(f"the table {path} has no column {' or '.join(_NAMES)}; it has {have}")
    columns = {what: USUAL[what] for what in COLUMNS if USUAL[what] in table.columns}
    if not columns:
        raise DataError(f"the table {path} has no column of context ({', '.join(COLUMNS)}); it has {have}")
    rows: dict[str, dict[str, Value]] = {}
    for index, name in enumerate(table.columns[named]):
        if problem := table.problems.get(index):
            raise DataError(f"{path}, row {index + 1}: {problem}")
        if name in rows:
            raise DataError(f"{path}, row {index + 1}: image {name!r} is listed twice")
        rows[name] = {what: _value(path, index, what, table, column) for what, column in columns.items()}
    return ContextTable(rows, sha256_hex(data))


def _value(path: Path, index: int, what: str, table: Table, column: str) -> Value:
    text = table.columns[column][index]
    if is_blank(text):
        return None
    try:
        if what != "age":
            return LINE.check(text)
        age = float(text.replace(",", "."))
        if 0.0 <= age <= _OLDEST_YEARS:
            return age
        raise ValueError(f"it must be 0 to {_OLDEST_YEARS:.0f} years")
    except ValueError as error:
        raise DataError(f"{path}, row {index + 1}: {what} {text[:40]!r} cannot be used: {error}") from error
