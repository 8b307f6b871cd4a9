"""Fetch HAM10000 from its official place and lay it out as it is published.

    relook data download ham10000

In: a folder. Out: the folder with `HAM10000_metadata.csv`, `HAM10000_images_part_1/` and `_part_2/`. Each file is
checked against the MD5 that Dataverse publishes (doi:10.7910/DVN/DBW86T). A download that breaks off goes on where
it stopped, in the same run or in the next; what is complete is not fetched again. Nothing is imported.
"""

import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from images.resuming import ResumingDownloader
from records.errors import ConfigError, DataError, IntegrityError, UnavailableError

IMAGES_SUFFIX = ".jpg"
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
_HEADROOM_BYTES = 100 * 2**20


@dataclass(frozen=True)
class RemoteFile:
    """A file of a published dataset.

    Args:
        name: under which it is stored.
        path: what follows the base URL.
        md5: as published, 32 hex characters.
        num_bytes: as published.
    """

    name: str
    path: str
    md5: str
    num_bytes: int

    @property
    def is_archive(self) -> bool:
        """Whether it is unpacked into a folder of its own name."""
        return self.name.endswith(".zip")


# Dataverse turns uploaded tables into .tab files of its own; `format=original` asks for the bytes the MD5 is about.
HAM10000: tuple[RemoteFile, ...] = (
    RemoteFile("HAM10000_metadata.csv", "4338392?format=original", "8f85fb1aa29d80a2797247e434deb79d", 690_218),
    RemoteFile("HAM10000_images_part_1.zip", "3172585", "4639bfa73ab251610530a97c898e6e46", 1_366_522_108),
    RemoteFile("HAM10000_images_part_2.zip", "3172584", "da43d6cc50f6613013be07e8986b384b", 1_403_566_547),
)
DATASETS: dict[str, tuple[RemoteFile, ...]] = {"ham10000": HAM10000}
"""What can be downloaded, by the name that the command takes."""

TERMS = {
    "ham10000": "HAM10000 is CC BY-NC 4.0: no commercial use; cite Tschandl et al., Sci. Data 5, 180161 (2018)",
}


@dataclass(frozen=True)
class DownloadReport:
    """What a download did.

    Args:
        folder: that can be imported now.
        fetched: names of the files that were fetched now.
        present: names of those that were complete before.
        images: in the folders of the archives.
        seconds: how long it took.
    """

    folder: Path
    fetched: list[str]
    present: list[str]
    images: int
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {**self.__dict__, "folder": str(self.folder), "seconds": round(self.seconds, 1)}


def files_of(name: str) -> tuple[RemoteFile, ...]:
    """Return the files of a published dataset.

    Args:
        name: of the dataset.
    Returns:
        Its files.
    Raises:
        ConfigError: there is no such dataset; names those that there are.
    """
    if name not in DATASETS:
        raise ConfigError(f"there is no dataset {name!r} to download; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def download(
    files: tuple[RemoteFile, ...],
    folder: Path,
    base_url: str,
    *,
    waits_s: tuple[float, ...] = _WAITS_S,
    progress: Progress | None = None,
) -> DownloadReport:
    """Fetch, check and unpack files; finish what an earlier call began.

    Args:
        files: of a dataset.
        folder: to lay them out in.
        base_url: that a file's path is appended to, http:// or https://.
        waits_s: pauses before a broken connection is taken up again; their number is the number of retries.
        progress: bars are added to it.
    Returns:
        What was done.
    Raises:
        ConfigError: the base URL is none.
        UnavailableError: the server refuses or keeps breaking off, or the disk is too small; what came is kept.
        IntegrityError: a file is not what was published; it is thrown away.
        DataError: the folder cannot be written, or an archive holds something else than images.
    """
    started = time.monotonic()
    if not base_url.startswith(("https://", "http://")):
        raise ConfigError(
            f"trainers.download_url is {base_url!r}; it must start with https:// or http://, for example "
            "https://dataverse.harvard.edu/api/access/datafile"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [file for file in files if not _is_complete(file, folder)]
        _require_space(missing, folder)
        for file in missing:
            fetched = _fetch(file, folder, base_url, waits_s, progress)
            if file.is_archive:
                _unpack(file, fetched, folder, progress)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error}); choose another folder") from error
    images = sum(len(list(_images_folder(f, folder).glob(f"*{IMAGES_SUFFIX}"))) for f in files if f.is_archive)
    fetched_names = [file.name for file in missing]
    present = [file.name for file in files if file.name not in fetched_names]
    return DownloadReport(folder, fetched_names, present, images, time.monotonic() - started)


def _fetch(
    file: RemoteFile, folder: Path, base_url: str, waits_s: tuple[float, ...], progress: Progress | None
) -> Path:
    """Bring one file into the folder with pooch, which checks its hash before it takes its place."""
    import pooch

    pooch.get_logger().setLevel("WARNING")  # the bar says what it would say
    url = f"{base_url.rstrip('/')}/{file.path}"
    downloader = ResumingDownloader(folder / f".{file.name}.{file.md5[:8]}.part", file.num_bytes, waits_s, progress)
    try:
        fetched = pooch.retrieve(
            url=url, known_hash=f"md5:{file.md5}", fname=file.name, path=folder, downloader=downloader
        )
    except ValueError as error:
        raise IntegrityError(
            f"{file.name} from {url} does not have the published MD5 {file.md5} and was thrown away; "
            "run the same command again, and check trainers.download_url if it comes back"
        ) from error
    return Path(fetched)


def _is_complete(file: RemoteFile, folder: Path) -> bool:
    """Return whether a file is there and was checked; archives leave a mark when they are unpacked."""
    import pooch

    if file.is_archive:
        mark = _mark(file, folder)
        return mark.is_file() and mark.read_text().strip() == file.md5
    path = folder / file.name
    return path.is_file() and pooch.file_hash(str(path), alg="md5") == file.md5


def _require_space(missing: list[RemoteFile], folder: Path) -> None:
    """Ask for room for all archives' content and the largest archive beside it, less what came before."""
    if not missing:
        return
    here = sum(path.stat().st_size for path in folder.glob(".*.part"))
    needed = sum(f.num_bytes for f in missing) + max(f.num_bytes for f in missing) + _HEADROOM_BYTES - here
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UnavailableError(
            f"{folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed; free some, or name a folder "
            "on another disk with --out"
        )


def _unpack(file: RemoteFile, archive: Path, folder: Path, progress: Progress | None) -> None:
    """Unpack the images of a checked archive, flat, and remove the archive."""
    target = _images_folder(file, folder)
    target.mkdir(exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            # macOS adds folders of its own to archives; a name is never taken as a path.
            members = [m for m in opened.infolist() if _is_image(m.filename)]
            task = progress.add_task(f"Unpacking {file.name}", total=len(members)) if progress else None
            for member in members:
                place = target / Path(member.filename).name
                if not place.is_file() or place.stat().st_size != member.file_size:
                    with opened.open(member) as source, place.open("wb") as out:
                        shutil.copyfileobj(source, out)
                if progress and task is not None:
                    progress.advance(task)
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive} is no ZIP archive ({error}); delete it and run the same command again") from error
    if not members:
        raise DataError(f"{archive} holds no {IMAGES_SUFFIX} images; it is not the archive that was expected")
    _mark(file, folder).write_text(f"{file.md5}\n")
    archive.unlink()


def _is_image(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() == IMAGES_SUFFIX and not path.name.startswith(".") and "__MACOSX" not in path.parts


def _images_folder(file: RemoteFile, folder: Path) -> Path:
    return folder / file.name.removesuffix(".zip")


def _mark(file: RemoteFile, folder: Path) -> Path:
    return _images_folder(file, folder) / ".complete"
