"""A dataset version that `relook data export` wrote, read in again with its groups, splits and label ranks.

Input: a folder with `dataset.json` of an export. Output: rows that lead to the dataset version of the same id, because
the id is a hash of exactly what the rows say.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from images.layouts.look import Found, Look
from images.layouts.packed import read_parquet, read_webdataset
from images.source_table import COLUMNS, SourceRow, SourceTable, source_of
from records.errors import DataError
from records.types import Consent

DESCRIPTION = "dataset.json"
TABLE = "metadata.csv"
MARK = "relook_export"
"""Key in the description; its value is the version of the form."""

FORMS = ("csv", "imagefolder", "parquet", "webdataset")
_GROUP = re.compile(r"[0-9a-f]{16}")


def find_export(look: Look) -> Found | None:
    """Recognise an export by its description."""
    said = look.documents.get(look.folder / DESCRIPTION)
    if said is None or said.get(MARK) != 1 or said.get("form") not in FORMS:
        return None
    reason = f"{DESCRIPTION} says that Relook exported dataset version {str(said.get('dataset_id'))[:12]} as it"
    return Found(reason, lambda: _read(look, said, f"layout: export of Relook, because {reason}"))


def _read(look: Look, said: Mapping[str, Any], layout: str) -> SourceTable:
    if said["form"] == "parquet":
        source, packed = read_parquet(look, layout)
        columns = packed.columns
    elif said["form"] == "webdataset":
        source, packed = read_webdataset(look, layout)
        columns = packed.columns
    else:
        path = look.folder / TABLE
        if path not in look.tables:
            raise DataError(f"the export in {look.folder} has lost its table {TABLE}; export it again")
        content, cells = look.tables[path]
        mapping = {what: name for what, name in COLUMNS.items() if name in cells.columns}
        source = source_of(path, content, cells, mapping, layout, look.listing, look.folder)
        columns = cells.columns
    return replace(source, rows=_restored(source.rows, columns), exported_id=str(said.get("dataset_id")))


def _restored(rows: Sequence[SourceRow], columns: Mapping[str, Sequence[str]]) -> list[SourceRow]:
    """Return the rows with group, consent and the name that the image had; all groups, or none if one is not valid."""
    empty = [""] * len(rows)
    groups, consents = columns.get("group_id", empty), columns.get("consent", empty)
    names = columns.get("source_id", empty)
    if not all(_GROUP.fullmatch(group) for group in groups):
        groups = empty
    levels = {consent.value: consent for consent in Consent}
    seen: set[str] = set()
    restored = []
    for row, group, consent, name in zip(rows, groups, consents, names, strict=True):
        # A name that another image has, too, would make them one row.
        known = name if name and name not in seen and row.problem is None else row.source_id
        seen.add(known)
        level = levels.get(consent, Consent.NONE) if consent else None
        restored.append(replace(row, source_id=known, group=group or None, consent=level))
    return restored
