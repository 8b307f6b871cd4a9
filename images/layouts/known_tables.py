"""Tables of published archives, recognised by their columns: ISIC, PAD-UFES-20, Fitzpatrick17k and others.

Input: the tables of a folder, at its top or below. Output: rows as if `--columns` had been given. Several tables of one
kind are read one after the other, with the split that their names say; tables that describe the same images are joined.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from images.layouts.look import Found, Look
from images.source_table import COLUMNS, SourceTable, mark_of, source_of, split_in
from images.table_file import Table
from records.errors import DataError

_LICENCE_COLUMNS = ("copyright_license", "license", "licence")
_ISIC_CLASSES = frozenset({"MEL", "NV", "BCC", "AK", "AKIEC", "BKL", "DF", "VASC", "SCC", "UNK"})


@dataclass(frozen=True)
class KnownTable:
    """A published table.

    Args:
        title: what it is called.
        needs: columns that it has; of a group in parentheses, one.
        columns: meaning to columns; of several, the first that is filled counts.
        values: meaning to what its values mean, where they differ from Relook's.
        marks: columns of which a 1 marks the class.
        unmarked: class of a row without a mark.
    """

    title: str
    needs: tuple[str | tuple[str, ...], ...]
    columns: dict[str, tuple[str, ...]]
    values: dict[str, dict[str, str]] = field(default_factory=dict)
    marks: frozenset[str] = frozenset()
    unmarked: str = ""


_PEOPLE = {
    "age": ("age_approx", "age"), "sex": ("sex", "gender"), "lesion": ("lesion_id",), "patient": ("patient_id",),
    "localization": ("anatom_site_general", "anatom_site_general_challenge", "anatom_site_special", "region"),
    "confirmation": ("diagnosis_confirm_type", "dx_type"),
}  # fmt: skip

KNOWN: dict[str, KnownTable] = {
    "isic-challenge": KnownTable(
        "ISIC challenge",
        (("image", "image_id", "image_name", "isic_id"), "MEL", "NV"),
        {"image": ("image", "image_id", "image_name", "isic_id"), **_PEOPLE},
        marks=_ISIC_CLASSES,
    ),
    "isic-2017": KnownTable(
        "ISIC challenge of 2017",
        ("image_id", "melanoma", "seborrheic_keratosis"),
        {"image": ("image_id",), **_PEOPLE, "age": ("age_approximate",)},
        marks=frozenset({"melanoma", "seborrheic_keratosis"}),
        unmarked="nevus",
    ),
    "isic-2020": KnownTable(
        "ISIC challenge of 2020",
        ("image_name", ("diagnosis", "benign_malignant"), "target"),
        {"image": ("image_name",), "dx": ("diagnosis", "benign_malignant"), **_PEOPLE},
    ),
    "isic-archive": KnownTable(
        "metadata of the ISIC archive",
        ("isic_id", ("diagnosis", "diagnosis_1", "diagnosis_3", "benign_malignant", "iddx_1", "iddx_3")),
        {
            "image": ("isic_id",),
            "dx": ("diagnosis", "diagnosis_3", "diagnosis_2", "diagnosis_1", "iddx_3", "iddx_2", "iddx_1",
                   "benign_malignant"),
            **_PEOPLE,
        },
    ),
    "pad-ufes-20": KnownTable(
        "PAD-UFES-20",
        ("img_id", "diagnostic"),
        {"image": ("img_id",), "dx": ("diagnostic",), **_PEOPLE, "confirmation": ("biopsed",)},
        # What was not biopsied was diagnosed by several dermatologists together.
        {"confirmation": {"true": "histopathology", "false": "consensus"}},
    ),
    "fitzpatrick17k": KnownTable(
        "Fitzpatrick17k",
        ("md5hash", "label", ("fitzpatrick_scale", "fitzpatrick", "nine_partition_label", "three_partition_label")),
        {"image": ("md5hash",), "dx": ("label",)},
    ),
    "derm7pt": KnownTable(
        "Derm7pt",
        ("derm", "clinic", "diagnosis"),
        {"image": ("derm",), "dx": ("diagnosis",), "sex": ("sex",), "localization": ("location",)},
    ),
    "huggingface-images": KnownTable(
        "image folder with a table of Hugging Face",
        ("file_name", ("label", "labels")),
        {"image": ("file_name",), "dx": ("label", "labels"), "split": ("split",), **_PEOPLE},
    ),
}  # fmt: skip


def _finder(known: KnownTable) -> Callable[[Look], Found | None]:
    def find(look: Look) -> Found | None:
        # A table in Relook's own columns is one, whatever else it has.
        own = {look.columns.get(what, COLUMNS[what]) for what in ("image", "dx")}
        main = [
            path for path, (_, table) in look.tables.items() if _has(table, known) and not own <= set(table.columns)
        ]
        if not main:
            return None
        needs = [name if isinstance(name, str) else name[0] for name in known.needs]
        needs = [name for name in needs if name in look.tables[main[0]][1].columns] or needs
        reason = f"{look.shown(main[0])} has the columns {', '.join(needs)}"
        return Found(reason, lambda: _read(look, known, main, reason))

    return find


FINDERS = {name: _finder(known) for name, known in KNOWN.items()}


def _has(table: Table, known: KnownTable) -> bool:
    # Columns of probabilities have the same names, and would be read as classes that nothing marks.
    marks = [cell for name in known.marks & set(table.columns) for cell in table.columns[name]]
    return all(mark_of(cell) is not None for cell in marks) and all(
        name in table.columns if isinstance(name, str) else any(one in table.columns for one in name)
        for name in known.needs
    )


def _read(look: Look, known: KnownTable, main: Sequence[Path], reason: str) -> SourceTable:
    if wrong := sorted(set(look.columns) - set(COLUMNS)):
        raise DataError(f"--columns does not take {wrong[0]!r}; it takes {', '.join(COLUMNS)}")
    columns = {**known.columns, **{what: (name,) for what, name in look.columns.items()}}
    beside = [table for path, (_, table) in look.tables.items() if path not in main]
    parts = [_cells(look, path, beside, known, columns, len(main) > 1) for path in main]
    cells = _joined(parts)
    content = b"".join(look.tables[path][0] for path in sorted(look.tables))
    if len(look.tables) == 1:
        content = look.tables[main[0]][0]
    sentence = f"layout: {known.title}, because {reason}"
    mapping = {what: what for what in COLUMNS if what in cells.columns}
    source = source_of(main[0], content, cells, mapping, sentence, look.listing, look.folder)
    said = {
        value.strip()
        for _, table in look.tables.values()
        for name in _LICENCE_COLUMNS
        for value in table.columns.get(name, ())
        if value.strip()
    }
    return replace(source, licences=tuple(sorted(said)[:20]))


def _cells(
    look: Look,
    path: Path,
    beside: Sequence[Table],
    known: KnownTable,
    columns: dict[str, tuple[str, ...]],
    says_split: bool,
) -> Table:
    """Return a table with one column per meaning."""
    table = look.tables[path][1]
    image = next((name for name in columns["image"] if name in table.columns), None)
    if image is None:
        raise DataError(f"the table {path} has no column {columns['image'][0]!r}; it has {', '.join(table.columns)}")
    names = table.columns[image]
    found: dict[str, list[str]] = {"image": [_in_its_folder(look, path, name) for name in names]}
    for what, candidates in columns.items():
        sources = [table.columns[name] for name in candidates if name in table.columns]
        sources += [_beside(names, other, candidates, columns["image"]) for other in beside]
        sources = [cells for cells in sources if cells]
        if what != "image" and sources:
            values = known.values.get(what, {})
            cells = [next((cell for cell in row if cell), "") for row in zip(*sources, strict=True)]
            found[what] = [values.get(cell.lower(), cell) for cell in cells]
    conflicts: dict[int, str] = dict(table.conflicts)
    if "dx" not in found:
        found["dx"] = _marked(table, known, conflicts)
    split = split_in(path.name) or split_in(look.shown(path.parent))
    if says_split and split is not None and "split" not in found:
        found["split"] = [split.value] * table.length
    return replace(table, columns=found, conflicts=conflicts)


def _in_its_folder(look: Look, table: Path, name: str) -> str:
    """Return the name of an image inside the whole folder, if it lies beside its table in a folder below."""
    if table.parent == look.folder or not name or not table.is_relative_to(look.folder):
        return name
    place = table.parent / name.replace("\\", "/").removeprefix("./")
    try:
        return look.shown(place) if place.is_file() and ".." not in place.parts else name
    except (OSError, ValueError):  # a name that no file can have
        return name


def _beside(names: Sequence[str], other: Table, candidates: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return a column of another table about the same images, in the order of `names`; empty if there is none."""
    key = next((name for name in keys if name in other.columns), None)
    column = next((name for name in candidates if name in other.columns and name != key), None)
    if key is None or column is None:
        return []
    values = dict(zip(other.columns[key], other.columns[column], strict=True))
    return [values.get(name, "") for name in names]


def _marked(table: Table, known: KnownTable, conflicts: dict[int, str]) -> list[str]:
    marks = [name for name in table.columns if name in known.marks]
    labels = []
    for row in range(table.length):
        marked = [name for name in marks if mark_of(table.columns[name][row])]
        if len(marked) > 1:
            conflicts[row] = f"it is marked as {' and '.join(marked)}"
        labels.append(next(iter(marked), known.unmarked))
    return labels


def _joined(parts: Sequence[Table]) -> Table:
    """Put tables below each other; a column that one of them lacks is empty there."""
    names = dict.fromkeys(name for part in parts for name in part.columns)
    columns: dict[str, list[str]] = {name: [] for name in names}
    problems: dict[int, str] = {}
    conflicts: dict[int, str] = {}
    length = 0
    for part in parts:
        for name in names:
            columns[name] += part.columns.get(name, [""] * part.length)
        problems.update({length + row: why for row, why in part.problems.items()})
        conflicts.update({length + row: why for row, why in part.conflicts.items()})
        length += part.length
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    return Table(columns, problems, notes, length, conflicts)
