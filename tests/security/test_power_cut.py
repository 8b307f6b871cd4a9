"""After a power cut, on a full disk and after a kill, what was acknowledged is whole and nothing lies about in part.

The cuts are simulated: every call that a program makes below a folder is logged, and the disk is built as it may be
after a cut at a moment of the log; see `bench.drills.simulated_disk`. The full disk is a real one, of 1 MB.
"""

import fcntl
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.drills.power_cut import run_drill
from bench.drills.simulated_disk import Disk, Survives, has_compiler, read_log, recording
from records import audit
from records.blobs import open_blobs
from records.bundles import BundleDocument, write_bundle
from records.durable import SAFE_AGE_S, append, open_log, place, write_file
from records.errors import UnavailableError
from records.home import open_home
from records.ids import new_id, sha256_hex
from records.keys import key_of
from records.settings import RecordsSettings
from records.store import Store, open_store
from tests.records.conftest import arrays, document

__all__ = ["arrays", "document"]

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="the library that logs writes needs gcc")

PROGRAM = """
import json, os, sys
from pathlib import Path
from records.blobs import open_blobs
from records.durable import append, building, make_folders, open_log, place, write_file
from records.home import Home
from records.keys import key_of

root, sync = Path(sys.argv[1]), sys.argv[2] == "sync"
told = os.open(root / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
tell = lambda **what: os.write(told, (json.dumps(what) + "\\n").encode())
blobs = open_blobs(str(root / "blobs"), sync=sync)
log = open_log(root / "journal")
for number in range(8):
    tell(blob=blobs.put(bytes([number]) * 3000 * (number + 1)))
    write_file(root / "settings", f"version {number} " * 300, sync=sync)
    tell(settings=number)
    make_folders(root / "runs" / str(number) / "deep", sync=sync)
    write_file(root / "runs" / str(number) / "deep" / "file", "x" * 2000, sync=sync)
    tell(run=number)
    with building(root / "bundles") as folder:
        (folder / "a").write_bytes(b"a" * 5000)
        (folder / "b").write_bytes(b"b" * 700)
        place(folder, root / "bundles" / str(number)) if sync else folder.rename(root / "bundles" / str(number))
    tell(bundle=number)
    append(log, root / "journal", f"line {number} ".encode() * 200 + b"\\n")
    tell(line=number)
make_folders(root / "keys")
tell(key=key_of(Home(root), "some-key"))
"""


def missing(root: Path, told: list[dict[str, Any]]) -> list[str]:
    """What was told to be done and is not whole, and what is there in part."""
    found = []
    for path in (root / "blobs").rglob("*") if (root / "blobs").is_dir() else ():
        if path.is_file() and not path.name.startswith(".") and sha256_hex(path.read_bytes()) != path.name:
            found.append(f"blob {path.name[:8]} in part")
    settings = (root / "settings").read_text() if (root / "settings").exists() else ""
    if settings not in ("", *(f"version {number} " * 300 for number in range(8))):
        found.append("settings in part")
    for folder in (root / "bundles").glob("[0-9]*"):
        sizes = {path.name: path.read_bytes() for path in folder.iterdir()}
        if sizes != {"a": b"a" * 5000, "b": b"b" * 700}:
            found.append(f"bundle {folder.name} in part")
    for what in told:
        ((kind, value),) = what.items()
        whole = {
            "blob": lambda value: (root / "blobs" / value[:2] / value).is_file(),
            "settings": lambda value: any(settings == f"version {n} " * 300 for n in range(value, 8)),
            "run": lambda value: (root / "runs" / str(value) / "deep" / "file").is_file(),
            "bundle": lambda value: (root / "bundles" / str(value)).is_dir(),
            "line": lambda value: (f"line {value} ".encode() * 200 + b"\n") in (root / "journal").read_bytes(),
            "key": lambda value: (root / "keys" / "some-key").read_text() == value,
        }[kind]
        try:
            if not whole(value):
                found.append(f"{kind} {value} lost")
        except OSError:
            found.append(f"{kind} {value} lost")
    return found


def faults_after_cuts(scratch: Path, argument: str, survives: tuple[Survives, ...], cuts: int) -> list[str]:
    """Run the program, cut the power at random moments, and return what is missing then."""
    root = scratch.resolve() / "disk"
    root.mkdir()
    variables, log = recording(scratch, root)
    disk = Disk(root)
    program = [sys.executable, "-c", PROGRAM, str(root), argument]
    here = Path(__file__).parents[2]
    subprocess.run(program, check=True, cwd=here, env={**os.environ, **variables, "PYTHONPATH": str(here)})
    chance, told, faults = random.Random(5), [], []
    records = list(read_log(log))
    at = {*chance.sample(range(len(records)), cuts), len(records)}
    for number in range(len(records) + 1):
        if number in at:
            target = scratch / f"after-{number}"
            disk.after_cut(chance, chance.choice(survives), target)
            faults += missing(target, told)
        if number < len(records):
            disk.apply(records[number])
            if records[number].path.endswith("/told") and records[number].operation == "W":
                told += [json.loads(line) for line in records[number].data.splitlines()]
    assert len(told) == 41
    assert disk.differences() == []
    return faults


@needs_compiler
def test_what_was_written_durably_survives_every_cut(tmp_path: Path) -> None:
    assert faults_after_cuts(tmp_path, "sync", ("nothing", "all", "earlier", "some"), 150) == []


@needs_compiler
def test_the_same_writes_without_waiting_for_the_disk_are_found_missing(tmp_path: Path) -> None:
    faults = faults_after_cuts(tmp_path, "no", ("nothing", "some"), 100)
    assert {fault.partition(" ")[0] for fault in faults} >= {"blob", "settings", "run", "bundle"}
    # Appended lines are flushed in any case.
    assert not [fault for fault in faults if fault.startswith("line")]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("moments", [2, pytest.param(4, marks=pytest.mark.long)])
def test_predictions_of_the_clinical_preset_survive_cuts(tmp_path: Path, moments: int) -> None:
    (found,) = run_drill(tmp_path, moments, 3, ("predict",)).values()
    assert found["faults"] == []
    assert found["not_logged"] == []
    assert found["acknowledged"] == 40


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_nothing_in_part(
    small_disk: Path, document: BundleDocument, arrays: dict[str, dict[str, Any]], store: Store
) -> None:
    blobs = open_blobs(str(small_disk / "blobs"))
    kept = blobs.put(b"was here before")
    (small_disk / "file").write_text("old")
    (small_disk / "bundles").mkdir()
    with closing(open_log(small_disk / "journal")) as log:
        append(log, small_disk / "journal", b"first line\n")
        home = open_home(small_disk / "home")
        files = lambda: sorted(path for path in small_disk.rglob("*") if path.is_file())  # noqa: E731
        before = files()
        other = Store(store.settings, home, store.taxonomy, store.ledger, blobs)
        huge = {"weights": {"w": np.zeros(500_000, np.float32)}, "golden": arrays["golden"]}
        writes: list[Callable[[], object]] = [
            lambda: blobs.put(os.urandom(2_000_000)),
            lambda: write_file(small_disk / "file", bytes(2_000_000)),
            lambda: append(log, small_disk / "journal", bytes(2_000_000)),
            lambda: write_bundle(other, document, huge["weights"], huge["golden"]),
            lambda: key_of(home, "key", lambda: "k" * 2_000_000),
        ]
        for write in writes:
            with pytest.raises(UnavailableError, match="cannot be written"):
                write()
            assert files() == before
        assert blobs.get(kept) == b"was here before"
        assert (small_disk / "file").read_text() == "old"
        assert (small_disk / "journal").read_text() == "first line\n"
        append(log, small_disk / "journal", b"second line\n")
        assert (small_disk / "journal").read_text() == "first line\nsecond line\n"


def test_what_writers_that_died_left_is_removed_at_opening_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    settings = RecordsSettings(home=tmp_path)
    with closing(open_store(settings)) as store:
        store.blobs.put(b"bytes")
    long_ago = time.time() - SAFE_AGE_S - 60
    folders = ("keys", "blobs/.partial", "bundles", "datasets/abc", "runs/round-1/fit", "runs")
    left = [tmp_path / folder / f".checkpoint.pt.{new_id()}" for folder in folders]
    young, used = tmp_path / "keys" / f".{new_id()}", tmp_path / "keys" / f".{new_id()}"
    kept = [tmp_path / "keys" / ".profile", tmp_path / "runs" / "notes", tmp_path / "blobs" / "ab"]
    for path in (*left, young, used, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"in part")
        if path is not young:
            os.utime(path, (long_ago, long_ago))
    unfinished = tmp_path / "bundles" / f".{new_id()}"
    unfinished.mkdir()
    (unfinished / "weights.safetensors").write_bytes(b"in part")
    os.utime(unfinished, (long_ago, long_ago))
    with used.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_store(settings).close()
        assert not [path for path in (*left, unfinished) if path.exists()]
        assert all(path.exists() for path in (young, used, *kept))
    open_store(settings).close()
    assert not used.exists()


def test_a_writer_that_is_killed_leaves_the_old_file_and_a_temporary_that_is_swept(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from records.durable import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("new, in part")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    home = open_home(tmp_path / "home")
    secret = home.keys / "secret"
    write_file(secret, "old", mode=0o600)
    killed = subprocess.run([sys.executable, "-c", program, str(secret)], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -9
    assert secret.read_text() == "old"
    (left,) = (path for path in home.keys.iterdir() if path != secret)
    long_ago = time.time() - SAFE_AGE_S - 60
    os.utime(left, (long_ago, long_ago))
    open_home(home.root)
    assert list(home.keys.iterdir()) == [secret]


def test_a_stored_blob_that_was_damaged_is_written_again(tmp_path: Path) -> None:
    blobs = open_blobs(str(tmp_path))
    blob = blobs.put(b"whole bytes")
    for damaged in (b"", b"whole", bytes(len(b"whole bytes"))):  # cut short, and zeros of the right size
        (tmp_path / blob[:2] / blob).write_bytes(damaged)
        assert blobs.put(b"whole bytes") == blob
        assert blobs.get(blob) == b"whole bytes"


def test_a_folder_is_placed_once_and_the_first_one_stays(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert place(tmp_path / "first", tmp_path / "final")
    assert not place(tmp_path / "second", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "first"


def test_the_head_of_the_chain_never_names_an_event_that_a_cut_may_take(tmp_path: Path) -> None:
    # Also with durability normal, where SQLite itself does not wait for the disk.
    if not has_compiler():
        pytest.skip("the library that logs writes needs gcc")
    root = tmp_path.resolve() / "disk"
    root.mkdir()
    open_store(RecordsSettings(home=root / "home")).close()
    variables, log = recording(tmp_path, root)
    disk = Disk(root)
    program = """
import sys
from pathlib import Path
from records import audit
from records.settings import RecordsSettings
from records.store import open_store
store = open_store(RecordsSettings(home=Path(sys.argv[1]) / "home"))
for number in range(5):
    with store.ledger.begin() as tx:
        audit.append(tx, actor="me", action="a", subject=str(number))
"""
    here = Path(__file__).parents[2]
    environment = {**os.environ, **variables, "PYTHONPATH": str(here)}
    subprocess.run([sys.executable, "-c", program, str(root)], check=True, cwd=here, env=environment)
    records, chance = list(read_log(log)), random.Random(2)
    moments = {*chance.sample(range(len(records)), 20), len(records)}
    root.rename(tmp_path / "kept")
    for number in range(len(records) + 1):
        if number in moments:
            disk.after_cut(chance, chance.choice(("nothing", "earlier", "some")), tmp_path / f"after-{number}")
            with closing(open_store(RecordsSettings(home=tmp_path / f"after-{number}" / "home"))) as store:
                assert audit.verify(store.ledger, store.home) == []
        if number < len(records):
            disk.apply(records[number])
