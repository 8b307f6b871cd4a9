"""Secret keys of a home, and the keyed hash that stands for a patient.

A key is made the first time it is needed, in a file of the folder `keys/` that only its owner can read.
"""

import hmac
import secrets
from collections.abc import Callable
from pathlib import Path

from records.durable import replacing
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
    Raises:
        UnavailableError: it cannot be written.
    """
    path = home.keys / name
    if not path.exists():
        # Of two processes that make the key at once, one keeps its file and both read that one.
        with replacing(path, mode=0o600, keep=True) as temporary:
            temporary.write_text(make())
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
