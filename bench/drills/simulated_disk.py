"""What may be on a disk after the power was cut: a log of a program's writes, and the states that it allows.

`recording` compiles `disk_log.c` and returns the environment under which a program logs its writes. `Disk` replays the
log. Content that was flushed (fsync of the file) is there, and so are names whose folder was flushed. Of everything
else any part may be there: nothing, all, all up to a moment, or some of it in any order, the writes torn at sectors.
"""

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Survives = Literal["nothing", "all", "earlier", "some"]
SURVIVES: tuple[Survives, ...] = ("nothing", "all", "earlier", "some", "some")
_HEAD = struct.Struct("<cIIQQ")
_SECTOR = 512
# The index of a write-ahead log is shared memory: SQLite makes it anew when it opens the database.
_VOLATILE = "-shm"


@dataclass(frozen=True)
class Record:
    """A call that succeeded: operation (see `disk_log.c`), absolute paths, offset or size, data."""

    operation: str
    path: str
    second: str
    number: int
    data: bytes


def recording(scratch: Path, root: Path) -> tuple[dict[str, str], Path]:
    """Compile the library that logs writes below `root`; return the variables that load it, and the log.

    FileNotFoundError is raised without a C compiler.
    """
    library, log = scratch / "disk_log.so", scratch / "disk.log"
    source = Path(__file__).with_name("disk_log.c")
    command = ["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(library), "DISK_ROOT": str(root), "DISK_LOG": str(log)}, log


def read_log(log: Path) -> Iterator[Record]:
    """Yield the records of a log in order."""
    with log.open("rb") as file:
        while head := file.read(_HEAD.size):
            operation, first, second, number, size = _HEAD.unpack(head)
            yield Record(
                operation.decode(), file.read(first).decode(), file.read(second).decode(), number, file.read(size)
            )


@dataclass
class _File:
    """Content that is on disk for certain, and writes that may be: (time, offset, data), data None to set the size."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, int, bytes | None]] = field(default_factory=list)


@dataclass
class _Folder:
    names: dict[str, "_File | _Folder"] = field(default_factory=dict)
    """as programs see them"""
    durable: dict[str, "_File | _Folder"] = field(default_factory=dict)
    """on disk for certain"""


@dataclass(frozen=True)
class _Naming:
    """A change of names that happens as one: (folder, name, what it names now), None for nothing."""

    at: int
    changes: tuple[tuple[_Folder, str, _File | _Folder | None], ...]


class Disk:
    """A disk that starts as a copy of a folder and follows a log.

    Args:
        root: absolute path of the folder in the log; what is there now was flushed long ago.
    """

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._top = _read_folder(root)
        self._pending: list[_Naming] = []
        self._at = 0

    def apply(self, record: Record) -> None:
        """Follow one call."""
        self._at += 1
        operation = record.operation
        if operation == "O":
            found = self._find(record.path)
            if found is None:
                self._name((record.path, _File()))
            elif isinstance(found, _File) and record.number:
                found.pending.append((self._at, 0, None))
        elif operation in "WT":
            found = self._find(record.path)
            # Whoever writes to a file without a name writes nothing that survives.
            if isinstance(found, _File):
                found.pending.append((self._at, record.number, record.data if operation == "W" else None))
        elif operation == "F":
            self._flush(self._find(record.path))
        elif operation == "M":
            self._name((record.path, _Folder()))
        elif operation == "U":
            self._name((record.path, None))
        elif operation == "L":
            self._name((record.second, self._find(record.path)))
        elif operation == "R":
            self._name((record.path, None), (record.second, self._find(record.path)))

    def after_cut(self, chance: random.Random, survives: Survives, target: Path) -> None:
        """Write to `target`, which must not exist, what may be on the disk if the power is cut now.

        Args:
            chance: draws what survives of that which was not flushed.
            survives: how much does.
            target: the new folder.
        """
        moment = chance.randint(0, self._at)
        names = {id(folder): dict(folder.durable) for folder in _folders(self._top)}
        for naming in self._pending:
            if _stays(chance, survives, naming.at, moment):
                for folder, name, node in naming.changes:
                    here = names.setdefault(id(folder), dict(folder.durable))
                    if node is None:
                        here.pop(name, None)
                    else:
                        here[name] = node
        self._write(self._top, target, names, lambda file: _content(file, chance, survives, moment))

    def differences(self) -> list[str]:
        """Return the paths at which the folder on the real disk is not what the log says, in order."""
        found: list[str] = []
        names = {id(folder): dict(folder.names) for folder in _folders(self._top, durable=False)}

        def compare(folder: _Folder, path: Path) -> None:
            seen = {name for name in os.listdir(path) if not _is_unseen(name)}
            here = {name for name in names[id(folder)] if not _is_unseen(name)}
            found.extend(str(path / name) for name in sorted(seen ^ here))
            for name in sorted(seen & here):
                node = folder.names[name]
                if isinstance(node, _Folder):
                    compare(node, path / name)
                elif bytes(_applied(node.durable, node.pending)) != (path / name).read_bytes():
                    found.append(str(path / name))

        compare(self._top, Path(self._root))
        return found

    def _write(
        self,
        folder: _Folder,
        target: Path,
        names: "dict[int, dict[str, _File | _Folder]]",
        content: Callable[[_File], bytearray],
    ) -> None:
        target.mkdir()
        for name, node in names.get(id(folder), folder.durable).items():
            if name.endswith(_VOLATILE):
                continue
            if isinstance(node, _Folder):
                self._write(node, target / name, names, content)
            else:
                (target / name).write_bytes(content(node))

    def _place(self, path: str) -> tuple[_Folder, str] | None:
        inside = path[len(self._root) :].strip("/").split("/")
        folder: _File | _Folder | None = self._top
        for part in inside[:-1]:
            folder = folder.names.get(part) if isinstance(folder, _Folder) else None
        return (folder, inside[-1]) if isinstance(folder, _Folder) else None

    def _find(self, path: str) -> "_File | _Folder | None":
        if path == self._root:
            return self._top
        place = self._place(path)
        return place[0].names.get(place[1]) if place is not None else None

    def _name(self, *changes: "tuple[str, _File | _Folder | None]") -> None:
        placed = []
        for path, node in changes:
            place = self._place(path)
            if place is None:
                continue
            folder, name = place
            placed.append((folder, name, node))
            if node is None:
                folder.names.pop(name, None)
            else:
                folder.names[name] = node
        self._pending.append(_Naming(self._at, tuple(placed)))

    def _flush(self, node: "_File | _Folder | None") -> None:
        if isinstance(node, _File):
            node.durable, node.pending = _applied(node.durable, node.pending), []
        elif isinstance(node, _Folder):
            left = []
            for naming in self._pending:
                if any(folder is node for folder, _, _ in naming.changes):
                    for folder, name, named in naming.changes:
                        if named is None:
                            folder.durable.pop(name, None)
                        else:
                            folder.durable[name] = named
                else:
                    left.append(naming)
            self._pending = left


def _is_unseen(name: str) -> bool:
    # Temporary files of safetensors vanish with a call that is not logged.
    return name.endswith(_VOLATILE) or name.startswith(".tmp")


def _read_folder(path: Path) -> _Folder:
    folder = _Folder()
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if not entry.name.endswith(_VOLATILE):
            is_folder = entry.is_dir(follow_symlinks=False)
            here = Path(entry.path)
            folder.names[entry.name] = _read_folder(here) if is_folder else _File(bytearray(here.read_bytes()))
    folder.durable = dict(folder.names)
    return folder


def _folders(top: _Folder, *, durable: bool = True) -> Iterator[_Folder]:
    yield top
    for node in (top.durable if durable else top.names).values():
        if isinstance(node, _Folder):
            yield from _folders(node, durable=durable)


def _stays(chance: random.Random, survives: Survives, at: int, moment: int) -> bool:
    if survives in ("nothing", "all"):
        return survives == "all"
    return at <= moment if survives == "earlier" else chance.random() < 0.5


def _content(file: _File, chance: random.Random, survives: Survives, moment: int) -> bytearray:
    stays = [change for change in file.pending if _stays(chance, survives, change[0], moment)]
    if survives == "some" and stays and chance.random() < 0.5:
        # The last write reached the disk in part: whole sectors, in any number.
        at, offset, data = stays[-1]
        if data is not None:
            whole = chance.randrange(0, len(data) + _SECTOR, _SECTOR)
            stays[-1] = (at, offset, data[: max(0, whole - offset % _SECTOR)])
    return _applied(file.durable, stays)


def _applied(content: bytearray, changes: "list[tuple[int, int, bytes | None]]") -> bytearray:
    result = bytearray(content)
    for _, number, data in changes:
        if data is None:
            size = number
            result = result[:size] + bytes(max(0, size - len(result)))
        else:
            result.extend(bytes(max(0, number - len(result))))
            result[number : number + len(data)] = data
    return result


def has_compiler() -> bool:
    """Return whether `recording` can compile its library."""
    return shutil.which("gcc") is not None
