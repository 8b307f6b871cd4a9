"""Ids, hashes and the clock."""

import hashlib
import json
import os
import secrets
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

CLOCK_VARIABLE = "RELOOK_CLOCK_OFFSET_FILE"
"""Names a file with a number of seconds that this process's clock is ahead; for drills. The processes of one machine
share its clock, so only an offset per process shows what two machines do whose clocks differ or are set."""

_MS_BITS, _RANDOM_BYTES = 48, 10
_STEP_BITS = 64
_id_lock = threading.Lock()
_last_id = 0


def new_id() -> str:
    """Return a fresh 32-character hex id that sorts by creation time (48 bits of ms, 80 random).

    Within a process each sorts after the one before, also in the same millisecond and while the clock is set back.
    """
    global _last_id
    with _id_lock:
        fresh = int(_id_of(int(utc_now().timestamp() * 1000)), 16)
        # A random step, so that nobody who was told one id knows the next.
        _last_id = fresh if fresh > _last_id else _last_id + 1 + secrets.randbits(_STEP_BITS)
        return f"{_last_id:032x}"


def id_after(last: str | None) -> str:
    """Return a fresh id that sorts after `last`, even if the clock is behind it; None means there is none yet."""
    return new_id() if last is None else max(new_id(), _id_of(int(last[: _MS_BITS // 4], 16) + 1))


def _id_of(ms: int) -> str:
    return f"{ms:012x}{secrets.token_hex(_RANDOM_BYTES)}"


def utc_now() -> datetime:
    """Return the current time of this machine, aware, in UTC."""
    now = datetime.now(UTC)
    offset_file = os.environ.get(CLOCK_VARIABLE)
    return now if offset_file is None else now + timedelta(seconds=float(Path(offset_file).read_text()))


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hex characters."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys and no spaces, so that equal values give equal text.

    NaN and infinities raise ValueError.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def hash_of(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, 64 hex characters."""
    return sha256_hex(canonical_json(value).encode())
