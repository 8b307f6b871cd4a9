"""Keys that a home makes for itself the first time one is needed; their owner alone can read them."""

import contextlib
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
        home: whose folder `keys/` holds it; processes that share the folder share the key.
        name: of its file.
        make: a new key; default: 64 hex characters from a cryptographic source.
    Returns:
        A file that is never empty and never changes again.
    """
    path = home.keys / name
    if not path.exists():
        partial = path.with_name(f"{name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(make())
        # Of two processes that make it at once one wins, and both read the winner's.
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(partial)
        partial.unlink()
    return path


def key_of(home: Home, name: str, make: Callable[[], str] = _hex) -> str:
    """Return a key of a home; see `key_file`."""
    return key_file(home, name, make).read_text().strip()
