"""Images that an import fetched from elsewhere, kept until it has ended: an interrupted one fetches only the rest.

They lie in one folder per source below `cache/importing`. An import that ends deletes its folder, and one that begins
deletes those of other sources.
"""

import shutil
from collections.abc import Collection, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from records.errors import ImageError, UnavailableError
from records.ids import sha256_hex
from records.images import strip_metadata

_FOLDER = "importing"


class Fetched:
    """The images of one import. Safe to use from several threads.

    Args:
        folder: its folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = (path.name.rpartition("-") for path in folder.iterdir())
        self._found = {key: digest for key, _, digest in names}

    def find(self, key: str) -> bytes | None:
        """Return what an earlier run fetched under a key, or None."""
        digest = self._found.get(key)
        with suppress(OSError):
            data = (self._folder / f"{key}-{digest}").read_bytes()
            # A machine that lost power may have kept the file's name and not its content.
            return data if sha256_hex(data) == digest else None
        return None

    def keep(self, key: str, data: bytes) -> Path:
        """Keep what was fetched under a key, and return its path; UnavailableError if it cannot be written."""
        path = self._folder / f"{key}-{sha256_hex(data)}"
        try:
            path.write_bytes(data)
        except OSError as error:
            raise UnavailableError(f"images cannot be written to {self._folder} ({error.strerror})") from error
        return path


@contextmanager
def fetched_for(cache: Path, source: str) -> Generator[Fetched]:
    """Yield what was fetched for an import; it is deleted if the block ends without an error.

    Args:
        cache: folder of the home.
        source: what the import reads, as a file name.
    Yields:
        The images that are there.
    """
    root = cache / _FOLDER
    for other in root.glob("*"):
        if other.name != source:
            shutil.rmtree(other, ignore_errors=True)
    folder = root / source
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    yield Fetched(folder)
    shutil.rmtree(root, ignore_errors=True)


def forget_fetched(cache: Path, image_ids: Collection[str]) -> int:
    """Delete the kept images with these ids, and those whose id cannot be told; return how many."""
    deleted = 0
    for path in (cache / _FOLDER).glob("*/*"):
        with suppress(OSError):
            try:
                image_id = sha256_hex(strip_metadata(path.read_bytes()))
            except ImageError:
                image_id = ""
            if not image_id or image_id in image_ids:
                path.unlink()
                deleted += 1
    return deleted
