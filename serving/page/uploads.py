"""The files of the page: what visitors uploaded in the last minutes, and the generated examples.

They lie in a folder of their own, by default below the system's temporary folder, so that uploads cannot fill the disk
of the ledger. Uploads have a quota, in total and per caller, and are deleted after `page_upload_life_s`.
"""

import asyncio
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from records.errors import AccessError, ConfigError, DataError, ImageError
from records.ids import sha256_hex
from records.images import strip_metadata
from serving.settings import ServingSettings

_SWEEPS_PER_LIFE = 10


@dataclass(frozen=True, slots=True)
class _Upload:
    caller_id: str
    num_bytes: int
    stored_at_s: float
    folder: Path


class PageFiles:
    """Stores uploads within their quota and finds files again. Thread-safe.

    Args:
        settings: quota, life and place of uploads.
        home: of the service; services of different homes do not share a folder.
    """

    def __init__(self, settings: ServingSettings, home: Path) -> None:
        self.root = _own_folder(settings.page_folder, home)
        self.examples = self.root / "examples"
        self.uploads = self.root / "uploads"
        self._life_s = settings.page_upload_life_s
        self._total_bytes = int(settings.page_uploads_mb * 1e6)
        self._caller_bytes = int(settings.page_uploads_per_caller_mb * 1e6)
        self._kept: list[_Upload] = []
        self._changing = threading.Lock()
        # What an earlier process left: nobody can use it any more, and the quota would not count it.
        shutil.rmtree(self.uploads, ignore_errors=True)
        for folder in (self.examples, self.uploads):
            folder.mkdir(mode=0o700, exist_ok=True)

    def store(self, caller_id: str, name: str, data: bytes) -> Path:
        """Store an upload and return its path; AccessError (`rate_limited`) if it exceeds a quota."""
        self.sweep()
        with self._changing:
            of_caller = sum(upload.num_bytes for upload in self._kept if upload.caller_id == caller_id)
            total = sum(upload.num_bytes for upload in self._kept)
            if of_caller + len(data) > self._caller_bytes or total + len(data) > self._total_bytes:
                raise AccessError(
                    f"the page keeps {self._caller_bytes / 1e6:g} MB of uploads per caller and "
                    f"{self._total_bytes / 1e6:g} MB in all, each for {self._life_s:g} s; wait and upload again",
                    "rate_limited",
                )
            # The random name makes the address of an upload one that only its uploader knows.
            folder = self.uploads / secrets.token_hex(16)
            self._kept.append(_Upload(caller_id, len(data), time.monotonic(), folder))
        folder.mkdir(mode=0o700)
        path = folder / (re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[-80:] or "image")
        path.write_bytes(data)
        return path

    def find(self, name: str) -> Path:
        """Return the path of an upload or example; DataError for any other path, URL or link."""
        # Only the one canonical spelling of a path is accepted: no `..`, no `//`, no link and nothing that a browser,
        # a proxy and this process could read differently.
        path = Path(os.path.realpath(name)) if "\0" not in name else Path()
        if str(path) != name or not path.is_relative_to(self.root):
            raise DataError("this file was not uploaded here; choose an image")
        return path

    def sweep(self) -> None:
        """Delete the uploads whose time is over."""
        with self._changing:
            oldest_s = time.monotonic() - self._life_s
            over = [upload for upload in self._kept if upload.stored_at_s < oldest_s]
            for upload in over:
                shutil.rmtree(upload.folder, ignore_errors=True)
            self._kept = [upload for upload in self._kept if upload not in over]

    async def sweep_forever(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(self._life_s / _SWEEPS_PER_LIFE)
            await asyncio.to_thread(self.sweep)


def erase_uploads(settings: ServingSettings, home: Path, image_ids: Collection[str]) -> int:
    """Delete the uploads of images, by the ids of the images as they would be stored, and return their number."""
    erased = 0
    for path in _own_folder(settings.page_folder, home).glob("uploads/*/*"):
        try:
            data = path.read_bytes()
            ids = {sha256_hex(data), sha256_hex(strip_metadata(data))}
        except (OSError, ImageError):
            continue  # its time was over meanwhile, or it is no image
        if not ids.isdisjoint(image_ids):
            shutil.rmtree(path.parent, ignore_errors=True)
            erased += 1
    return erased


def _own_folder(chosen: Path | None, home: Path) -> Path:
    """Return a folder that only this user can read, made if need be; ConfigError if another user made it."""
    name = f"relook-page-{os.getuid()}-{sha256_hex(os.fsencode(home.resolve()))[:12]}"
    folder = (chosen or Path(tempfile.gettempdir())) / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The name can be guessed and the temporary folder is everybody's: another user may have put a link there.
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to another user; set serving.page_folder to a folder of your own")
    folder.chmod(0o700)
    return folder.resolve()
