"""Downloads from a real HTTP server: complete, interrupted, resumed, altered, refused."""

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from images import download as module
from images.download import HAM10000, RemoteFile, download, files_of
from records.errors import ConfigError, DataError, IntegrityError, UnavailableError

IMAGES = {f"ISIC_{n:07d}.jpg": bytes([n]) * 40_000 for n in range(12)}
TABLE = b"lesion_id,image_id,dx\n"
NO_WAIT = (0.0, 0.0)
CHUNK = 2**14


def archive(images: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, content in images.items():
            # With a fixed date: the same images give the same bytes a second later.
            opened.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


@dataclass
class Mirror:
    """Files of the server, its faults, and the requests it got."""

    files: dict[str, bytes]
    cut_after: list[int] = field(default_factory=list)
    knows_ranges: bool = True
    status: int | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    state = Mirror({"/1?format=original": TABLE, "/2": archive(IMAGES)})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.asked.append((self.path, asked))
            if state.status is not None or self.path not in state.files:
                self.send_error(state.status or 404)
                return
            content = state.files[self.path]
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.knows_ranges else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            cut = state.cut_after.pop(0) if state.cut_after and self.path == "/2" else len(content)
            self.wfile.write(content[start : start + cut])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def described(mirror: Mirror) -> tuple[RemoteFile, ...]:
    def one(name: str, path: str) -> RemoteFile:
        content = mirror.files[f"/{path}"]
        return RemoteFile(name, path, hashlib.md5(content, usedforsecurity=False).hexdigest(), len(content))

    return one("HAM10000_metadata.csv", "1?format=original"), one("HAM10000_images_part_1.zip", "2")


def test_files_are_fetched_checked_and_laid_out(mirror: Mirror, tmp_path: Path) -> None:
    report = download(described(mirror), tmp_path / "out", mirror.url + "/", waits_s=NO_WAIT)
    assert (report.images, len(report.fetched), report.present) == (12, 2, [])
    unpacked = {p.name: p.read_bytes() for p in (tmp_path / "out" / "HAM10000_images_part_1").glob("*.jpg")}
    assert unpacked == IMAGES
    assert (tmp_path / "out" / "HAM10000_metadata.csv").read_bytes() == TABLE
    assert not list((tmp_path / "out").glob("*.zip")) + list((tmp_path / "out").glob(".*.part"))
    mirror.asked.clear()
    again = download(described(mirror), tmp_path / "out", mirror.url)
    assert (again.fetched, len(again.present), mirror.asked) == ([], 2, [])


def test_bars_show_the_download_and_the_unpacking(mirror: Mirror, tmp_path: Path) -> None:
    with Progress(console=Console(file=io.StringIO())) as progress:
        download(described(mirror), tmp_path, mirror.url, progress=progress)
    bars = {task.description: (task.completed, task.total) for task in progress.tasks}
    assert bars["Unpacking HAM10000_images_part_1.zip"] == (12, 12)
    assert len(bars) == 3
    assert all(done == total for done, total in bars.values())


def test_a_broken_connection_is_taken_up_where_it_stopped(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after = [6 * CHUNK, 3 * CHUNK + 1]
    report = download(described(mirror), tmp_path, mirror.url, waits_s=NO_WAIT)
    assert report.images == 12
    ranges = [asked for path, asked in mirror.asked if path == "/2"]
    assert ranges == [None, f"bytes={6 * CHUNK}-", f"bytes={9 * CHUNK}-"]


def test_a_run_that_gave_up_is_finished_by_the_next(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after = [4 * CHUNK, CHUNK, CHUNK]
    with pytest.raises(UnavailableError, match=rf"broke off 3 times, with {6 * CHUNK} bytes here .*goes on from there"):
        download(described(mirror), tmp_path, mirror.url, waits_s=NO_WAIT)
    assert not list(tmp_path.glob("*.zip"))
    mirror.asked.clear()
    assert download(described(mirror), tmp_path, mirror.url, waits_s=NO_WAIT).fetched == ["HAM10000_images_part_1.zip"]
    assert mirror.asked == [("/2", f"bytes={6 * CHUNK}-")]


def test_a_whole_part_needs_no_bytes_and_too_long_a_one_is_dropped(mirror: Mirror, tmp_path: Path) -> None:
    table, images = described(mirror)
    part = tmp_path / f".{images.name}.{images.md5[:8]}.part"
    part.write_bytes(mirror.files["/2"])
    assert download((images,), tmp_path, mirror.url, waits_s=NO_WAIT).images == 12
    other = tmp_path / "other"
    other.mkdir()
    (other / part.name).write_bytes(mirror.files["/2"] + b"more")
    assert download((images,), other, mirror.url, waits_s=NO_WAIT).images == 12
    assert table.name == "HAM10000_metadata.csv"


def test_a_server_without_ranges_sends_it_all_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after, mirror.knows_ranges = [100_000], False
    assert download(described(mirror), tmp_path, mirror.url, waits_s=NO_WAIT).images == 12


def test_altered_bytes_are_deleted(mirror: Mirror, tmp_path: Path) -> None:
    files = described(mirror)
    mirror.files["/2"] = mirror.files["/2"][:-1] + b"x"
    with pytest.raises(IntegrityError, match=f"does not have the published MD5 {files[1].md5} and was deleted"):
        download(files, tmp_path, mirror.url, waits_s=NO_WAIT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["HAM10000_metadata.csv"]
    mirror.files["/2"] = archive(IMAGES)
    assert download(files, tmp_path, mirror.url, waits_s=NO_WAIT).images == 12


def test_an_altered_table_is_fetched_again(mirror: Mirror, tmp_path: Path) -> None:
    download(described(mirror), tmp_path, mirror.url, waits_s=NO_WAIT)
    (tmp_path / "HAM10000_metadata.csv").write_bytes(b"altered")
    assert download(described(mirror), tmp_path, mirror.url).fetched == ["HAM10000_metadata.csv"]


def test_refusals_of_a_server(mirror: Mirror, tmp_path: Path) -> None:
    mirror.status = 403
    with pytest.raises(UnavailableError, match=r"the server answered 403 .*; check images\.download_url"):
        download(described(mirror), tmp_path, mirror.url, waits_s=NO_WAIT)
    assert len(mirror.asked) == 1
    mirror.status = 503
    with pytest.raises(UnavailableError, match=r"broke off 3 times, with 0 bytes here .*503"):
        download(described(mirror), tmp_path, mirror.url, waits_s=NO_WAIT)
    with pytest.raises(UnavailableError, match="broke off 1 times"):
        download(described(mirror), tmp_path, "http://127.0.0.1:9", waits_s=())


def test_what_cannot_work_is_refused_before_anything_is_fetched(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"images\.download_url is 'ftp://x'; it must start with https://"):
        download(described(mirror), tmp_path, "ftp://x")
    with pytest.raises(ConfigError, match="no dataset 'isic' to download; there are ham10000"):
        files_of("isic")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file cannot be written .*; choose another folder"):
        download(described(mirror), tmp_path / "file", mirror.url)
    monkeypatch.setattr(module, "_HEADROOM_BYTES", 2**60)
    with pytest.raises(UnavailableError, match=r"GB free and .* GB are needed"):
        download(described(mirror), tmp_path / "out", mirror.url)
    assert mirror.asked == []


def test_names_in_an_archive_are_never_paths(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files["/2"] = archive({"../../outside.jpg": b"1", "__MACOSX/._a.jpg": b"2", "deep/inside.jpg": b"3"})
    folder = tmp_path / "a" / "b"
    download(described(mirror), folder, mirror.url, waits_s=NO_WAIT)
    assert not (tmp_path / "outside.jpg").exists()
    names = {p.name for p in (folder / "HAM10000_images_part_1").glob("*.jpg")}
    assert names == {"outside.jpg", "inside.jpg"}
    mirror.files["/2"] = b"not a zip"
    with pytest.raises(DataError, match="is no ZIP archive"):
        download(described(mirror), tmp_path / "c", mirror.url, waits_s=NO_WAIT)
    mirror.files["/2"] = archive({"readme.txt": b"1"})
    with pytest.raises(DataError, match=r"holds no \.jpg images"):
        download(described(mirror), tmp_path / "d", mirror.url, waits_s=NO_WAIT)


def test_the_published_files() -> None:
    assert [file.name for file in files_of("ham10000")] == [
        "HAM10000_metadata.csv", "HAM10000_images_part_1.zip", "HAM10000_images_part_2.zip",
    ]  # fmt: skip
    assert sum(file.num_bytes for file in HAM10000) == 2_770_778_873
