"""The layouts in which people have images, each recognised by itself.

In: a folder. Out: its rows, and one sentence that says which layout was taken, and why. The table below is in the order
of how specific a layout is: of several that fit, the first is taken, and the sentence names the others.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from images.layouts.annotated import find_coco, find_datumaro, find_geti
from images.layouts.dicom import find_dicom
from images.layouts.exported import find_export
from images.layouts.geti import find_geti_project
from images.layouts.known_tables import FINDERS
from images.layouts.label_studio import find_label_studio
from images.layouts.look import Found, Look
from images.layouts.packed import find_parquet, find_webdataset
from images.source_table import COLUMNS, REQUIRED, SourceTable, read_class_folders, read_table_folder, tables_of
from records.errors import ConfigError, DataError


def _find_table(look: Look) -> Found | None:
    table = look.table
    if table is None and not tables_of(look.folder):
        # A table in a folder of its own, which says what it is by its columns.
        own = {look.columns.get(what, COLUMNS[what]).casefold() for what in REQUIRED}
        below = [path for path, (_, cells) in look.tables.items() if own <= {one.casefold() for one in cells.columns}]
        if len(below) > 1:
            names = ", ".join(look.shown(path) for path in below[:5])
            raise DataError(f"{look.folder} holds {len(below)} tables ({names}); name the right one with --table")
        if not below:
            return None
        table = below[0]
    return Found("", lambda: read_table_folder(look.folder, look.columns, table))


def _find_folders(look: Look) -> Found | None:
    if look.table is not None:
        return None
    return Found("", lambda: read_class_folders(look.folder, look.listing, look.columns))


LAYOUTS: dict[str, Callable[[Look], Found | None]] = {
    "relook": find_export,
    "geti-project": find_geti_project,
    "geti": find_geti,
    "datumaro": find_datumaro,
    "coco": find_coco,
    "label-studio": find_label_studio,
    **FINDERS,
    "parquet": find_parquet,
    "webdataset": find_webdataset,
    "dicom": find_dicom,
    "table": _find_table,
    "folders": _find_folders,
}
"""Name, as `--layout` takes it, to what recognises and reads the layout; the most specific first."""

_OF_TABLES = {*FINDERS, "label-studio", "dicom", "table"}
_LAST_RESORT = ("table", "folders")


def read_source(
    folder: Path, columns: Mapping[str, str] | None = None, table: Path | None = None, layout: str | None = None
) -> SourceTable:
    """Read a folder of images in the layout that fits it best.

    Args:
        folder: the folder.
        columns: `--columns`: meaning to the column of the table, where it differs from the layout's.
        table: the table, if there are several.
        layout: the layout that it has, one of `LAYOUTS`; None recognises it.
    Returns:
        The rows, and what no row uses.
    Raises:
        DataError: there is no such folder, no layout fits, or what fits cannot be read.
        ConfigError: there is no such layout.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"there is no layout {layout!r}; --layout takes {', '.join(LAYOUTS)}")
    if not folder.is_dir():
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):
            raise DataError(
                f"{folder.parts[0]} addresses are not imported; copy what is there to a folder first, for example with "
                "`aws s3 sync` or `gsutil rsync`, and import the folder"
            )
        raise DataError(f"there is no data folder {folder}; give a folder with images and a table")
    look = Look(folder, dict(columns or {}), table)
    fitting = _fitting(look, layout)
    if not fitting:
        raise DataError(
            f"{folder} is not in the layout {layout!r}; leave --layout out to see which one is recognised"
            if layout
            else f"no layout fits {folder}; it takes one with a table, because --table names {table}"
        )
    name, found = next(iter(fitting.items()))
    source = found.read()
    sentence = source.layout or f"layout: {name}, because {found.reason}"
    if others := [other for other in fitting if other != name and other not in _LAST_RESORT]:
        sentence += f"; it fits {' and '.join(others)}, too, which --layout {others[0]} would take"
    licences = tuple(dict.fromkeys([*look.licences(), *source.licences]))
    return replace(source, layout=sentence, licences=licences)


def _fitting(look: Look, layout: str | None) -> dict[str, Found]:
    if layout is not None:
        found = LAYOUTS[layout](look)
        return {} if found is None else {layout: found}
    fitting: dict[str, Found] = {}
    for name, find in LAYOUTS.items():
        # Only a table has columns to name.
        if (look.columns or look.table is not None) and name not in {*_OF_TABLES, "folders"}:
            continue
        # Every folder with a table or subfolders would fit these.
        if fitting and name in _LAST_RESORT:
            break
        if (found := find(look)) is not None:
            fitting[name] = found
    return fitting


__all__ = ["LAYOUTS", "read_source"]
