"""A downloader for pooch that goes on where a broken connection stopped, in this run or in the next one."""

import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.progress import Progress, TaskID

from records.errors import UnavailableError

if TYPE_CHECKING:
    from requests import Response

_CHUNK_BYTES = 2**14  # what is read when a connection breaks is lost, so a chunk is small
_TIMEOUT_S = (15.0, 60.0)
_MB = 1e6
_OK, _PARTIAL, _RANGE_NOT_SATISFIABLE = 200, 206, 416


class ResumingDownloader:
    """Called by pooch as `downloader(url, output_file, pooch)`.

    What has arrived lies in a file of its own until it is whole; only then it takes the place that pooch checks.

    Args:
        part: where what has arrived is kept.
        num_bytes: of the whole file, for the bar; the server's own figure counts.
        waits_s: pauses before the connection is taken up again; their number is the number of retries.
        progress: a bar is added to it.
    """

    def __init__(
        self, part: Path, num_bytes: int, waits_s: tuple[float, ...], progress: Progress | None = None
    ) -> None:
        self._part = part
        self._num_bytes = num_bytes
        self._waits_s = waits_s
        self._progress = progress

    def __call__(self, url: str, output_file: str | IO[bytes], pooch: Any) -> None:
        """Download a file.

        Args:
            url: of the file.
            output_file: path of the temporary file that pooch checks.
            pooch: not used.
        Raises:
            UnavailableError: the server refuses, or every attempt broke off; what came is kept.
        """
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
        """Fetch what is missing; return why it is still not whole, or None."""
        import requests

        here = self._here()
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
        # A server that ignores the range sends the whole file: what was here is written over.
        with self._part.open("ab" if appends else "wb") as file:
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                if self._progress and task is not None:
                    self._progress.update(task, completed=round(file.tell() / _MB))

    def _past_the_end(self, response: "Response", here: int) -> str | None:
        """Take a part that is whole already; throw one away that is longer than the file."""
        announced = response.headers.get("Content-Range", "").rpartition("/")[2]
        if announced == str(here):
            return None
        self._part.unlink(missing_ok=True)
        return "what was here is longer than the file and was thrown away"

    def _require_success(self, url: str, response: "Response") -> None:
        if response.status_code in (_OK, _PARTIAL) or response.status_code >= 500:
            response.raise_for_status()  # 5xx are worth another attempt
            return
        raise UnavailableError(
            f"the server answered {response.status_code} {response.reason} for {url}; "
            "check trainers.download_url, and whether the dataset is still published there"
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
