"""Archives of any layout are imported as the folder is; what must not be unpacked is listed, and nothing stays."""

import errno
import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from images import unpack
from images.importer import import_folder, open_dataset
from images.taxonomy_proposal import propose_taxonomy
from records.errors import DataError, UnavailableError
from records.settings import RecordsSettings
from records.store import Store, open_store

CODES = ["mel", "nv", "bcc"]
TABLE = "image_id,dx\n" + "".join(f"q{at},{CODES[at % 3]}\n" for at in range(6))


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    PillowImage.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


PHOTOS = [photo(seed) for seed in range(6)]
TABLE_FOLDER = {"t.csv": TABLE.encode()} | {f"imgs/q{at}.jpg": data for at, data in enumerate(PHOTOS)}
CLASS_FOLDERS = {f"photos/{CODES[at % 3]}/{at}.jpg": data for at, data in enumerate(PHOTOS)}
SAMPLES = {f"s{at}.{end}": data for at, photo_ in enumerate(PHOTOS)
           for end, data in (("jpg", photo_), ("cls", CODES[at % 3].encode()))}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(RecordsSettings(home=tmp_path / "home"))
    yield opened
    left = list((tmp_path / "home" / "cache").glob("unpacked-*"))
    opened.close()
    assert left == []


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, files: dict[str, bytes], mode: str) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


MAKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "photos.zip": zipped,
    "photos.ZIP": lambda path, files: zipped(path, files, zipfile.ZIP_LZMA),
    "photos.tar.gz": lambda path, files: tarred(path, files, "w:gz"),
    "photos.tgz": lambda path, files: tarred(path, files, "w:gz"),
    "photos.tar.xz": lambda path, files: tarred(path, files, "w:xz"),
    "photos.tar.bz2": lambda path, files: tarred(path, files, "w:bz2"),
    "photos.tar": lambda path, files: tarred(path, files, "w"),
    "export from 1.2": zipped,
}


MEMBERS = [(name, "table") for name in MAKERS] + [
    ("photos.zip", "classes"), ("photos.tgz", "classes"), ("photos.tar", "samples"), ("photos.tar.gz", "samples")
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), MEMBERS)
def test_an_archive_is_what_its_folder_is(store: Store, tmp_path: Path, name: str, kind: str) -> None:
    files = {"table": TABLE_FOLDER, "classes": CLASS_FOLDERS, "samples": SAMPLES}[kind]
    path = MAKERS[name](tmp_path / name, files)
    report = import_folder(store, path)
    assert (report.images, report.classes) == (6, {"mel": 2, "nv": 2, "bcc": 2})
    assert (report.quarantined, report.unlisted) == ([], [])
    assert "unpacked-" not in f"{report}{report.layout}{report.notes}"
    assert open_dataset(store, str(path)).id == report.dataset_id
    again = import_folder(store, path)
    assert (again.new_images, again.import_id) == (0, report.import_id)


def test_what_is_no_plain_file_is_listed_and_never_written(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "victim.jpg"
    path = tmp_path / "photos.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in TABLE_FOLDER.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind, target in (
            ("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("hard.jpg", tarfile.LNKTYPE, "imgs/q0.jpg"),
            ("device.jpg", tarfile.CHRTYPE, ""), ("pipe.jpg", tarfile.FIFOTYPE, ""),
            ("../../../victim.jpg", tarfile.REGTYPE, ""), (str(outside), tarfile.REGTYPE, ""),
            ("imgs", tarfile.SYMTYPE, str(tmp_path)), ("C:\\victim.jpg", tarfile.REGTYPE, ""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info, io.BytesIO())
    report = import_folder(store, path)
    assert report.images == 6
    assert len(report.unlisted) == 8
    assert sum("is a link" in line for line in report.unlisted) == 3
    assert sum("not a regular file" in line for line in report.unlisted) == 2
    assert sum("leads out of the archive" in line for line in report.unlisted) == 3
    assert any("8 images or folders" in note for note in report.notes)
    assert not outside.exists()


def test_what_is_wrong_with_a_member_of_a_zip_is_listed(store: Store, tmp_path: Path) -> None:
    path = zipped(tmp_path / "photos.zip", TABLE_FOLDER | {"imgs\\x.jpg": photo(9)}, zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        for name, data in (("../out.jpg", photo(7)), ("/abs.jpg", photo(8)), ("n" * 300 + ".jpg", photo(9))):
            archive.writestr(name, data)
        link = zipfile.ZipInfo("link.jpg")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("imgs/q0.jpg", photo(11))
        archive.writestr("imgs/damaged.jpg", b"D" * 500)
    path.write_bytes(path.read_bytes().replace(b"D" * 500, b"X" * 500))
    report = import_folder(store, path)
    assert report.images == 6
    listed = "\n".join(report.unlisted)
    for said in (
        "imgs/x.jpg", "../out.jpg: its name leads", "/abs.jpg: its name leads", "File name too long",
        "link.jpg: it is a link", "q0.jpg: the archive holds this name twice", "damaged.jpg: it cannot be",
    ):  # fmt: skip
        assert said in listed
    assert len(report.unlisted) == 7


def test_names_of_other_systems_are_found(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("t.csv", "image_id,dx\nRücken.jpg,mel\nArm.jpg,nv\n".encode())
        archive.writestr("imgs/Arm.JPG", PHOTOS[0])
        archive.writestr("imgs/R__cken.jpg", PHOTOS[1])
        archive.writestr("__MACOSX/imgs/._Arm.JPG", b"\x00\x05\x16\x07" + bytes(80))
    # macOS writes names in UTF-8 and does not set the bit that says so.
    path.write_bytes(path.read_bytes().replace(b"R__cken", "Rücken".encode()))
    report = import_folder(store, path)
    assert (report.classes, report.unlisted) == ({"mel": 1, "nv": 1}, [])


@pytest.mark.parametrize("name", ["bomb.zip", "bomb.tar.gz", "bomb.tar.xz"])
def test_what_expands_beyond_its_size_is_refused(store, tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr(unpack, "FREE_RATIO_BYTES", 2**20)
    files = TABLE_FOLDER | {"zeros.jpg": bytes(30 * 2**20)}
    path = MAKERS[f"photos.{name.partition('.')[2]}"](tmp_path / name, files)
    with pytest.raises(DataError, match=r"bomb\..* expands to more than .* MB, which is 100 times its size"):
        import_folder(store, path)


def test_too_many_members_and_a_header_of_gigabytes_are_refused(store, tmp_path, monkeypatch) -> None:
    path = tarred(tmp_path / "photos.tar.gz", TABLE_FOLDER, "w:gz")
    with monkeypatch.context() as patch:
        patch.setattr(unpack, "MAX_MEMBERS", 4)
        with pytest.raises(DataError, match="more than 4 members; divide it"):
            import_folder(store, path)
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**40
    (tmp_path / "pax.tar").write_bytes(header.tobuf() + bytes(1024))
    with pytest.raises(DataError, match="no archive that can be read"):
        import_folder(store, tmp_path / "pax.tar")


def test_folders_in_a_tar_and_encrypted_members_of_a_zip(store: Store, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as archive:
        folder = tarfile.TarInfo("imgs")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        for name, data in TABLE_FOLDER.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    report = import_folder(store, tmp_path / "photos.tar.gz")
    assert (report.images, report.unlisted) == (6, [])
    path = zipped(tmp_path / "photos.zip", TABLE_FOLDER | {"imgs/secret.jpg": photo(9)})
    data = bytearray(path.read_bytes())
    # The bit that says so, in the directory at the end of the archive.
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    report = import_folder(store, path)
    assert report.images == 6
    assert report.unlisted == ["photos.zip/imgs/secret.jpg: it is encrypted; unpack the archive with its password"]


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar"])
def test_a_full_disk_ends_the_import(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = MAKERS[name](tmp_path / name, TABLE_FOLDER)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(unpack._Writer, "_require", full)
    with pytest.raises(UnavailableError, match=rf"{name} cannot be unpacked \(No space left on device\)"):
        import_folder(store, path)


@pytest.mark.parametrize("cut", [60, 0.5, 0.95])
def test_a_cut_archive_gives_what_it_has_and_says_so(store: Store, tmp_path: Path, cut: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8).tobytes()
    path = tarred(tmp_path / "photos.tar.gz", CLASS_FOLDERS | {"rest.bin": noise}, "w:gz")
    data = path.read_bytes()
    path.write_bytes(data[: int(cut if cut > 1 else cut * len(data))])
    if cut == 0.95:
        report = import_folder(store, path)
        assert report.images == 6
        assert any("rest.bin" in line for line in report.unlisted)
        assert any("damaged after 7 members" in line for line in report.unlisted)
    elif cut == 0.5:
        assert import_folder(store, path).images == 6
    else:
        with pytest.raises(DataError, match="is no archive that can be read"):
            import_folder(store, path)
    (tmp_path / "cut.zip").write_bytes(zipped(tmp_path / "z.zip", TABLE_FOLDER).read_bytes()[:-300])
    with pytest.raises(DataError, match=r"cut\.zip is no archive that can be read \(File is not a zip file\)"):
        import_folder(store, tmp_path / "cut.zip")


@pytest.mark.parametrize("data", [b"", b"image_id,dx\na,nv\n", PHOTOS[0], b"\x1f\x8b\x08", b"Rar!\x1a\x07\x01\x00"])
def test_another_kind_of_file_is_a_sentence(store: Store, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file.csv").write_bytes(data)
    with pytest.raises(DataError, match=r"file\.csv is no archive that can be read .*; give a folder, \.zip or"):
        import_folder(store, tmp_path / "file.csv")


def test_an_archive_cannot_be_registered_in_place_and_errors_name_it(store: Store, tmp_path: Path) -> None:
    path = zipped(tmp_path / "photos.zip", TABLE_FOLDER)
    with pytest.raises(DataError, match="inside archives, which --in-place cannot name"):
        import_folder(store, path, in_place=True)
    path = zipped(tmp_path / "empty.zip", {"t.csv": TABLE.encode()})
    with pytest.raises(DataError, match=r"there are no images in .*/empty\.zip"):
        import_folder(store, path)


def test_what_a_killed_process_left_is_removed(store: Store, tmp_path: Path) -> None:
    left, own = (store.home.cache / f"unpacked-{number}-x" for number in (2**22 + 1, os.getpid()))
    for folder in (left, own):
        (folder / "deep").mkdir(parents=True)
    import_folder(store, zipped(tmp_path / "photos.zip", TABLE_FOLDER))
    assert not left.exists()
    assert own.exists()
    (own / "deep").rmdir()
    own.rmdir()


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar", "photos.tar.gz"])
def test_a_taxonomy_is_proposed_from_an_archive(tmp_path: Path, name: str) -> None:
    path = MAKERS[name](tmp_path / name, CLASS_FOLDERS)
    assert propose_taxonomy(path).counts == {"bcc": 2, "mel": 2, "nv": 2}
    (tmp_path / "labels.xlsx").write_bytes(zipped(tmp_path / "z.zip", TABLE_FOLDER).read_bytes())
    with pytest.raises(DataError, match="is a workbook or an archive, not a CSV table"):
        propose_taxonomy(tmp_path / "labels.xlsx")
