"""The blob store: bytes by their own hash, on a local disk or in object storage (fsspec).

A blob is written under a temporary name and then moved, so a reader sees all of it or none of it. `s3://` and `gs://`
go through Arrow, which is a dependency anyway; credentials come from the environment, as the cloud's own tools read
them. An S3-compatible server is named in the URL:
`s3://bucket/blobs?endpoint_override=minio.example:9000&scheme=http`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem

from records.errors import ConfigError, IntegrityError, UnavailableError, UnknownIdError
from records.ids import new_id, sha256_hex

OBJECT_STORES = ("s3://", "gs://")
_BLOB_ID = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class BlobStore:
    """A content-addressed store. Open it with `open_blobs`.

    Args:
        url: the fsspec URL it was opened with.
        root: the same location as the file system names it.
        filesystem: the fsspec file system.
        local: true if blobs are files of this machine.
    """

    url: str
    root: str
    filesystem: Any = field(repr=False)
    local: bool

    def put(self, data: bytes) -> str:
        """Store bytes once and return their id, the SHA-256 in 64 hex characters.

        Storing equal bytes again writes nothing, unless the stored file is shorter. UnavailableError is raised if the
        store cannot be written.
        """
        blob_id = sha256_hex(data)
        path = self._path(blob_id)
        try:
            # The size is compared, too: a full disk may have left a shorter file of that name.
            if not (self.filesystem.exists(path) and self.filesystem.size(path) == len(data)):
                self._write(path, data)
        except OSError as error:
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

    def ids(self) -> Iterator[str]:
        """Yield the id of every blob, in order; UnavailableError if the store cannot be listed."""
        try:
            names = (path.rsplit("/", 1)[-1] for path in self.filesystem.find(self.root))
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

    def _write(self, path: str, data: bytes) -> None:
        folder = path.rsplit("/", 1)[0]
        if not self.local:
            # Object stores have no folders and replace whole objects: a plain write is already atomic.
            self.filesystem.pipe_file(path, data)
            return
        self.filesystem.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{new_id()}"
        self.filesystem.pipe_file(temporary, data)
        self.filesystem.mv(temporary, path)


def open_blobs(url: str) -> BlobStore:
    """Open a blob store from an fsspec URL such as `file:///data/blobs` or `s3://bucket/blobs`, or a plain path.

    A relative path, or a URL that no file system handles, raises ConfigError. An object store that does not respond or
    cannot be written raises UnavailableError.
    """
    try:
        if url.startswith(OBJECT_STORES):
            arrow, root = pa.fs.FileSystem.from_uri(url)
            filesystem: Any = ArrowFSWrapper(arrow)
        else:
            filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"records.blobs {url!r} cannot be opened: {error}") from error
    local = isinstance(filesystem, LocalFileSystem)
    if local and not Path(url.rpartition("://")[2]).is_absolute():
        # Ray changes the working folder, so each process would resolve it differently.
        raise ConfigError(f"records.blobs {url!r} is a relative path; use an absolute one such as {root!r}")
    store = BlobStore(url=url, root=root.rstrip("/"), filesystem=filesystem, local=local)
    if not local:
        _require_writable(store)
    return store


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
