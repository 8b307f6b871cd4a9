"""Download HAM10000 from Harvard Dataverse in its published layout.

    relook data download ham10000

Output: a folder with `HAM10000_metadata.csv`, `HAM10000_images_part_1/` and `_part_2/`. Each file is checked against
the MD5 that Dataverse publishes (doi:10.7910/DVN/DBW86T). An interrupted download resumes where it stopped, in the
same run or the next one; complete files are not fetched again. Nothing is imported.
"""

import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.progress import Progress, TaskID

from records.durable import replacing, write_file
from records.errors import ConfigError, DataError, IntegrityError, UnavailableError

if TYPE_CHECKING:
    from requests import Response

IMAGES_SUFFIX = ".jpg"
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
_HEADROOM_BYTES = 100 * 2**20
_CHUNK_BYTES = 2**14  # the chunk being read when a connection breaks is lost, so chunks are small
_TIMEOUT_S = (15.0, 60.0)  # to connect, between two reads
_MB = 1e6
_OK, _PARTIAL, _RANGE_NOT_SATISFIABLE = 200, 206, 416


@dataclass(frozen=True)
class RemoteFile:
    """A file of a published dataset.

    Args:
        name: file name in the folder.
        path: appended to the base URL.
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


# Dataverse converts uploaded tables to .tab files; `format=original` returns the bytes that the MD5 belongs to.
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
    """Result of a download.

    Args:
        folder: can be imported now.
        fetched: names of the files that were fetched now.
        present: names of the files that were complete before.
        images: number of images in the folders of the archives.
        seconds: duration.
    """

    folder: Path
    fetched: list[str]
    present: list[str]
    images: int
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Return the report as JSON values."""
        return {**self.__dict__, "folder": str(self.folder), "seconds": round(self.seconds, 1)}


def files_of(name: str) -> tuple[RemoteFile, ...]:
    """Return the files of a published dataset; an unknown name raises ConfigError, which lists the known ones."""
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
        files: the files of a dataset.
        folder: created if it is missing.
        base_url: http:// or https://; the path of each file is appended to it.
        waits_s: pauses before each retry, seconds; their number is the number of retries.
        progress: gets a bar per file.
    Returns:
        The report.
    Raises:
        ConfigError: the base URL has another scheme.
        UnavailableError: the server refuses or keeps breaking off, or the disk is too small; what arrived is kept.
        IntegrityError: a file is not what was published; it is deleted.
        DataError: the folder cannot be written, or an archive holds no images.
    """
    started = time.monotonic()
    if not base_url.startswith(("https://", "http://")):
        raise ConfigError(
            f"images.download_url is {base_url!r}; it must start with https:// or http://, for example "
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
    """Fetch one file with pooch, which checks its hash before moving it into place."""
    import pooch

    pooch.get_logger().setLevel("WARNING")  # the progress bar shows it already
    url = f"{base_url.rstrip('/')}/{file.path}"
    downloader = ResumingDownloader(folder / f".{file.name}.{file.md5[:8]}.part", file.num_bytes, waits_s, progress)
    try:
        fetched = pooch.retrieve(
            url=url, known_hash=f"md5:{file.md5}", fname=file.name, path=folder, downloader=downloader
        )
    except ValueError as error:
        raise IntegrityError(
            f"{file.name} from {url} does not have the published MD5 {file.md5} and was deleted; "
            "run the same command again, and check images.download_url if it comes back"
        ) from error
    return Path(fetched)


def _is_complete(file: RemoteFile, folder: Path) -> bool:
    """Return whether a file is present and checked; an archive leaves a marker once it is unpacked."""
    import pooch

    if file.is_archive:
        mark = _mark(file, folder)
        return mark.is_file() and mark.read_text().strip() == file.md5
    path = folder / file.name
    return path.is_file() and pooch.file_hash(str(path), alg="md5") == file.md5


def _require_space(missing: list[RemoteFile], folder: Path) -> None:
    """Refuse a disk without room for the content of all archives and the largest archive beside it."""
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
    """Unpack the images of a checked archive into one folder, and remove the archive."""
    target = _images_folder(file, folder)
    target.mkdir(exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            # Only the last part of a member's name is used, so `../` in an archive cannot leave the folder.
            members = [m for m in opened.infolist() if _is_image(m.filename)]
            task = progress.add_task(f"Unpacking {file.name}", total=len(members)) if progress else None
            for member in members:
                place = target / Path(member.filename).name
                if not place.is_file() or place.stat().st_size != member.file_size:
                    with opened.open(member) as source, replacing(place) as temporary, temporary.open("wb") as out:
                        shutil.copyfileobj(source, out)
                if progress and task is not None:
                    progress.advance(task)
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive} is no ZIP archive ({error}); delete it and run the same command again") from error
    if not members:
        raise DataError(f"{archive} holds no {IMAGES_SUFFIX} images; it is not the archive that was expected")
    # The marker comes before the archive goes, so a kill in between never costs another download.
    write_file(_mark(file, folder), f"{file.md5}\n")
    archive.unlink()


def _is_image(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() == IMAGES_SUFFIX and not path.name.startswith(".") and "__MACOSX" not in path.parts


def _images_folder(file: RemoteFile, folder: Path) -> Path:
    return folder / file.name.removesuffix(".zip")


def _mark(file: RemoteFile, folder: Path) -> Path:
    return _images_folder(file, folder) / ".complete"


class ResumingDownloader:
    """A pooch downloader, `downloader(url, output_file, pooch)`, that resumes broken connections.

    Bytes are collected in a separate file; once complete, it is moved to the file that pooch checks.

    Args:
        part: file that collects the bytes, also between runs.
        num_bytes: published size, for the bar; completeness is judged by the size that the server announces.
        waits_s: pauses before each retry, seconds; their number is the number of retries.
        progress: gets a bar.
    """

    def __init__(
        self, part: Path, num_bytes: int, waits_s: tuple[float, ...], progress: Progress | None = None
    ) -> None:
        self._part = part
        self._num_bytes = num_bytes
        self._waits_s = waits_s
        self._progress = progress

    def __call__(self, url: str, output_file: str | IO[bytes], pooch: Any) -> None:
        """Download `url` to the temporary file that pooch checks; UnavailableError if every attempt failed."""
        task = None
        if self._progress:
            name = self._part.name.split(".")[1]
            task = self._progress.add_task(f"Downloading {name} (MB)", total=round(self._num_bytes / _MB))
        for attempt, wait_s in enumerate((*self._waits_s, None)):
            reason = self._attempt(url, task)
            if reason is None:
                self._part.replace(str(output_file))
                return
            if wait_s is None:
                raise UnavailableError(
                    f"the download of {url} broke off {attempt + 1} times, with {self._here()} bytes here ({reason}); "
                    "run the same command again: it goes on from there"
                )
            time.sleep(wait_s)

    def _attempt(self, url: str, task: TaskID | None) -> str | None:
        """Fetch the missing bytes; return the reason if the file is still incomplete, else None."""
        import requests

        here = self._here()
        # Identity: ranges count encoded bytes, so a compressed transfer could not be resumed.
        headers = {"User-Agent": "relook", "Accept-Encoding": "identity"}
        if here:
            headers["Range"] = f"bytes={here}-"
        try:
            with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
                if response.status_code == _RANGE_NOT_SATISFIABLE:
                    return self._past_the_end(response, here)
                self._require_success(url, response)
                appends = response.status_code == _PARTIAL
                total = _total_bytes(response, here if appends else 0)
                self._receive(response, appends, task)
        except requests.RequestException as error:
            return _reason(error)
        if total is not None and self._here() != total:
            return f"{total} bytes were announced"
        return None

    def _receive(self, response: "Response", appends: bool, task: TaskID | None) -> None:
        # A server that ignores the Range header sends the whole file (200), which replaces the part.
        with self._part.open("ab" if appends else "wb") as file:
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                if self._progress and task is not None:
                    self._progress.update(task, completed=round(file.tell() / _MB))

    def _past_the_end(self, response: "Response", here: int) -> str | None:
        """Accept a part that is already complete; delete one that is longer than the file."""
        announced = response.headers.get("Content-Range", "").rpartition("/")[2]
        if announced == str(here):
            return None
        self._part.unlink(missing_ok=True)
        return "what was here is longer than the file and was deleted"

    def _require_success(self, url: str, response: "Response") -> None:
        if response.status_code in (_OK, _PARTIAL) or response.status_code >= 500:
            response.raise_for_status()  # 5xx may pass, so they raise an error that is retried
            return
        raise UnavailableError(
            f"the server answered {response.status_code} {response.reason} for {url}; "
            "check images.download_url, and whether the dataset is still published there"
        )

    def _here(self) -> int:
        return self._part.stat().st_size if self._part.is_file() else 0


def _total_bytes(response: "Response", before: int) -> int | None:
    length = response.headers.get("Content-Length")
    return before + int(length) if length and length.isdigit() else None


def _reason(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__ or cause
    return " ".join(str(cause).split())[:200] or type(error).__name__
