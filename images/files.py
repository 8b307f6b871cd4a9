"""The files of a folder: all of them, and the image that a table means by a name.

In: a folder as people have it, with system files, links in circles, and names of other systems. Out: every file, each
folder or link that cannot be read with the reason, and the number of system files that were left out. What a file is
depends on its content: an image without a known suffix is an image, too.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from images.dicom_head import HEAD_BYTES as DICOM_HEAD_BYTES
from images.dicom_head import SOP_INSTANCE, UID, file_meta
from records.images import FORMATS, IMAGE_SUFFIXES, format_name, is_dicom

_SYSTEM_NAMES = frozenset(
    {
        ".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", ".spotlight-v100", ".trashes", ".fseventsd",
        ".temporaryitems", ".appledouble", "$recycle.bin", "system volume information", "@eadir", ".git", ".relook",
        ".ipynb_checkpoints", "dicomdir",
    }
)  # fmt: skip
_APPLE_DOUBLE = b"\x00\x05\x16\x07"
OTHER_IMAGE_SUFFIXES = frozenset(
    {".jfif", ".jpe", ".heic", ".heif", ".avif", ".tif", ".tiff", ".bmp", ".gif", ".dcm", ".jp2", ".jxl"}
)
_SAME_SUFFIX = {".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".tiff": ".tif", ".heif": ".heic"}
_HEAD_BYTES = 132
_DIGITS = 19
_WHOLE_NUMBER = re.compile(rf"([0-9]{{1,{_DIGITS - 1}}})(\.0*)?", re.ASCII)
_NO_IMAGE = 2


@dataclass(frozen=True)
class Listing:
    """Everything in a folder.

    Args:
        files: every regular file, in a fixed order.
        unreadable: folders, links and other entries without content, each with the reason.
        hidden: number of files and folders that only the operating system made, which are left out.
    """

    files: list[Path]
    unreadable: list[tuple[Path, str]]
    hidden: int


def list_folder(folder: Path) -> Listing:
    """List a folder with its subfolders; links to folders are followed, and each folder is read once."""
    files: list[Path] = []
    unreadable: list[tuple[Path, str]] = []
    hidden = 0
    # A link to a folder above would lead to files that nobody named.
    seen = {_identity(above) for above in folder.resolve().parents}
    waiting, links = [str(folder)], list[str]()
    while waiting or links:
        # Links last, so that a file is listed under its own path if it has one in the folder.
        at = waiting.pop() if waiting else links.pop()
        try:
            identity = _identity(at)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(at) as found:
                entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            unreadable.append((Path(at), f"the folder cannot be read ({error.strerror})"))
            continue
        for entry in entries:
            try:
                if _is_system(entry):
                    hidden += 1
                elif entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(entry.path)
                elif entry.is_file():
                    files.append(Path(entry.path))
                else:
                    why = "the link leads nowhere" if entry.is_symlink() else "it is not a regular file"
                    unreadable.append((Path(entry.path), why))
            except OSError as error:
                unreadable.append((Path(entry.path), f"it cannot be read ({error.strerror})"))
    return Listing(sorted(files), sorted(unreadable), hidden)


def is_image(path: Path) -> bool:
    """Return whether a file is an image, of any format; one that cannot be read may be one."""
    return _rank(path) < _NO_IMAGE


def _rank(path: Path) -> int:
    """Return 0 for an image that Relook reads, 1 for another image, 2 for any other file."""
    # No file is opened whose suffix tells enough: archives hold tens of thousands.
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return 0
    try:
        found = format_name(_head(path))
    except OSError:
        return 1
    if found in (*FORMATS, "DICOM"):
        return 0
    return 1 if found or path.suffix.lower() in OTHER_IMAGE_SUFFIXES else _NO_IMAGE


def shown(path: Path | str) -> str:
    """Return a file name as text that every file and database holds; bytes that are not UTF-8 are written `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def same_name(text: str) -> str:
    """Return what is equal for the names that people and systems take for one: case, accents, `\\`, .jpeg and .jpg."""
    data = os.fsencode(text.removeprefix("./"))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        # Archives packed on Windows have names in its code page.
        text = data.decode("cp1252", "replace")
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    stem, suffix = os.path.splitext(folded)
    return stem + _SAME_SUFFIX.get(suffix, suffix)


class ImageIndex:
    """The images of a folder by the ways in which a table may name them: path, name, or name without suffix."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self._folder = folder
        self._exact: dict[str, list[Path]] = {}
        self._alike: dict[str, list[Path]] = {}
        self._rank = {path: _rank(path) for path in files}
        self._of_uid: dict[str, Path] | None = None
        for path in self._rank:
            inside = path.relative_to(folder)
            for name in {inside.as_posix(), inside.with_suffix("").as_posix(), path.name, path.stem}:
                self._exact.setdefault(name, []).append(path)
                self._alike.setdefault(same_name(name), []).append(path)

    @property
    def images(self) -> list[Path]:
        """All images, in order."""
        return [path for path, rank in self._rank.items() if rank < _NO_IMAGE]

    def find(self, name: str) -> tuple[Path | None, str | None]:
        """Return (path, None), or (None, why there is none)."""
        try:
            return self._find(name)
        except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, a link that leads to itself
            return None, f"{name} cannot be read ({getattr(error, 'strerror', None) or error})"

    def _find(self, name: str) -> tuple[Path | None, str | None]:
        found = self._exact.get(name)
        path = name.replace("\\", "/")
        if found is None and "/" in path:
            # Resolved, so that neither `..` nor a symbolic link leads out of the folder.
            resolved = (self._folder / path).resolve()
            is_inside = resolved.is_relative_to(self._folder.resolve())
            if is_inside:
                found = [resolved] if resolved.is_file() else self._alike.get(same_name(os.path.normpath(path)))
            found = found or self._written_elsewhere(path) or self._nearly_named(path)
            if not found:
                where = f"there is no file {name} in" if is_inside else f"{name} lies outside"
                return None, f"{where} {self._folder}"
        found = found or self._alike.get(same_name(name)) or self._nearly_named(path) or []
        if not found and UID.fullmatch(name) and (of_uid := self._with_uid(name)):
            return of_uid, None
        if not found:
            return None, f"there is no image named {name} in {self._folder}"
        # An image and its copy in a format that cannot be read, or a text beside it, have one name.
        best = min(self._rank.get(path, 0) for path in found)
        # A file whose whole path is the name is meant as much as a better one in another folder.
        found = [path for path in found if self._rank.get(path, 0) == best or path == self._folder / name]
        # Several files of one name are no problem if they are the same image.
        if len(found) > 1 and len({path.read_bytes() for path in found}) > 1:
            names = " and ".join(shown(path.relative_to(self._folder)) for path in found[:2])
            return None, f"{name} could be {names}; write the path into the table"
        # Of equal images, the one whose path the name is, so that the others are listed by theirs.
        found = sorted(found, key=lambda one: one != self._folder / name)
        if "/" in path and not found[0].resolve().is_relative_to(self._folder.resolve()):
            return None, f"{name} lies outside {self._folder}"
        return found[0], None

    def _nearly_named(self, name: str) -> list[Path]:
        """Return the images whose number a name is, such as 0017.jpg for 17.0, or its stem in another format."""
        number = _WHOLE_NUMBER.fullmatch(name)
        if number is not None:
            return self._of_number.get(int(number[1]), [])
        stem, suffix = os.path.splitext(name)
        found = self._alike.get(same_name(stem), []) if suffix.lower() in IMAGE_SUFFIXES else []
        return [path for path in found if self._rank[path] == 0]

    @cached_property
    def _of_number(self) -> dict[int, list[Path]]:
        # Spreadsheets drop zeros before a number, and write a column of numbers with gaps as 17.0.
        found: dict[int, list[Path]] = {}
        for path in self.images:
            if path.stem.isdecimal() and len(path.stem) < _DIGITS:
                found.setdefault(int(path.stem), []).append(path)
        return found

    def _written_elsewhere(self, path: str) -> list[Path]:
        """Return the files whose whole path in the folder is the end of a path or address on another machine."""
        scheme, mark, rest = path.partition("://")
        parts = PurePosixPath(unquote(re.split(r"[?#]", rest)[0]) if mark and scheme.isalpha() else path).parts
        if ".." in parts:
            return []
        for start in range(1, len(parts)):
            end = same_name("/".join(parts[start:]))
            # No file in a folder of another name, which may hold another image of this name.
            found = [one for one in self._alike.get(end, ()) if self._is_whole(one, end)]
            if found:
                return found
        return []

    def _is_whole(self, path: Path, end: str) -> bool:
        inside = path.relative_to(self._folder)
        return end in (same_name(inside.as_posix()), same_name(inside.with_suffix("").as_posix()))

    def _with_uid(self, uid: str) -> Path | None:
        """Return the DICOM file with a SOP instance UID."""
        if self._of_uid is None:
            self._of_uid = {}
            for path in self._rank:
                # No file is opened whose suffix tells enough.
                if path.suffix.lower() not in IMAGE_SUFFIXES and is_dicom(head := _head(path, DICOM_HEAD_BYTES)):
                    self._of_uid.setdefault(file_meta(head)[0].get(SOP_INSTANCE, ""), path)
        return self._of_uid.get(uid)


def folder_parts(folder: Path, path: Path) -> tuple[str, ...]:
    """Return the names of the folders between a folder and a file in it."""
    return PurePosixPath(path.relative_to(folder)).parts[:-1]


def _is_system(entry: os.DirEntry[str]) -> bool:
    if entry.name.lower() in _SYSTEM_NAMES:
        return True
    # macOS writes such a file beside every file that it copies to another file system.
    return entry.name.startswith("._") and entry.is_file() and _head(Path(entry.path)).startswith(_APPLE_DOUBLE)


def is_dicom_file(path: Path) -> bool:
    """Return whether a file is a DICOM file, by its content; one that cannot be read is none."""
    try:
        return path.suffix.lower() not in IMAGE_SUFFIXES and is_dicom(_head(path))
    except OSError:
        return False


def _head(path: Path, count: int = _HEAD_BYTES) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
