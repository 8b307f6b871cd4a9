"""Ids, hashes and the clock."""

import hashlib
import json
import secrets
import time
from datetime import UTC, datetime
from typing import Any


def new_id() -> str:
    """Return a fresh 32-character hex id that sorts by creation time (48 bits of ms, 80 random)."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def utc_now() -> datetime:
    """Return the current time, aware, in UTC."""
    return datetime.now(UTC)


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
