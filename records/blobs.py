"""The blob store: bytes by their own hash, on a local disk or in object storage (fsspec).

A blob appears whole or not at all, see `records.durable`; with `records.durability: full` it is on disk when `put`
returns, before the ledger commits a row that refers to it. `s3://` and `gs://` go through Arrow, which is a
dependency anyway; credentials come from the environment, as the cloud's own tools read them. An S3-compatible server
is named in the URL:
`s3://bucket/blobs?endpoint_override=minio.example:9000&scheme=http`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem

from records.durable import make_folders, replacing, sweep, sync_file, sync_folder
from records.errors import ConfigError, IntegrityError, UnavailableError, UnknownIdError
from records.ids import new_id, sha256_hex

OBJECT_STORES = ("s3://", "gs://")
PARTIAL = ".partial"
"""Folder of a local store for files that are being written: one place to sweep, instead of 256."""
_BLOB_ID = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class BlobStore:
    """A content-addressed store. Open it with `open_blobs`.

    Args:
        url: the fsspec URL it was opened with.
        root: the same location as the file system names it.
        filesystem: the fsspec file system.
        local: true if blobs are files of this machine.
        sync: whether a blob has to survive a power cut once `put` returned; object stores always do that.
    """

    url: str
    root: str
    filesystem: Any = field(repr=False)
    local: bool
    sync: bool = True

    def put(self, data: bytes) -> str:
        """Store bytes once and return their id, the SHA-256 in 64 hex characters.

        Storing equal bytes again writes nothing, unless the stored ones are damaged. UnavailableError is raised if the
        store cannot be written; no part of the blob is left then.
        """
        blob_id = sha256_hex(data)
        path = self._path(blob_id)
        try:
            if self.local:
                self._put_file(Path(path), data)
            # The size is compared, too: another program may have copied only a part of the object.
            elif not (self.filesystem.exists(path) and self.filesystem.size(path) == len(data)):
                # Object stores have no folders and replace whole objects: a plain write is already atomic.
                self.filesystem.pipe_file(path, data)
        except (OSError, UnavailableError) as error:
            raise UnavailableError(f"blob store {self.url} cannot be written: {error}") from error
        return blob_id

    def get(self, blob_id: str) -> bytes:
        """Return the bytes of a blob, checked against their hash.

        A missing blob raises UnknownIdError, altered bytes IntegrityError, a store that cannot be read
        UnavailableError.
        """
        try:
            data: bytes = self.filesystem.cat_file(self._path(blob_id))
        except FileNotFoundError as error:
            raise UnknownIdError(f"no blob {blob_id[:12]} in {self.url}") from error
        except OSError as error:
            raise UnavailableError(f"blob store {self.url} cannot be read: {error}") from error
        if sha256_hex(data) != blob_id:
            raise IntegrityError(f"blob {blob_id[:12]} in {self.url} was altered; restore it from a backup")
        return data

    def ids(self, before: datetime | None = None) -> Iterator[str]:
        """Yield the id of every blob, or of those stored before a time; UnavailableError if they cannot be listed."""
        try:
            found = self.filesystem.find(self.root, detail=True).values()
            if before is not None:
                found = [one for one in found if _stored_at(one["mtime"]) < before]
            names = (one["name"].rsplit("/", 1)[-1] for one in found)
            yield from sorted(name for name in names if _BLOB_ID.fullmatch(name))
        except OSError as error:
            raise UnavailableError(f"blob store {self.url} cannot be read: {error}") from error

    def has(self, blob_id: str) -> bool:
        """Return whether the blob is stored."""
        return bool(self.filesystem.exists(self._path(blob_id)))

    def delete(self, blob_id: str) -> None:
        """Remove a blob; a missing one is no error.

        Text that is not a blob id raises UnknownIdError, a blob that cannot be removed UnavailableError.
        """
        path = self._path(blob_id)
        try:
            if self.filesystem.exists(path):
                self.filesystem.rm_file(path)
        except FileNotFoundError:
            return  # somebody else removed it first
        except OSError as error:
            raise UnavailableError(f"blob store {self.url} cannot be written: {error}") from error

    def uri(self, blob_id: str) -> str:
        """Return the full URI of a blob; the URI of a file is percent-encoded."""
        path = self._path(blob_id)
        return Path(path).as_uri() if self.local else str(self.filesystem.unstrip_protocol(path))

    def _path(self, blob_id: str) -> str:
        # Ids also come from requests: `../..` must not become a path.
        if not _BLOB_ID.fullmatch(blob_id):
            raise UnknownIdError(f"{blob_id[:64]!r} is not the id of a blob; an id is 64 hex characters")
        return f"{self.root}/{blob_id[:2]}/{blob_id}"

    def _put_file(self, path: Path, data: bytes) -> None:
        try:
            # Its bytes, since a power cut may have left a file of the right size whose content never reached the disk.
            is_whole = path.read_bytes() == data
        except OSError:
            is_whole = False
        if not is_whole:
            partial = Path(self.root, PARTIAL)
            make_folders(path.parent, sync=self.sync)
            make_folders(partial, sync=self.sync)
            with replacing(path, sync=self.sync, within=partial) as temporary:
                temporary.write_bytes(data)
        elif self.sync:
            # Another process may have written it a moment ago and not flushed it yet.
            sync_file(path)
            sync_folder(path.parent)


def _stored_at(modified: datetime | float) -> datetime:
    """Return a modification time as local file systems (seconds) and object stores (a time) give it."""
    return modified if isinstance(modified, datetime) else datetime.fromtimestamp(modified, UTC)


def open_blobs(url: str, *, sync: bool = True) -> BlobStore:
    """Open a blob store, and sweep what writers that died left in it.

    Args:
        url: an fsspec URL such as `file:///data/blobs` or `s3://bucket/blobs`, or a plain path.
        sync: whether a stored blob has to survive a power cut.
    Returns:
        The store.
    Raises:
        ConfigError: the path is relative, or no file system handles the URL.
        UnavailableError: the store does not respond or cannot be written.
    """
    filesystem, root, local = open_filesystem(url, "records.blobs")
    store = BlobStore(url=url, root=root.rstrip("/"), filesystem=filesystem, local=local, sync=sync)
    if local:
        _sweep(Path(store.root))
    else:
        _require_writable(store)
    return store


def open_filesystem(url: str, setting: str) -> tuple[Any, str, bool]:
    """Open a place that a setting names.

    Args:
        url: as of `open_blobs`.
        setting: for the error.
    Returns:
        The fsspec file system, the place as it names it, and whether that is a path of this machine.
    Raises:
        ConfigError: the path is relative, or no file system handles the URL.
    """
    try:
        if url.startswith(OBJECT_STORES):
            arrow, root = pa.fs.FileSystem.from_uri(url)
            filesystem: Any = ArrowFSWrapper(arrow)
        else:
            filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"{setting} {url!r} cannot be opened: {error}") from error
    local = isinstance(filesystem, LocalFileSystem)
    if local and not Path(url.rpartition("://")[2]).is_absolute():
        # Ray changes the working folder, so each process would resolve it differently.
        raise ConfigError(f"{setting} {url!r} is a relative path; use an absolute one such as {root!r}")
    return filesystem, root, local


def _sweep(root: Path) -> None:
    partial = root / PARTIAL
    if not partial.is_dir():
        # An older release wrote temporary files beside the blobs.
        sweep(root, below=True)
    sweep(partial)


def _require_writable(store: BlobStore) -> None:
    """Write and remove a probe, so that a store without permissions fails at start, not at the first image."""
    probe = f"{store.root}/.probe-{new_id()}"
    try:
        store.filesystem.pipe_file(probe, b"relook")
        store.filesystem.rm_file(probe)
    except OSError as error:
        raise UnavailableError(
            f"blob store {store.url} cannot be written ({' '.join(str(error).split())[:300]}); "
            "make the bucket, and give these credentials the right to put and delete objects"
        ) from error
