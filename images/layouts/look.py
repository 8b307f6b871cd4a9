"""What a layout looks at to recognise a folder: its files, tables and JSON documents, each read once."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from images.files import Listing, folder_parts, list_folder, shown
from images.source_table import TABLE_SUFFIXES, SourceTable
from images.table_file import Table, read_table
from records.errors import DataError

_MAX_DOCUMENT_BYTES = 2**30
_MAX_DOCUMENTS_OF_A_FOLDER = 20
_LICENCE_NAME = re.compile(r"(un)?licen[cs]e([-_. ].*)?|copying(\..*)?", re.IGNORECASE)
_MAX_LICENCES = 20


@dataclass(frozen=True)
class Found:
    """A layout that fits a folder.

    Args:
        reason: why, as the end of a sentence.
        read: reads the folder.
    """

    reason: str
    read: Callable[[], SourceTable]


@dataclass(frozen=True)
class Look:
    """A folder that is to be recognised.

    Args:
        folder: the folder.
        columns: `--columns`.
        table: `--table`.
    """

    folder: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    table: Path | None = None

    @cached_property
    def listing(self) -> Listing:
        """Everything in the folder."""
        return list_folder(self.folder)

    @cached_property
    def tables(self) -> dict[Path, tuple[bytes, Table]]:
        """The CSV tables that can be read: the one of `--table`, or those at the top, else those below."""
        if self.table is not None:
            path = self.table if self.table.is_absolute() or self.table.is_file() else self.folder / self.table
            paths = [path]
        else:
            paths = [path for path in self.listing.files if path.suffix.lower() in TABLE_SUFFIXES]
            paths = [path for path in paths if path.parent == self.folder] or paths
        found = {}
        for path in paths:
            try:
                content = path.read_bytes()
                found[path] = (content, read_table(path, content))
            except (OSError, DataError):
                # The layout `table` says what is wrong with it.
                continue
        return found

    @cached_property
    def documents(self) -> dict[Path, dict[str, Any]]:
        """The JSON objects at the top, or one or two folders below; DataError if one is too large."""
        return {path: said for path, said in self._json.items() if isinstance(said, dict)}

    @cached_property
    def lists(self) -> dict[Path, list[Any]]:
        """The JSON lists at the same places."""
        return {path: said for path, said in self._json.items() if isinstance(said, list)}

    @cached_property
    def _json(self) -> dict[Path, Any]:
        paths = [path for path in self.listing.files if path.suffix.lower() == ".json"]
        paths = [path for path in paths if len(folder_parts(self.folder, path)) <= 2]
        beside = Counter(path.parent for path in paths)
        # A document beside each image describes that image, not the folder.
        paths = [path for path in paths if beside[path.parent] <= _MAX_DOCUMENTS_OF_A_FOLDER]
        return {path: said for path in paths if (said := _document(path)) is not None}

    def shown(self, path: Path) -> str:
        """Return a path inside the folder as text."""
        return shown(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else shown(path)

    def licences(self) -> list[str]:
        """Return the name and first line of each licence file at the top."""
        found = []
        for path in self.listing.files:
            if path.parent == self.folder and _LICENCE_NAME.fullmatch(path.name):
                with path.open("rb") as file:
                    lines = file.read(4096).decode("utf-8", "replace").splitlines()
                found.append(f"{shown(path.name)}: {next((line.strip() for line in lines if line.strip()), 'empty')}")
        return found[:_MAX_LICENCES]


def _document(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_DOCUMENT_BYTES:
            raise DataError(f"{path} has more than 1 GB, more than is read as one JSON document; divide it")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def text_of(value: Any) -> str:
    """Return a JSON value as the text of a cell; None and structures are empty."""
    if value is None or isinstance(value, dict | list):
        return ""
    return str(value).strip()
