"""Archives of images (`.zip`, `.tar`, `.tar.gz`, `.tar.bz2`, `.tar.xz`), unpacked for as long as an import reads them.

In: an archive from anywhere. Out: a folder in the home with its regular files, and a line for each member that was left
out. No member is written outside the folder: links, devices and names that lead out are left out. What an archive
expands to is bounded by the free disk, by its own size and by a number of members, counted while it is written.
"""

import bz2
import errno
import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from images.files import shown
from images.members import leads_outside
from images.source_table import SourceTable
from records.errors import DataError, RelookError, UnavailableError
from records.images import IMAGE_SUFFIXES

MAX_MEMBERS = 1_000_000
MAX_RATIO = 100
FREE_RATIO_BYTES = 256 * 2**20
"""Below this, an archive may expand as much as it likes: tables of few words shrink to a thousandth."""

_DISK_SHARE = 0.9
_CHUNK = 2**20
_MAX_HEADER_BYTES = 16 * 2**20
_PREFIX = "unpacked-"
_SHARD_SUFFIXES = (".cls", ".json")
_TAR_MARK = slice(257, 262)
_WORKBOOKS = frozenset({".xlsx", ".xlsm", ".ods"})
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


@dataclass(frozen=True)
class Place:
    """A folder that is read: the one that was given, or the unpacked archive.

    Args:
        folder: the folder.
        archive: what was unpacked; None for a folder.
        left_out: a line per member that was not unpacked, with the reason.
    """

    folder: Path
    archive: Path | None = None
    left_out: list[str] = field(default_factory=list)

    def named(self, source: SourceTable) -> SourceTable:
        """Return a source that names the archive in place of the folder, and lists what was left out."""
        if self.archive is None:
            return source
        layout = source.layout.replace(str(self.folder), str(self.archive))
        return replace(source, path=self.archive, layout=layout, unlisted=[*source.unlisted, *self.left_out])


@contextmanager
def opened(folder: Path, work: Path) -> Generator[Place]:
    """Unpack an archive while the block runs; a folder is left as it is.

    Args:
        folder: a folder or an archive.
        work: folder on the disk that the archive is unpacked to.
    Yields:
        The folder to read.
    Raises:
        DataError: it is a file of another kind, is damaged or encrypted, or expands to more than is unpacked.
        UnavailableError: the disk is full.
    """
    if not folder.is_file():
        wrapped = _wrapped(folder)
        if wrapped is None:
            yield Place(folder)
            return
        folder = wrapped
    work.mkdir(parents=True, exist_ok=True)
    _remove_left_over(work)
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=work) as made:
        # Named like the archive, as what is read may name its folder.
        inside = Path(made) / (folder.name.partition(".")[0] or "archive")
        inside.mkdir()
        try:
            left_out = _unpack(folder, inside)
            if (wrapped := _wrapped(inside)) is not None:
                left_out += _unpack(wrapped, inside)
                wrapped.unlink()
            yield Place(inside, folder, left_out)
        except RelookError as error:
            if str(inside) not in str(error):
                raise
            raise type(error)(str(error).replace(str(inside), str(folder))) from error


def _wrapped(folder: Path) -> Path | None:
    """Return the archive of a project that Intel Geti put beside its signature; None in any other folder."""
    project = folder / "project.zip"
    return project if (folder / "public_key.der").is_file() and project.is_file() else None


def is_archive(path: Path) -> bool:
    """Return whether a file is an archive that `opened` unpacks; a workbook, which is a zip file too, is none."""
    with path.open("rb") as file:
        head = file.read(_TAR_MARK.stop)
    marks = (b"PK", *_OPENERS)
    return (head.startswith(marks) or head[_TAR_MARK] == b"ustar") and path.suffix.lower() not in _WORKBOOKS


def _remove_left_over(work: Path) -> None:
    """Remove what a killed process unpacked: nothing of its images may stay."""
    for left in work.glob(f"{_PREFIX}*"):
        number = left.name.removeprefix(_PREFIX).partition("-")[0]
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _unpack(archive: Path, folder: Path) -> list[str]:
    writer = _Writer(archive, folder)
    try:
        with archive.open("rb") as raw:
            head = raw.read(8)
        if head.startswith(b"PK"):
            _unpack_zip(archive, writer)
        else:
            _unpack_tar(archive, head, writer)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UnavailableError(f"{archive} cannot be unpacked ({error.strerror})") from error
        if not writer.members:
            raise DataError(
                f"{archive} is no archive that can be read ({error}); give a folder, .zip or .tar.gz"
            ) from error
        writer.left_out.append(f"{archive.name}: it is damaged after {writer.members} members ({error})")
    return writer.left_out


class _Writer:
    """Writes members into a folder and counts what they take."""

    def __init__(self, archive: Path, folder: Path) -> None:
        self._archive, self._folder = archive, folder
        size = archive.stat().st_size
        free = int(shutil.disk_usage(folder).free * _DISK_SHARE)
        self._most = min(free, max(FREE_RATIO_BYTES, size * MAX_RATIO))
        self._written = 0
        self.members = 0
        self.left_out: list[str] = []

    def leave_out(self, name: str, why: str) -> None:
        """Note a member that is not unpacked."""
        self.left_out.append(f"{self._archive.name}/{shown(name)}: {why}")

    def take(self, size: int) -> None:
        """Count a member before it is read; DataError if there are too many, or it is too large."""
        self.members += 1
        if self.members > MAX_MEMBERS:
            raise DataError(f"{self._archive} has more than {MAX_MEMBERS} members; divide it, or unpack it yourself")
        self._require(self._written + size)

    def write(self, name: str, source: IO[bytes]) -> None:
        """Write a member; one whose name or data cannot be used is noted."""
        path = self._folder / PurePosixPath(name.replace("\\", "/"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self.leave_out(name, "the archive holds this name twice, and the first is used")
                return
            with path.open("xb") as file:
                while chunk := source.read(_CHUNK):
                    self._written += len(chunk)
                    self._require(self._written)
                    file.write(chunk)
        except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            with suppress(OSError):
                path.unlink()
            self.leave_out(name, f"it cannot be unpacked ({getattr(error, 'strerror', None) or error})")

    def _require(self, size: int) -> None:
        if size > self._most:
            raise DataError(
                f"{self._archive} expands to more than {self._most / 2**20:.0f} MB, which is {MAX_RATIO} times its "
                "size or what the disk has free; unpack it yourself if it is what you expect, and import the folder"
            )


def _unpack_zip(archive: Path, writer: _Writer) -> None:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if info.is_dir():
                continue
            name = _name_in_zip(info)
            writer.take(info.file_size)
            kind = info.external_attr >> 28
            if leads_outside(name):
                writer.leave_out(name, "its name leads out of the archive")
            elif kind not in (0, 8):  # the file type of Unix: 8 is a regular file, 0 is written by other systems
                writer.leave_out(name, "it is a link or no regular file")
            elif info.flag_bits & 1:
                writer.leave_out(name, "it is encrypted; unpack the archive with its password")
            else:
                _write_from_zip(file, info, name, writer)


def _write_from_zip(file: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, writer: _Writer) -> None:
    try:
        source = file.open(info)
    except (NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        writer.leave_out(name, f"it cannot be unpacked ({error})")
        return
    with source:
        writer.write(name, source)


def _name_in_zip(info: zipfile.ZipInfo) -> str:
    """Return a member's name as a file system has it: many programs write UTF-8 without saying so."""
    if info.flag_bits & 0x800:
        return info.filename
    with suppress(UnicodeEncodeError):
        return os.fsdecode(info.filename.encode("cp437"))
    return info.filename


def _unpack_tar(archive: Path, head: bytes, writer: _Writer) -> None:
    opener = next((found for mark, found in _OPENERS.items() if head.startswith(mark)), open)
    with opener(archive, "rb") as data:
        if _is_shard(data):
            # A shard of WebDataset is read as it is: its members belong together by their names.
            writer.take(0)
            data.seek(0)
            writer.write("shard.tar", data)
            return
    with opener(archive, "rb") as data, _tar(data) as file:
        for info in file:
            file.members = []  # type: ignore[attr-defined]
            if info.isdir():
                continue
            writer.take(info.size)
            if info.issym() or info.islnk():
                writer.leave_out(info.name, "it is a link, and links in archives are not followed")
            elif not info.isfile() or info.issparse():
                writer.leave_out(info.name, "it is not a regular file")
            elif leads_outside(info.name):
                writer.leave_out(info.name, "its name leads out of the archive")
            elif (source := file.extractfile(info)) is not None:
                with source:
                    writer.write(info.name, source)


def _is_shard(data: IO[bytes]) -> bool:
    """Return whether a tar file starts with the members of samples: an image and its class, under one key."""
    keys: dict[str, set[str]] = {}
    with suppress(tarfile.TarError, EOFError, OSError, lzma.LZMAError, ValueError), _tar(data) as file:
        for _, info in zip(range(20), _regular(file), strict=False):
            key, dot, suffix = PurePosixPath(info.name).name.partition(".")
            keys.setdefault(str(PurePosixPath(info.name).parent / key), set()).add(dot + suffix.lower())
    return any(
        not found.isdisjoint(IMAGE_SUFFIXES) and not found.isdisjoint(_SHARD_SUFFIXES) for found in keys.values()
    )


def _regular(file: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    return (info for info in file if info.isfile())


def _tar(data: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=_Bounded(data), mode="r:", encoding="utf-8", errors="surrogateescape")  # type: ignore[call-overload, no-any-return]


class _Bounded:
    """A file whose single reads are bounded: a header may state gigabytes, which tarfile would read at once."""

    def __init__(self, data: IO[bytes]) -> None:
        self._data = data

    def read(self, size: int) -> bytes:
        """Read at most so many bytes."""
        if size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._data.read(size)

    def seek(self, place: int) -> int:
        """Go to a place."""
        return self._data.seek(place)

    def tell(self) -> int:
        """Return the place."""
        return self._data.tell()
