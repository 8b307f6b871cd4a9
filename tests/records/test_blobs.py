import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from records.blobs import BlobStore, open_blobs
from records.errors import ConfigError, IntegrityError, UnavailableError, UnknownIdError
from records.ids import sha256_hex


@pytest.fixture(params=["file", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStore]:
    """A blob store on disk, and one in an object store (fsspec's in memory)."""
    yield open_blobs(f"file://{tmp_path}/blobs" if request.param == "file" else "memory://bucket/blobs")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def _overwrite(blobs: BlobStore, blob_id: str, data: bytes) -> None:
    blobs.filesystem.pipe_file(blobs.uri(blob_id), data)


def test_bytes_come_back_under_their_hash(blobs: BlobStore) -> None:
    blob = blobs.put(b"bytes")
    assert blob == sha256_hex(b"bytes") == blobs.put(b"bytes")
    assert blobs.get(blob) == b"bytes"
    assert blobs.has(blob)
    assert blobs.uri(blob).endswith(f"/{blob[:2]}/{blob}")
    assert blobs.get(blobs.put(b"")) == b""


def test_deleting_twice_is_no_error(blobs: BlobStore) -> None:
    blob = blobs.put(b"bytes")
    blobs.delete(blob)
    blobs.delete(blob)
    assert not blobs.has(blob)
    with pytest.raises(UnknownIdError, match=f"no blob {blob[:12]}"):
        blobs.get(blob)


def test_altered_bytes_are_noticed(blobs: BlobStore) -> None:
    blob = blobs.put(b"bytes")
    _overwrite(blobs, blob, b"bites")
    with pytest.raises(IntegrityError, match=f"blob {blob[:12]} .* was altered"):
        blobs.get(blob)


def test_a_blob_that_was_cut_short_heals_when_it_comes_again(blobs: BlobStore) -> None:
    blob = blobs.put(b"bytes")
    _overwrite(blobs, blob, b"")
    blobs.put(b"bytes")
    assert blobs.get(blob) == b"bytes"


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 64, "a" * 63, f"../{'a' * 61}"])
def test_only_hashes_are_ids(blobs: BlobStore, name: str) -> None:
    for call in (blobs.get, blobs.has, blobs.delete, blobs.uri):
        with pytest.raises(UnknownIdError, match="not the id of a blob"):
            call(name)


def test_several_writers_of_one_blob_leave_one_whole_file(tmp_path: Path) -> None:
    blobs, data = open_blobs(str(tmp_path)), bytes(1_000_000)
    threads = [threading.Thread(target=blobs.put, args=(data,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file.read_bytes() == data


def test_the_uri_of_a_file_is_percent_encoded(tmp_path: Path) -> None:
    blobs = open_blobs(str(tmp_path / "a b%"))
    blob = blobs.put(b"bytes")
    assert blobs.uri(blob) == f"file://{tmp_path}/a%20b%25/{blob[:2]}/{blob}"


def test_places_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for url in ("blobs", "file://blobs"):
        with pytest.raises(ConfigError, match="relative path; use an absolute one"):
            open_blobs(url)
    with pytest.raises(ConfigError, match=r"records\.blobs 'nowhere://x' cannot be opened"):
        open_blobs("nowhere://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot be written"):
        open_blobs(str(tmp_path / "file")).put(b"bytes")
