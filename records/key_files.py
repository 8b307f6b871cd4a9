"""Keys that a home makes for itself the first time one is needed."""

import contextlib
import secrets

from records.home import Home


def key_of(home: Home, name: str) -> str:
    """Return a key of a home, made now if there is none.

    Args:
        home: whose folder `keys/` holds it; processes that share the folder share the key.
        name: of its file.
    Returns:
        64 hex characters, from a cryptographic source.
    """
    path = home.keys / name
    if not path.exists():
        partial = path.with_name(f"{name}.{secrets.token_hex(4)}")
        partial.touch(0o600)
        partial.write_text(secrets.token_hex(32))
        # Of two processes that make it at once the first one wins.
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(partial)
        partial.unlink()
    return path.read_text()
