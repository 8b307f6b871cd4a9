"""Bulk prediction lists every file that is there: content decides, odd names are shown, and folders may be strange."""

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image as PillowImage

from images.files import list_folder
from records.errors import DataError
from records.models import find_bundle
from records.store import Store
from serving.bulk import predict_folder
from serving.settings import ServingSettings

SETTINGS = ServingSettings(max_batch_size=4)
HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)
NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's own."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    for path, names, _ in os.walk(made):
        for name in names:
            if not os.path.islink(os.path.join(path, name)):
                os.chmod(os.path.join(path, name), 0o755)
    shutil.rmtree(made)


def table_of(out: Path) -> dict[str, dict[str, str]]:
    with out.open(newline="", encoding="utf-8") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def saved(data: bytes, kind: str) -> bytes:
    buffer = io.BytesIO()
    PillowImage.open(io.BytesIO(data)).save(buffer, kind)
    return buffer.getvalue()


def test_content_decides_and_every_file_has_a_row(
    service_store: Store, make_image: Callable[..., bytes], folder: Path, tmp_path: Path
) -> None:
    jpeg = make_image(0)
    for name in ("a.jfif", "b.JPE", "c", "d.tif", "e.dat"):
        (folder / name).write_bytes(jpeg)
    kinds = {"f.tiff": "TIFF", "g.bmp": "BMP", "h.gif": "GIF", "really_bmp.jpg": "BMP"}
    for name, kind in kinds.items():
        (folder / name).write_bytes(saved(jpeg, kind))
    (folder / "i.HEIC").write_bytes(HEIC)
    (folder / "note.txt").write_text("patient 7: call back")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(jpeg[:-300])
    (folder / ".dotted.jpg").write_bytes(jpeg)
    # System files and what macOS writes beside a file; a photograph with such a name stays.
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "._a.jfif").write_bytes(b"\x00\x05\x16\x07" + bytes(50))
    (folder / "._photo.jpg").write_bytes(jpeg)
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.jpg").write_bytes(jpeg)
    out = tmp_path / "out.csv"
    result = predict_folder(find_bundle(service_store, "champion"), folder, out, SETTINGS)
    rows = table_of(out)
    predicted = {"a.jfif", "b.JPE", "c", "d.tif", "e.dat", ".dotted.jpg", "._photo.jpg"}
    assert {name for name, row in rows.items() if not row["error"]} == predicted
    assert set(rows) - predicted == {*kinds, "i.HEIC", "note.txt", "empty.png", "cut.jpg"}
    assert (result.failed, result.hidden) == (8, 4)
    for name, kind in {**kinds, "i.HEIC": "HEIC"}.items():
        assert f"does not read {kind} files" in rows[name]["error"]
    assert "not an image" in rows["note.txt"]["error"]


@pytest.mark.parametrize("name", [b"p\xff.jpg", b"R\xfccken.jpg", b"\xe9/\xe8.png"])
def test_names_that_are_not_utf8_are_shown_also_after_an_interruption(
    name: bytes, service_store: Store, make_image: Callable[..., bytes], folder: Path, tmp_path: Path
) -> None:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(make_image(1))
    for number in range(5):
        (folder / f"z{number}.jpg").write_bytes(make_image(number))
    bundle, out = find_bundle(service_store, "champion"), tmp_path / "out.csv"

    def stop(done: int, total: int) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_folder(bundle, folder, out, SETTINGS, on_done=stop)
    result = predict_folder(bundle, folder, out, SETTINGS, explain=True, resume=True)
    rows = table_of(out)
    assert (len(result.rows), result.failed) == (6, 0)
    assert name.decode("utf-8", "backslashreplace") in rows
    assert len(rows) == 6


def test_links_and_pipes_end_in_rows_and_not_in_circles(
    service_store: Store, make_image: Callable[..., bytes], folder: Path, tmp_path: Path
) -> None:
    inner, elsewhere = folder / "inner", tmp_path / "elsewhere"
    inner.mkdir()
    elsewhere.mkdir()
    (inner / "a.jpg").write_bytes(make_image(0))
    (elsewhere / "b.jpg").write_bytes(make_image(1))
    (inner / "up").symlink_to(folder)
    (inner / "above").symlink_to("/")
    (folder / "again").symlink_to(inner)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "pipe.jpg")
    out = tmp_path / "out.csv"
    predict_folder(find_bundle(service_store, "champion"), folder, out, SETTINGS)
    rows = table_of(out)
    assert {name for name, row in rows.items() if not row["error"]} == {"inner/a.jpg", "linked/b.jpg"}
    assert {name for name, row in rows.items() if row["error"]} == {"self.jpg", "gone.jpg", "pipe.jpg"}


def test_a_folder_without_permission_has_a_row(
    service_store: Store, make_image: Callable[..., bytes], folder: Path, tmp_path: Path
) -> None:
    (folder / "a.jpg").write_bytes(make_image(0))
    (folder / "locked" / "deep").mkdir(parents=True)
    (folder / "locked").chmod(0)
    if os.geteuid() == 0:  # root may read everything, so another user looks
        os.seteuid(NOBODY)
        try:
            listing = list_folder(folder)
        finally:
            os.seteuid(0)
        assert [(path.name, why) for path, why in listing.unreadable] == [
            ("locked", "the folder cannot be read (Permission denied)")
        ]
        return
    predict_folder(find_bundle(service_store, "champion"), folder, tmp_path / "out.csv", SETTINGS)
    assert "Permission denied" in table_of(tmp_path / "out.csv")["locked"]["error"]


def test_a_table_in_the_folder_itself_is_no_file_of_it(
    service_store: Store, make_image: Callable[..., bytes], folder: Path
) -> None:
    bundle, out = find_bundle(service_store, "champion"), folder / "out.csv"
    (folder / "a.jpg").write_bytes(make_image(0))
    for _ in range(2):
        assert len(predict_folder(bundle, folder, out, SETTINGS, explain=True).rows) == 1
    (folder / "none").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        predict_folder(bundle, folder / "none", out, SETTINGS)
