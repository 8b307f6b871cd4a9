"""A folder of DICOM files: with a table that names them by file or SOP instance UID, else with or without folders."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from images.files import ImageIndex, is_dicom_file, shown
from images.layouts.look import Found, Look
from images.source_table import SourceTable, read_class_folders, read_table_folder, row_of_folder, unlisted

_UID_COLUMN = "sopinstanceuid"


def find_dicom(look: Look) -> Found | None:
    """Recognise a folder most of whose images are DICOM files."""
    files = [path for path in look.listing.files if is_dicom_file(path)]
    if not files or 2 * len(files) < len(ImageIndex(look.folder, look.listing.files).images):
        return None
    if (keyed := _by_uid(look)) is not None:
        return keyed
    # Any other table is read as such: it names files.
    if look.tables or look.columns or look.table is not None:
        return None
    return Found(f"{len(files)} of its images are DICOM files, and there is no table", lambda: _without_table(look))


def _by_uid(look: Look) -> Found | None:
    """Recognise a table that names images by their SOP instance UID."""
    for path, (_, table) in look.tables.items():
        for name in table.columns:
            if name.lower().replace("_", "").replace(" ", "") == _UID_COLUMN and "image" not in look.columns:
                columns = {"image": name, **look.columns}
                return Found(
                    f"{look.shown(path)} has the column {name!r}, and there are DICOM files",
                    partial(_with_table, look, columns, path),
                )
    return None


def _with_table(look: Look, columns: dict[str, str], table: Path) -> SourceTable:
    return replace(read_table_folder(look.folder, columns, table), layout="")


def _without_table(look: Look) -> SourceTable:
    """Read files whose folders are classes, patients or visits; which of them, the classes of the taxonomy tell."""
    images = ImageIndex(look.folder, look.listing.files).images
    if any(path.parent != look.folder for path in images):
        source = read_class_folders(look.folder, look.listing)
        return replace(source, layout="", folders_may_be_classes=True)
    rows = [row_of_folder(shown(path.relative_to(look.folder)), path, None, None) for path in images]
    content = "\n".join(row.source_id for row in rows).encode()
    return SourceTable(look.folder, content, rows, [], "", unlisted(look.folder, rows, images, look.listing))
