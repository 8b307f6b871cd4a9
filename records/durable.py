"""The durable write: a file or a folder appears whole or not at all, also after a power cut.

A file is written under a temporary name in its own folder, flushed to the disk (fsync), renamed, and then its folder
is flushed, because a rename is an entry of the folder. A folder with several files is prepared the same way and
renamed when all of it is on disk. What may be lost in a power cut passes `sync=False`; it still appears at once.

A writer holds a lock (flock) on its temporary file, so `sweep` removes those of writers that died and no other.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from records.errors import UnavailableError
from records.ids import new_id

SAFE_AGE_S = 3600.0
"""Age from which a temporary file without a writer is removed, seconds."""

_TEMPORARY = re.compile(r"\.(.+\.)?[0-9a-f]{32}")


def write_file(path: Path, data: bytes | memoryview | str, *, mode: int = 0o666, sync: bool = True) -> None:
    """Write a file, or replace it.

    Args:
        path: in a folder that exists.
        data: the content; text is stored as UTF-8.
        mode: permission bits of the new file, before the umask.
        sync: false if it may be lost in a power cut.
    Raises:
        UnavailableError: it cannot be written, for example because the disk is full; what was there before is still
            there, and nothing else is left.
    """
    with replacing(path, mode=mode, sync=sync) as temporary, temporary.open("r+b") as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(
    path: Path, *, mode: int = 0o666, sync: bool = True, within: Path | None = None, keep: bool = False
) -> Generator[Path]:
    """Give the block an empty temporary file to fill, and move it to `path` when the block ends without an error.

    Args:
        path: in a folder that exists.
        mode: permission bits of the new file, before the umask.
        sync: false if it may be lost in a power cut.
        within: folder of the temporary file, on the same file system; default: that of `path`.
        keep: leave a file that is there already, for a name that several processes may claim.
    Yields:
        The temporary file.
    Raises:
        UnavailableError: as of `write_file`.
    """
    # With the name in it: torch refuses a file whose name begins with its only dot.
    temporary = (within or path.parent) / f".{path.name[:64]}.{new_id()}"
    with explained(path):
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            _lock(handle)
            yield temporary
            if sync:
                # Opened again: the block may have put another file under the name.
                sync_file(temporary)
            if keep:
                # A hard link, unlike a rename, fails if the name exists; then the first writer's file stays.
                with contextlib.suppress(FileExistsError):
                    path.hardlink_to(temporary)
            else:
                temporary.rename(path)
            if sync:
                sync_folder(path.parent)
        finally:
            os.close(handle)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def building(parent: Path) -> Generator[Path]:
    """Give the block a temporary folder in `parent`, which is removed at its end unless `place` moved it away.

    UnavailableError is raised if it cannot be made, or if the block cannot write.
    """
    folder = parent / f".{new_id()}"
    with explained(parent):
        make_folders(parent)
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(handle)
            yield folder
        finally:
            os.close(handle)
            shutil.rmtree(folder, ignore_errors=True)


def place(folder: Path, final: Path) -> bool:
    """Flush everything in a folder and give it its final name, in the same parent.

    Returns false, and leaves both as they are, if the name is taken by a folder with files. UnavailableError is
    raised if the disk cannot be written.
    """
    with explained(final):
        sync_tree(folder)
        try:
            folder.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process placed it first, and may not have flushed the name yet.
            sync_folder(final.parent)
            return False
        sync_folder(final.parent)
    return True


def make_folders(folder: Path, *, sync: bool = True) -> None:
    """Make a folder and those above it if they are missing; UnavailableError if that fails."""
    missing: list[Path] = []
    above = folder
    while not above.is_dir():
        missing.append(above)
        above = above.parent
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing if sync else ():
            sync_folder(made.parent)


def sync_tree(folder: Path) -> None:
    """Wait until all files and names in a folder are on disk; reported as `sync_file` does."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync_file(Path(root, name))
        sync_folder(Path(root))


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on disk; it is reported as OSError if it cannot be written there."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk; reported as `sync_file` does."""
    try:
        sync_file(folder)
    except OSError as error:
        # Some network file systems cannot flush a folder, and write its entries at once.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def append(file: FileIO, path: Path, data: bytes) -> None:
    """Append to an open file and wait until the data are on disk.

    Args:
        file: opened with `open_log`.
        path: of the file, for the error.
        data: what comes after its end.
    Raises:
        UnavailableError: they cannot be written; the file then ends where it did before.
    """
    with explained(path):
        end = os.fstat(file.fileno()).st_size
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            # Half a line at the end would be glued to the next one. A file that may only grow keeps it.
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def open_log(path: Path, *, mode: int = 0o666) -> FileIO:
    """Open a file for `append`, and make it with these permission bits if it is missing."""
    with explained(path):
        is_new = not path.exists()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, mode)
        if is_new:
            sync_folder(path.parent)
    # Unbuffered: a buffer would write what failed a second time when the file is closed.
    return FileIO(handle, "ab")


def sweep(folder: Path, *, below: bool = False) -> int:
    """Remove temporary files and folders whose writer died, and return their number.

    Args:
        folder: where to look; a missing one is empty.
        below: look in all folders below it, too.
    Returns:
        How many were removed. What cannot be removed is left for the next time.
    """
    swept = 0
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root, name)
            if _TEMPORARY.fullmatch(name) and _is_abandoned(path):
                _remove(path)
                swept += 1
        folders[:] = [name for name in folders if below and not _TEMPORARY.fullmatch(name)]
    return swept


def _is_abandoned(path: Path) -> bool:
    try:
        # Both: the age alone is wrong after the clock was set, and a lock is not seen from every machine.
        if time.time() - path.lstat().st_mtime < SAFE_AGE_S:
            return False
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def _lock(handle: int) -> None:
    # Where the file system has no locks, `sweep` cannot take one either and removes nothing.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def explained(path: Path) -> Generator[None]:
    """Turn an OSError of the block into UnavailableError, which names `path` and what would help."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space" if is_full else "see that its folder is there and may be written"
        raise UnavailableError(f"{path} cannot be written ({error.strerror or error}); {advice}") from error
