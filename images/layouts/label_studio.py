"""Files that Label Studio exports, beside the images: its JSON, JSON-MIN and CSV.

Input: tasks with their annotations. Output: a row per image. What several annotators said of an image is one label
where they agree, and else a conflict; who said what is read by an import from the server itself (`--label-studio`).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from images.layouts.annotated import Described, read_documents
from images.layouts.look import Found, Look, text_of
from images.source_table import SourceTable
from records.errors import DataError
from records.images import IMAGE_SUFFIXES

_OWN_COLUMNS = ("annotation_id", "annotator", "lead_time")
_COLUMNS = frozenset({*_OWN_COLUMNS, "id", "created_at", "updated_at", "agreement", "sentiment_agreement"})
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")
_USUAL_NAMES = ("choice", "choices", "dx", "diagnosis", "class", "label")


def find_label_studio(look: Look) -> Found | None:
    """Recognise an export of Label Studio: tasks with annotations, or rows that name annotator and lead time."""
    for kind, documents, is_one in (
        ("JSON", look.lists, _is_task),
        ("JSON-MIN", look.lists, _is_row),
        ("CSV", {path: _rows(table.columns) for path, (_, table) in look.tables.items()}, _is_row),
    ):
        fitting = {path: said for path, said in documents.items() if said and is_one(said[0])}
        if fitting:
            images = _images_of_tasks if is_one is _is_task else _images_of_rows
            reason = f"{look.shown(next(iter(fitting)))} has tasks and annotations as its export {kind} writes them"
            return Found(reason, _reader(look, fitting, images, f"layout: Label Studio, because {reason}"))
    return None


def _reader(
    look: Look, documents: Mapping[Path, list[Any]], images: Callable[..., Iterator[Described]], layout: str
) -> Callable[[], SourceTable]:
    names = [path.name for path in look.listing.files]
    there = {_kept(name): name for name in names} | {name: name for name in names}
    wanted = look.columns.get("dx")
    return lambda: read_documents(look, documents, lambda said: images(said, wanted, there), layout)


def _is_task(said: Any) -> bool:
    marks = ("annotations", "completions")
    return isinstance(said, dict) and isinstance(said.get("data"), dict) and any(mark in said for mark in marks)


def _is_row(said: Any) -> bool:
    return isinstance(said, dict) and all(name in said for name in _OWN_COLUMNS)


def _rows(columns: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    if any(name not in columns for name in _OWN_COLUMNS):
        return []
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _images_of_tasks(tasks: Sequence[Any], wanted: str | None, there: Mapping[str, str]) -> Iterator[Described]:
    """Return what the tasks of the export JSON say; `wanted` is the control that has the class."""
    said: dict[str, dict[str, dict[str, None]]] = {}
    for task in (one for one in tasks if _is_task(one)):
        image = _image_of(task["data"], task.get("file_upload"), there) or f"task {text_of(task.get('id'))}"
        of_image = said.setdefault(image, {})
        annotations = task.get("annotations") or task.get("completions") or []
        for one in annotations if isinstance(annotations, list) else []:
            # A skip is no annotation.
            if not isinstance(one, dict) or one.get("was_cancelled"):
                continue
            for result in one.get("result") or []:
                if isinstance(result, dict):
                    chosen = of_image.setdefault(text_of(result.get("from_name")), {})
                    chosen.update(dict.fromkeys(_classes_of(result)))
    controls = {name for of_image in said.values() for name, classes in of_image.items() if classes}
    control = _one_of(sorted(controls), wanted)
    for image, of_image in said.items():
        yield Described(image, tuple(of_image.get(control, ())))


def _images_of_rows(rows: Sequence[Any], wanted: str | None, there: Mapping[str, str]) -> Iterator[Described]:
    """Return what the rows of the exports JSON-MIN and CSV say; `wanted` is the column that has the class."""
    usable = [row for row in rows if _is_row(row)]
    names = dict.fromkeys(name for row in usable for name in row if name not in _COLUMNS)
    images = {name for name in names if any(_is_image(row.get(name), there) for row in usable)}
    column = _one_of([name for name in names if name not in images], wanted)
    said: dict[str, dict[str, None]] = {}
    for row in usable:
        image = _image_of({name: row.get(name) for name in names}, None, there) or f"task {text_of(row.get('id'))}"
        said.setdefault(image, {}).update(dict.fromkeys(_chosen(row.get(column))))
    for image, classes in said.items():
        yield Described(image, tuple(classes))


def _one_of(names: Sequence[str], wanted: str | None) -> str:
    """Return the name of what holds the class; empty if nobody annotated."""
    usual = [name for name in names if name.casefold() in _USUAL_NAMES]
    found = list(names) if len(names) == 1 else usual
    if wanted is not None:
        found = [name for name in names if name == wanted]
    if names and len(found) != 1:
        raise DataError(
            f"the export of Label Studio has the fields {', '.join(names)}; say which one has the class with "
            f"--layout label-studio --columns dx={names[0]}"
        )
    return found[0] if found else ""


def _classes_of(result: Mapping[str, Any]) -> list[str]:
    """Return the classes of one result: choices, a node of a taxonomy, or the labels of a region."""
    value = result.get("value")
    found = value.get(text_of(result.get("type"))) if isinstance(value, dict) else None
    found = found if isinstance(found, list) else []
    # A node of a taxonomy is its path from the top.
    return [name for one in found if (name := text_of(one[-1] if isinstance(one, list) and one else one))]


def _chosen(cell: Any) -> list[str]:
    """Return the classes of a cell: a name, or several as `{"choices": [...]}`."""
    if isinstance(cell, str) and cell.lstrip().startswith("{"):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return [cell.strip()]
    if isinstance(cell, dict):
        return _classes_of({"type": "choices", "value": cell})
    return [text] if (text := text_of(cell)) else []


def _image_of(data: Mapping[str, Any], uploaded: Any, there: Mapping[str, str]) -> str:
    """Return the name of a task's image; empty if none of its fields has one, or it is embedded."""
    names = [name for value in [*data.values(), uploaded] for name in _names(value)]
    known = [found for name in names if (found := _found(name, there))]
    return next(iter(known or [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]), "")


def _found(name: str, there: Mapping[str, str]) -> str:
    folder, slash, last = name.rpartition("/")
    found = there.get(last, "")
    return f"{folder}{slash}{found}" if found else ""


def _kept(name: str) -> str:
    """Return a file's name as Label Studio keeps it: `drei vier.png` is `drei_vier.png` there."""
    return re.sub(r"[^-\w.]", "", name.strip().replace(" ", "_"))


def _is_image(value: Any, there: Mapping[str, str]) -> bool:
    return text_of(value).startswith("data:image/") or bool(_image_of({"": value}, None, there))


def _names(value: Any) -> list[str]:
    """Return the paths that an address of Label Studio may mean: as it is, and without the mark of an upload."""
    text = text_of(value)
    if not text or len(text) > 2000 or "\n" in text or text.startswith("data:"):
        return []
    try:
        parts = urlsplit(text)
    except ValueError:
        return []
    # Files of its local storage are named by a parameter.
    path = parse_qs(parts.query).get("d", [unquote(parts.path)])[0].replace("\\", "/").lstrip("/")
    path = path.removeprefix("data/upload/")
    name = path.rsplit("/", 1)[-1]
    if not Path(name).suffix:
        return []
    bare = _UPLOADED.sub("", name, count=1)
    return [path, name] if bare == name else [path, name, bare]
