"""Images inside archives: parquet files with the bytes of images, and WebDataset shards (tar files).

Input: the archives of a folder. Output: a row per image, with its place in the archive; nothing is unpacked. A member
of a tar file that is a link, or whose name leads out of the archive, is quarantined.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from images.files import OTHER_IMAGE_SUFFIXES, shown
from images.layouts.look import Found, Look, text_of
from images.members import Member, ParquetMember, TarMember, tar_members
from images.source_table import COLUMNS, SourceTable, source_of, split_in
from images.table_file import Table
from records.errors import DataError
from records.ids import sha256_hex
from records.images import IMAGE_SUFFIXES, format_name

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content")
_LABEL_COLUMNS = ("dx", "label", "labels", "class", "class_name", "diagnosis", "target")
_SUFFIXES = IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES
_MAX_TEXT_BYTES = 2**20
_FOOTER_BYTES = 2**16
_PROBED = 200
_TEXTS = frozenset({".cls", ".json", ".txt"})


@dataclass
class Packed:
    """The rows of archives, column by column.

    Args:
        columns: name to cells; a column that a row lacks is empty there.
        problems: row to what is wrong with it.
        conflicts: row to the classes that it names, where these are several.
        places: name of the row's image to its place.
        unread: archives and members that are in no row, with the reason.
        licences: what the archives say about their licence.
    """

    columns: dict[str, list[str]] = field(default_factory=lambda: {"image": [], "dx": []})
    problems: dict[int, str] = field(default_factory=dict)
    conflicts: dict[int, str] = field(default_factory=dict)
    places: dict[str, Member] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    licences: set[str] = field(default_factory=set)

    def add(self, name: str, place: Member, cells: Mapping[str, str], labels: list[str], problem: str | None) -> None:
        """Add a row; a name that is there already gets a number."""
        row = len(self.columns["image"])
        unique, number = name, 1
        while unique in self.places:
            number += 1
            unique = f"{name}#{number}"
        for column in cells:
            self.columns.setdefault(column, [""] * row)
        said = {**cells, "image": unique, "dx": labels[0] if labels else ""}
        for column, values in self.columns.items():
            values.append(said.get(column, ""))
        self.places[unique] = place
        if problem is not None:
            self.problems[row] = f"{unique}: {problem}"
        elif len(labels) > 1:
            self.conflicts[row] = f"{unique} has the classes {' and '.join(labels)}, and an image has one here"

    def find(self, name: str) -> tuple[Member | None, str | None]:
        """Return the place of a row's image."""
        return self.places[name], None

    def source(self, look: Look, path: Path, layout: str, content: bytes) -> SourceTable:
        """Return the rows as an import takes them."""
        mapping = {what: what for what in COLUMNS if what in self.columns}
        # Archives of Relook's columns name them as tables do.
        mapping |= {what: name for what, name in COLUMNS.items() if name in self.columns and what not in mapping}
        cells = Table(self.columns, self.problems, [], len(self.columns["image"]), self.conflicts)
        source = source_of(path, content, cells, mapping, layout, look.listing, look.folder, self)
        licences = tuple(sorted(self.licences - {""})[:20])
        return replace(source, unlisted=[*source.unlisted, *self.unread], licences=licences)


# ---------------------------------------------------------------- parquet


def find_parquet(look: Look) -> Found | None:
    """Recognise parquet files with a column of images, as Hugging Face writes them."""
    files = {path: column for path in look.listing.files if (column := _image_column(path)) is not None}
    if not files:
        return None
    first = next(iter(files))
    reason = f"{look.shown(first)} has the bytes of images in its column {files[first]!r}"
    return Found(reason, lambda: read_parquet(look, f"layout: parquet with images, because {reason}")[0])


def read_parquet(look: Look, layout: str) -> tuple[SourceTable, Packed]:
    """Read all parquet files with images; DataError if one cannot be read to its end."""
    packed, content, first = Packed(), "", look.folder
    for path in look.listing.files:
        column = _image_column(path)
        if column is None:
            continue
        first = path if first == look.folder else first
        try:
            with pq.ParquetFile(path) as file:
                content += _read_file(look, path, file, column, packed)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read ({error}); get the file again") from error
        content += _footer_hash(path)
    return packed.source(look, first, layout, content.encode()), packed


def _image_column(path: Path) -> str | None:
    if path.suffix.lower() not in {".parquet", ".pq"}:
        return None
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException):
        return None
    for one in schema:
        if pa.types.is_struct(one.type) and one.type.get_field_index("bytes") >= 0:
            return str(one.name)
        if one.name in _IMAGE_COLUMNS and (pa.types.is_binary(one.type) or pa.types.is_large_binary(one.type)):
            return str(one.name)
    return None


def _read_file(look: Look, path: Path, file: pq.ParquetFile, column: str, packed: Packed) -> str:
    """Add the rows of one file, and return what identifies them."""
    schema = file.schema_arrow
    label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
    names = _class_names(schema, label)
    kinds = [one.name for one in schema if one.name != column and not pa.types.is_nested(one.type)]
    texts = [name for name in kinds if not pa.types.is_binary(schema.field(name).type)]
    wanted = [*dict.fromkeys([*texts, *([label] if label else [])])]
    has_path = pa.types.is_struct(schema.field(column).type) and schema.field(column).type.get_field_index("path") >= 0
    split, said = split_in(look.shown(path)), []
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns=[*wanted, *([f"{column}.path"] if has_path else [])]).to_pylist()
        rows = rows or [{} for _ in range(file.metadata.row_group(group).num_rows)]
        for number, row in enumerate(rows):
            name = text_of((row.get(column) or {}).get("path")) if has_path else ""
            place = ParquetMember(path, column, group, number)
            labels = _label_texts(row.get(label), names) if label else []
            cells = {name: text_of(row.get(name)) for name in texts}
            if split is not None:
                cells.setdefault("split", split.value)
            packed.licences |= {cells[name] for name in ("license", "licence", "copyright_license") if name in cells}
            at = name or f"{group}-{number}"
            packed.add(f"{look.shown(path)}/{at}", place, cells, labels, None)
            said.append(json.dumps([at, labels, cells], sort_keys=True))
    return "\n".join(said)


def _class_names(schema: pa.Schema, label: str | None) -> list[str]:
    """Return the names of the classes that the numbers in a column of Hugging Face mean; none if it has no names."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        feature = feature.get("feature", feature)
        names = feature["names"]
        return [str(name) for name in (names.values() if isinstance(names, dict) else names)]
    return []


def _label_texts(value: Any, names: list[str]) -> list[str]:
    values = value if isinstance(value, list) else [value]
    found = []
    for one in values:
        # Hugging Face writes -1 where a label is not known.
        if names and isinstance(one, int):
            found += [names[one]] if 0 <= one < len(names) else [] if one == -1 else [f"class {one}"]
        elif one is not None:
            found.append(text_of(one))
    return list(dict.fromkeys(found))


def _footer_hash(path: Path) -> str:
    """Return a hash of the end of a file, which describes all its row groups."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _FOOTER_BYTES))
        return f"{size} {sha256_hex(file.read())}\n"


# ---------------------------------------------------------------- WebDataset


def find_webdataset(look: Look) -> Found | None:
    """Recognise tar files whose members are images."""
    for path in _tars(look):
        with contextlib.suppress(DataError, OSError):
            for number, (member, _) in enumerate(tar_members(path)):
                if number >= _PROBED:
                    break
                if _suffix(member.name) in _SUFFIXES:
                    reason = f"{look.shown(path)} holds the image {shown(member.name)}"
                    return Found(reason, partial(_webdataset, look, f"layout: WebDataset shards, because {reason}"))
    return None


def _webdataset(look: Look, layout: str) -> SourceTable:
    return read_webdataset(look, layout)[0]


def read_webdataset(look: Look, layout: str) -> tuple[SourceTable, Packed]:
    """Read all tar files with images; one that is cut off or compressed is listed with the reason."""
    packed, content = Packed(), []
    for path in _tars(look):
        content.append(look.shown(path))
        for key, members in _samples(look, path, packed).items():
            images = [name for name in members if _suffix(name) in _SUFFIXES]
            # Names with further dots, such as x.mask.png, and images without a suffix of one.
            images += [name for name, (member, _) in members.items() if name not in images and _is_image(member)]
            for name in images[1:]:
                packed.unread.append(f"{look.shown(path)}/{shown(name)}: another image of {shown(key)} is used")
            if not images:
                continue
            place, problem = members[images[0]]
            cells, labels, wrong = _texts_of(members)
            split = split_in(look.shown(path))
            if split is not None:
                cells.setdefault("split", split.value)
            packed.add(f"{look.shown(path)}/{shown(images[0])}", place, cells, labels, problem or wrong)
            content.append(json.dumps([shown(images[0]), place.size, place.offset, labels, cells], sort_keys=True))
    first = next(iter(_tars(look)))
    return packed.source(look, first, layout, "\n".join(content).encode()), packed


def _tars(look: Look) -> list[Path]:
    return [path for path in look.listing.files if path.suffix.lower() == ".tar"]


_Members = dict[str, tuple[TarMember, str | None]]


def _samples(look: Look, path: Path, packed: Packed) -> dict[str, _Members]:
    """Return the members of a tar file by key: what stands before the first dot of their names."""
    samples: dict[str, _Members] = {}
    try:
        for member, problem in tar_members(path):
            key, name = _key(member.name), member.name
            # Two members of one name are two samples; a tar file may hold both.
            while name in samples.get(key, {}):
                key += "'"
            samples.setdefault(key, {})[name] = (member, problem)
    except (DataError, OSError) as error:
        packed.unread.append(f"{look.shown(path)}: {error}")
    return samples


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0] if not file.startswith(".") else name


def _suffix(name: str) -> str:
    file = name.rpartition("/")[2]
    return f".{file.partition('.')[2].lower()}" if "." in file else ""


def _is_image(member: TarMember) -> bool:
    suffix = PurePosixPath(member.name).suffix.lower()
    if suffix in _TEXTS:
        return False
    return suffix in _SUFFIXES or format_name(member.head()) is not None


def _texts_of(members: _Members) -> tuple[dict[str, str], list[str], str | None]:
    """Return what the texts of a sample say: its cells, its classes, and what is wrong with them."""
    cells: dict[str, str] = {}
    labels: list[str] = []
    for name, (member, problem) in members.items():
        suffix = _suffix(name)
        if suffix not in {".cls", ".json"} or problem is not None:
            continue
        if member.size > _MAX_TEXT_BYTES:
            return {}, [], f"{shown(name)} has more than 1 MB"
        try:
            said = member.read_bytes().decode("utf-8").strip()
            if suffix == ".cls":
                labels = labels or [said]
                continue
            document = json.loads(said)
        except (ValueError, RecursionError):
            return {}, [], f"{shown(name)} is not UTF-8 {'text' if suffix == '.cls' else 'JSON'}"
        if isinstance(document, dict):
            cells = {str(key): text_of(value) for key, value in document.items()}
            value = next((document[key] for key in _LABEL_COLUMNS if key in document), None)
            # A text in the document says more than a number beside it.
            labels = _label_texts(value, []) or labels
    return cells, [label for label in labels if label], None
