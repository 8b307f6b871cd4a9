"""Heads of the audit chain in a second store, where this machine's operator cannot rewrite them.

Every event's number, hash and key id are added there after its commit, and nothing is ever replaced. A path or a
`file://` URL is a log to which lines are appended: an append-only file (`chattr +a`), or one on another machine's
disk. In an object store every head is an object of its own below the prefix, so that object lock keeps it; versions
that somebody hid are read, too.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from records.blobs import open_filesystem
from records.durable import append, explained, open_log
from records.errors import UnavailableError
from records.locked_objects import names_ever_stored, write_object

LOG = "relook-audit-heads.log"
"""Name of the log if the URL is that of a folder."""

_LINE = re.compile(r"(\d+) ([0-9a-f]{64}) ([0-9a-f]{16}|-)")
# What a power cut leaves of a line.
_TORN = re.compile(r"\d*( ([0-9a-f]{0,64}( [0-9a-f]{0,15})?)?)?\0*")


@dataclass(frozen=True)
class Head:
    """Number, hash and key id of an event; the key id is None for an event from before there were keys."""

    number: int
    hash: str
    key_id: str | None

    def __str__(self) -> str:
        """Return the head as it is stored."""
        return f"{self.number} {self.hash} {self.key_id or '-'}"


def write_head(url: str, head: Head) -> None:
    """Add a head to the store at `url`; UnavailableError if it cannot be written there."""
    filesystem, root, is_local = open_filesystem(url, "records.audit_anchor")
    if is_local:
        path = _log(root)
        with explained(path), closing(open_log(path)) as log:
            # A line that a power cut tore gets an end of its own.
            ends = path.stat().st_size == 0 or _last_byte(path) == b"\n"
            append(log, path, f"{'' if ends else chr(10)}{head}\n".encode())
        return
    name = f"{root.rstrip('/')}/{head.number:012d} {head.hash} {head.key_id or '-'}".replace(" ", "_")
    try:
        if not filesystem.exists(name):
            write_object(filesystem, name, f"{head}\n".encode())
    except (OSError, UnavailableError) as error:
        raise UnavailableError(f"the audit anchor {url} cannot be written: {error}") from error


def read_heads(url: str) -> tuple[list[Head], list[str]]:
    """Return the heads in the store, in the order of their arrival where that is known, and one sentence per damage.

    UnavailableError is raised if the store cannot be read.
    """
    filesystem, root, is_local = open_filesystem(url, "records.audit_anchor")
    try:
        if is_local:
            path = _log(root)
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        else:
            paths = names_ever_stored(filesystem, root)
            if paths is None:
                paths = filesystem.find(root.rstrip("/")) if filesystem.exists(root.rstrip("/")) else []
            lines = [path.rpartition("/")[2].replace("_", " ") for path in sorted(paths)]
    except OSError as error:
        raise UnavailableError(f"the audit anchor {url} cannot be read: {error}") from error
    heads, faults = [], []
    for at, line in enumerate(lines, start=1):
        found = _LINE.fullmatch(line)
        if found is not None:
            heads.append(Head(int(found[1]), found[2], None if found[3] == "-" else found[3]))
        elif not _TORN.fullmatch(line):
            faults.append(f"line {at} of the anchor {url} is not a head: somebody else wrote to it")
    return heads, faults


def compare(url: str, heads: Sequence[Head], chain: Mapping[int, Head]) -> list[str]:
    """Return one sentence per kind of difference between anchored heads and the chain in the database."""
    if not heads and chain:
        return [f"no head is anchored at {url}, and the chain has {len(chain)} events"]
    faults = _forks(heads)
    last, newest = max(chain, default=0), max((head.number for head in heads), default=0)
    if newest > last:
        faults.append(
            f"the chain ends at event {last}, and event {newest} is anchored: its end was cut off, or an older backup "
            "was restored"
        )
    number_of = {head.hash: head.number for head in chain.values()}
    kinds: dict[str, list[int]] = defaultdict(list)
    for head in heads:
        here = chain.get(head.number)
        if here is None or here.hash == head.hash:
            # A number within the chain that is missing is found without the anchor.
            continue
        if head.hash in number_of:
            kinds["reordered: the anchored event now has the number {moved}"].append(head.number)
        elif here.key_id != head.key_id:
            kinds[f"re-keyed: it was keyed with {head.key_id} and is now with {here.key_id}"].append(head.number)
        else:
            kinds["replaced: it is not the event that was anchored"].append(head.number)
    anchored = {head.number: head.hash for head in heads}
    for kind, numbers in kinds.items():
        first = min(numbers)
        more = f" (and {len(set(numbers)) - 1} more)" if len(set(numbers)) > 1 else ""
        faults.append(f"event {first}{more} was {kind.format(moved=number_of.get(anchored[first]))}")
    return faults


def _forks(heads: Sequence[Head]) -> list[str]:
    by_number: dict[int, set[str]] = defaultdict(set)
    for head in heads:
        by_number[head.number].add(head.hash)
    return [
        f"the chain was forked: {len(hashes)} heads with the number {number} are anchored"
        for number, hashes in sorted(by_number.items())
        if len(hashes) > 1
    ][:1]


def _log(root: str) -> Path:
    path = Path(root)
    return path / LOG if path.is_dir() else path


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1)
