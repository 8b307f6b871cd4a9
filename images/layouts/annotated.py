"""Annotations in JSON beside the images: COCO, Datumaro, and the Datumaro exports of Intel Geti.

Input: the JSON documents of a folder. Output: a row per image that a document names. Relook learns one class per image:
an image with several is quarantined with their names, and one with none is an image without a label.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from images.files import shown
from images.layouts.look import Found, Look, text_of
from images.source_table import SourceTable, source_of, split_in
from images.table_file import Table
from records.errors import DataError

_GETI_MARKS = ("has_empty_label",)


@dataclass(frozen=True)
class Described:
    """What a document says about one image; `classes` are the names of all its classes."""

    image: str
    classes: tuple[str, ...]


def find_coco(look: Look) -> Found | None:
    """Recognise COCO: images, annotations and categories in one document."""
    documents = {path: said for path, said in look.documents.items() if _is_coco(said)}
    if not documents:
        return None
    reason = f"{look.shown(next(iter(documents)))} has images, annotations and categories"
    return Found(reason, lambda: read_documents(look, documents, _coco_images, f"layout: COCO, because {reason}"))


def find_datumaro(look: Look) -> Found | None:
    """Recognise Datumaro's own format: items, and categories with labels."""
    documents = {path: said for path, said in look.documents.items() if _is_datumaro(said) and not _is_geti(said)}
    if not documents:
        return None
    reason = f"{look.shown(next(iter(documents)))} has items, and categories with labels"
    return Found(
        reason, lambda: read_documents(look, documents, _datumaro_images, f"layout: Datumaro, because {reason}")
    )


def find_geti(look: Look) -> Found | None:
    """Recognise a dataset that Intel Geti exported as Datumaro."""
    documents = {path: said for path, said in look.documents.items() if _is_datumaro(said) and _is_geti(said)}
    if not documents:
        return None
    reason = f"{look.shown(next(iter(documents)))} has items, and labels in groups as Geti writes them"
    return Found(
        reason, lambda: read_documents(look, documents, _datumaro_images, f"layout: Intel Geti, because {reason}")
    )


def _is_coco(said: Mapping[str, Any]) -> bool:
    lists = all(isinstance(said.get(name), list) for name in ("images", "annotations", "categories"))
    return lists and any("file_name" in image for image in _dicts(said["images"]))


def _is_datumaro(said: Mapping[str, Any]) -> bool:
    categories = said.get("categories")
    return isinstance(said.get("items"), list) and isinstance(categories, dict) and "label" in categories


def _is_geti(said: Mapping[str, Any]) -> bool:
    labels = said["categories"]["label"]
    grouped = isinstance(labels, dict) and bool(labels.get("label_groups"))
    marked = any(mark in _mapping(item.get("attr")) for item in _dicts(said["items"][:100]) for mark in _GETI_MARKS)
    return grouped or marked or "geti" in json.dumps(said.get("info", "")).lower()


def _dicts(values: Any) -> Iterator[dict[str, Any]]:
    yield from (value for value in values if isinstance(value, dict)) if isinstance(values, list) else ()


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _coco_images(said: Mapping[str, Any]) -> Iterator[Described]:
    names = {text_of(one.get("id")): text_of(one.get("name")) for one in _dicts(said["categories"])}
    classes: dict[str, dict[str, None]] = {}
    for one in _dicts(said["annotations"]):
        number = text_of(one.get("category_id"))
        classes.setdefault(text_of(one.get("image_id")), {})[names.get(number) or f"category {number}"] = None
    for image in _dicts(said["images"]):
        yield Described(text_of(image.get("file_name")), tuple(classes.get(text_of(image.get("id")), ())))


def _datumaro_images(said: Mapping[str, Any]) -> Iterator[Described]:
    labels = list(_dicts(_mapping(said["categories"]["label"]).get("labels")))
    names = {str(number): text_of(label.get("name")) for number, label in enumerate(labels)}
    parents = {text_of(label.get("name")): text_of(label.get("parent")) for label in labels}
    for item in _dicts(said["items"]):
        marks = [one for one in _dicts(item.get("annotations")) if one.get("label_id") is not None]
        # Shapes have classes, too; they count only where the image as a whole has none.
        marks = [one for one in marks if one.get("type") == "label"] or marks
        numbers = dict.fromkeys(text_of(one["label_id"]) for one in marks)
        found = [names.get(number) or f"label {number}" for number in numbers]
        above = {name for one in found for name in _above(one, parents)}
        place = _mapping(item.get("image")) or _mapping(item.get("media"))
        yield Described(
            text_of(place.get("path")) or text_of(item.get("id")), tuple(name for name in found if name not in above)
        )


def _above(name: str, parents: Mapping[str, str]) -> list[str]:
    """Return the labels above a label; an image that has both has the lower one."""
    found: list[str] = []
    while (name := parents.get(name, "")) and name not in found:
        found.append(name)
    return found


def read_documents(
    look: Look, documents: Mapping[Path, Any], images: Callable[[Any], Iterable[Described]], layout: str
) -> SourceTable:
    """Read the rows that documents describe.

    Args:
        look: the folder.
        documents: path to content.
        images: what a document says about each of its images.
        layout: the sentence about the layout.
    Returns:
        The rows, in the order of the documents.
    Raises:
        DataError: a document cannot be read.
    """
    places = _Places(look)
    columns: dict[str, list[str]] = {"image": [], "dx": [], "split": []}
    conflicts: dict[int, str] = {}
    for path, said in documents.items():
        split = split_in(path.stem) or split_in(look.shown(path.parent))
        for described in images(said):
            if len(described.classes) > 1:
                conflicts[len(columns["image"])] = (
                    f"{described.image} has the classes {' and '.join(described.classes)}, and an image has one here"
                )
            columns["image"].append(places.name_of(described.image, path))
            columns["dx"].append(next(iter(described.classes), ""))
            columns["split"].append("" if split is None else split.value)
    try:
        content = "\n".join(json.dumps(said, sort_keys=True) for said in documents.values()).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{next(iter(documents))} cannot be read ({error})") from error
    cells = Table(columns, {}, [], len(columns["image"]), conflicts)
    mapping = {name: name for name in columns}
    source = source_of(next(iter(documents)), content, cells, mapping, layout, look.listing, look.folder)
    said_licences = {
        text_of(one.get("name")) for said in documents.values() for one in _dicts(_mapping(said).get("licenses"))
    }
    return replace(source, licences=tuple(sorted(said_licences - {""})[:20]))


class _Places:
    """Finds the path that a document means: it may leave out the folder of its subset, and subsets share names."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._by_name: dict[str, list[Path]] = {}
        for path in look.listing.files:
            self._by_name.setdefault(path.name, []).append(path)

    def name_of(self, name: str, document: Path) -> str:
        """Return the path inside the folder, or the name itself if several files or none could be meant."""
        inside = name.replace("\\", "/").removeprefix("./")
        found = [path for path in self._by_name.get(inside.rsplit("/", 1)[-1], ()) if self._ends(path, inside)]
        for wanted in ([document.parent / inside], self._of_subset(found, document)):
            fitting = [path for path in found if path in wanted]
            if len(fitting) == 1:
                return shown(fitting[0].relative_to(self._look.folder))
        return shown(found[0].relative_to(self._look.folder)) if len(found) == 1 else name

    def _ends(self, path: Path, inside: str) -> bool:
        return f"/{path.relative_to(self._look.folder).as_posix()}".endswith(f"/{inside}")

    def _of_subset(self, found: Sequence[Path], document: Path) -> Iterable[Path]:
        # `instances_train2017.json` describes the images in `train2017`, and `train.json` those in `images/train`.
        def names_it(path: Path) -> bool:
            parts = path.relative_to(self._look.folder).parts[:-1]
            return any(part.lower() in document.stem.lower() for part in parts if part.lower() != "images")

        return [path for path in found if names_it(path)]
