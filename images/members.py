"""Images inside archives: a slice of a tar file, or a cell of a parquet file, read like a file on disk.

Nothing is unpacked, so no name of a member leads anywhere, and a member costs memory only while it is read. Sizes that
an archive states are checked before anything of that size is read.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from records.errors import DataError

MAX_MEMBER_BYTES = 256 * 2**20
"""Largest member that is read. An uncompressed image of 89 megapixels has 267 million bytes, and images are compressed.
"""

_HEAD_BYTES = 132
_MAX_ROW_GROUP_BYTES = 2**31
_LINK = "it is a link, and links in archives are not followed"
_OUTSIDE = "its name leads out of the archive"
_LARGE = f"it has more than {MAX_MEMBER_BYTES // 2**20} MB"


@dataclass(frozen=True)
class TarMember:
    """A file in an uncompressed tar file: `size` bytes from `offset`."""

    archive: Path
    name: str
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Return its bytes; they are cut off if the archive is."""
        return self._read(min(self.size, MAX_MEMBER_BYTES))

    def head(self) -> bytes:
        """Return its first bytes, which say what it is."""
        return self._read(min(self.size, _HEAD_BYTES))

    def _read(self, size: int) -> bytes:
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return file.read(size)


@dataclass(frozen=True)
class ParquetMember:
    """The bytes in one cell of a parquet file."""

    archive: Path
    column: str
    row_group: int
    row: int

    @property
    def name(self) -> str:
        """Its place, for messages."""
        return f"{self.archive.name}, row group {self.row_group}, row {self.row}"

    def read_bytes(self) -> bytes:
        """Return its bytes; none if the cell is empty."""
        status = self.archive.stat()
        try:
            cells = _cells(self.archive, status.st_mtime_ns, self.column, self.row_group)
            value = cells[self.row].as_py()
        except (pa.ArrowException, IndexError) as error:
            raise OSError(None, f"{self.name}: {error}") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        return bytes(data or b"")


Member = TarMember | ParquetMember
ImageFile = Path | Member
"""Where the bytes of an image are; `read_bytes` reads them."""


@lru_cache(maxsize=3)
def _cells(path: Path, _changed_ns: int, column: str, row_group: int) -> Any:
    # Images are read in the order of the rows, so that each row group is decompressed about once.
    with pq.ParquetFile(path) as file:
        stated = file.metadata.row_group(row_group).total_byte_size
        if stated > _MAX_ROW_GROUP_BYTES:
            raise OSError(None, f"a row group of {path.name} states {stated / 2**30:.0f} GB, more than is read at once")
        return file.read_row_group(row_group, columns=[column]).column(column)


def tar_members(path: Path) -> Iterator[tuple[TarMember, str | None]]:
    """Yield the members of a tar file, without folders, each with the reason why it cannot be used, or None.

    DataError is raised for a file that is no tar file, or is compressed, so that a member could not be found again
    without decompressing all before it.
    """
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            for info in archive:
                if info.isdir():
                    continue
                # The list that tarfile keeps would hold every member of a shard with millions.
                archive.members = []  # type: ignore[attr-defined]
                member = TarMember(path, info.name, info.offset_data, info.size)
                yield member, _problem(info, length)
    except tarfile.TarError as error:
        raise DataError(f"{path} is not an uncompressed tar file ({error}); decompress it first") from error


def _problem(info: tarfile.TarInfo, length: int) -> str | None:
    if info.issym() or info.islnk():
        return _LINK
    if not info.isfile() or info.issparse():
        return "it is not a regular file"
    if leads_outside(info.name):
        return _OUTSIDE
    if info.size > MAX_MEMBER_BYTES:
        return _LARGE
    return "the archive ends before it does" if info.offset_data + info.size > length else None


def leads_outside(name: str) -> bool:
    """Return whether a member's name is absolute or has a part `..`."""
    path = PurePosixPath(os.fsdecode(name).replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or any(part.endswith(":") for part in path.parts[:1])
