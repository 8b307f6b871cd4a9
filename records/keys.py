"""Secret keys of a home, and the keyed hash that stands for a patient.

A key is made the first time it is needed, in a file of the folder `keys/` that only its owner can read.
"""

import contextlib
import hmac
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from records.home import Home


def _hex() -> str:
    return secrets.token_hex(32)


def key_file(home: Home, name: str, make: Callable[[], str] = _hex) -> Path:
    """Return the file of a key, made now if there is none.

    Args:
        home: its folder `keys/` holds the file; processes that share the folder share the key.
        name: file name of the key.
        make: returns a new key; default: 64 hex characters from a cryptographic source.
    Returns:
        A file that is never empty and never changes again.
    """
    path = home.keys / name
    if not path.exists():
        partial = path.with_name(f"{name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(make())
        # A hard link, unlike a rename, fails if the name exists: of two processes that make the key at once,
        # one links its file and both read that one.
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(partial)
        partial.unlink()
    return path


def key_of(home: Home, name: str, make: Callable[[], str] = _hex) -> str:
    """Return the text of a key, made now if there is none; see `key_file`."""
    return key_file(home, name, make).read_text().strip()


def patient_hash(home: Home, patient_id: str) -> str:
    """Return what is stored instead of a patient's id: HMAC-SHA-256 under this home's own key, 64 hex characters.

    The same patient has the same hash within a home. Without the key nobody can test whether a guessed id is
    among the stored hashes.
    """
    return hmac.new(key_of(home, "patient_salt").encode(), patient_id.encode(), "sha256").hexdigest()
