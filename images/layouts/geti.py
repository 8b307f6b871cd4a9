"""Projects of Intel Geti: its own archive (`Export project`), and the folder that its SDK downloads.

    archive: manifest.json, documents/{image,label,annotation_scene,...}.jsonl,
             binaries/images/dataset_storages/STORAGE/IMAGE.jpg       one document a line, as its database has it
    folder:  project.json, images/DATASET/NAME.jpg, annotations/DATASET/NAME.json

An image has the class of its newest annotation by a person. Predictions of Geti's models are no labels.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from images.files import Listing
from images.layouts.look import Found, Look, text_of
from images.source_table import SourceTable, source_of
from images.table_file import Table
from records.errors import DataError

_MAX_BYTES = 2**30
_WHOLE = {"x1": 0.0, "y1": 0.0, "x2": 1.0, "y2": 1.0}


def find_geti_project(look: Look) -> Found | None:
    """Recognise the archive of a project, unpacked, or the folder that Geti's SDK downloads."""
    annotated = next((path for path in look.listing.files if path.name == "annotation_scene.jsonl"), None)
    if annotated is not None and (annotated.parent / "image.jsonl").is_file():
        place = annotated.parent
        reason = f"{look.shown(place)} has the images and annotations of one"
        return Found(reason, lambda: _read_archive(look, place, f"layout: project of Intel Geti, because {reason}"))
    for path, said in look.documents.items():
        beside = path.parent / "annotations"
        if path.name == "project.json" and isinstance(said.get("pipeline"), dict) and beside.is_dir():
            reason = f"{look.shown(path)} describes one, and its annotations lie beside it"
            layout = f"layout: project of Intel Geti, because {reason}"
            return Found(reason, partial(_read_folder, look, path.parent, said, layout))
    return None


def _read_archive(look: Look, documents: Path, layout: str) -> SourceTable:
    content = b"".join(_bytes(documents / f"{name}.jsonl") for name in ("image", "label", "annotation_scene"))
    names = {_id(one): one for one in _documents(documents / "label.jsonl")}
    above = _parents(documents / "label_schema.jsonl")
    newest: dict[str, Mapping[str, Any]] = {}
    for revision in _documents(documents / "annotation_scene.jsonl"):
        about = _mapping(revision.get("media_identifier"))
        # Ids and dates grow with time; an older annotation of an image was replaced by a newer one.
        kind = text_of(revision.get("kind")).rpartition(".")[2]
        if kind == "ANNOTATION" and text_of(about.get("type")).lower() == "image":
            image_id = _text_id(about.get("media_id"))
            newest[image_id] = max(newest.get(image_id, revision), revision, key=_moment)
    images = list(_documents(documents / "image.jsonl"))
    binaries = documents.parent / "binaries" / "images"
    found = {path.stem: path for path in look.listing.files if path.is_relative_to(binaries)}
    testing = {
        _id(one) for one in _documents(documents / "dataset_storage.jsonl") if one.get("use_for_training") is False
    }
    rows = []
    for image in images:
        path = found.get(_id(image))
        chosen = _classes(newest.get(_id(image), {}), names, above)
        place = f"image {text_of(image.get('name')) or _id(image)}" if path is None else look.shown(path)
        rows.append((place, chosen, "test" if _text_id(image.get("dataset_storage_id")) in testing else ""))
    thumbnails = {path for path in found.values() if path.stem.endswith("_thumbnail")}
    videos = sum(1 for _ in _documents(documents / "video.jsonl"))
    notes = [f"{len(thumbnails)} thumbnails that Geti made of its images were not imported"] if thumbnails else []
    notes += [f"{videos} videos were not imported; export their frames as images"] if videos else []
    listing = replace(look.listing, files=[path for path in look.listing.files if path not in thumbnails])
    return _source(look, documents / "annotation_scene.jsonl", content, rows, layout, listing, notes)


def _read_folder(look: Look, root: Path, project: Mapping[str, Any], layout: str) -> SourceTable:
    labels = [
        one for task in _dicts(_mapping(project.get("pipeline")).get("tasks")) for one in _dicts(task.get("labels"))
    ]
    names = {_text_id(one.get("id")): one for one in labels}
    above = {_text_id(one.get("id")): text_of(one.get("parent_id")) for one in labels}
    ids = {text_of(one.get("name")): number for number, one in names.items()}
    images = {
        path.relative_to(root / "images").with_suffix(""): path
        for path in look.listing.files
        if path.is_relative_to(root / "images")
    }
    rows, content = [], [json.dumps(project, sort_keys=True).encode()]
    for path in look.listing.files:
        if path.suffix.lower() != ".json" or not path.is_relative_to(root / "annotations"):
            continue
        content.append(_bytes(path))
        said = _parsed(content[-1], str(path))
        for label in (label for one in _dicts(said.get("annotations")) for label in _dicts(one.get("labels"))):
            # A project that was downloaded from one server has the ids of another.
            label["label_id"] = ids.get(text_of(label.get("name")), text_of(label.get("name")))
        inside = path.relative_to(root / "annotations").with_suffix("")
        rows.append((look.shown(images.get(inside, root / "images" / inside)), _classes(said, names, above), ""))
    return _source(look, root / "project.json", b"\n".join(content), rows, layout, look.listing, [])


def _source(
    look: Look,
    path: Path,
    content: bytes,
    rows: Sequence[tuple[str, list[str], str]],
    layout: str,
    listing: Listing,
    notes: list[str],
) -> SourceTable:
    conflicts = {
        number: f"{image} has the classes {' and '.join(chosen)}, and an image has one here"
        for number, (image, chosen, _) in enumerate(rows)
        if len(chosen) > 1
    }
    columns = {
        "image": [image for image, _, _ in rows],
        "dx": [next(iter(chosen), "") for _, chosen, _ in rows],
        "split": [split for _, _, split in rows],
    }
    cells = Table(columns, {}, notes, len(rows), conflicts)
    return source_of(path, content, cells, {name: name for name in columns}, layout, listing, look.folder)


def _classes(revision: Mapping[str, Any], names: Mapping[str, Any], above: Mapping[str, str]) -> list[str]:
    """Return the names of the classes of an annotation, of a hierarchy the lowest ones."""
    marks = list(_dicts(revision.get("annotations")))
    # Shapes have classes, too; they count only where the image as a whole has none.
    whole = [one for one in marks if all(_mapping(one.get("shape")).get(key) == at for key, at in _WHOLE.items())]
    ids = dict.fromkeys(
        _text_id(label.get("label_id")) for one in whole or marks for label in _dicts(one.get("labels"))
    )  # fmt: skip
    # The label of an image in which there is nothing is no class.
    ids = {one: None for one in ids if not _mapping(names.get(one)).get("is_empty")}
    upper = {parent for one in ids for parent in _chain(one, above)}
    return [text_of(_mapping(names.get(one)).get("name")) or one for one in ids if one not in upper]


def _parents(path: Path) -> dict[str, str]:
    """Return label to the label above it, from the newest revision of the labels."""
    found: dict[str, str] = {}
    for schema in sorted(_documents(path), key=_moment):
        for edge in _mapping(schema.get("label_tree")).get("edges") or ():
            if isinstance(edge, list) and len(edge) == 2:
                found[_text_id(edge[0])] = _text_id(edge[1])
    return found


def _chain(one: str, above: Mapping[str, str]) -> list[str]:
    found: list[str] = []
    while (one := above.get(one, "")) and one not in found:
        found.append(one)
    return found


def _moment(document: Mapping[str, Any]) -> tuple[str, str]:
    date = document.get("creation_date")
    return text_of(date.get("$date") if isinstance(date, dict) else date), _id(document)


def _documents(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the documents of a collection, one a line; none if the archive has no such collection."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parsed(line, f"line {number} of {path}")


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    try:
        return _mapping(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); export the project again") from error


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        return b""
    if path.stat().st_size > _MAX_BYTES:
        raise DataError(f"{path} has more than 1 GB, more than is read at once; export a part of the project")
    return path.read_bytes()


def _id(document: Mapping[str, Any]) -> str:
    return _text_id(document.get("_id"))


def _text_id(value: Any) -> str:
    """Return an id as text; archives write `{"$sid": "..."}`, the database `{"$oid": "..."}`."""
    return text_of(next(iter(value.values()), None) if isinstance(value, dict) else value)


def _dicts(values: Any) -> Iterator[dict[str, Any]]:
    yield from (value for value in values if isinstance(value, dict)) if isinstance(values, list) else ()


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
