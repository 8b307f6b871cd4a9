"""What stands for a patient: a keyed hash, so that nobody without this home's key can test a guess."""

import contextlib
import hmac
import os
import secrets

from records.home import Home


def patient_hash(home: Home, patient_id: str) -> str:
    """Return what is stored instead of a patient's id: HMAC-SHA-256 under this home's own key, 64 hex characters.

    Args:
        home: whose key is used; it is made at the first call and readable by its owner only.
        patient_id: as the source or the caller names the patient.
    Returns:
        The same value for the same patient in the same home.
    """
    return hmac.new(_key(home), patient_id.encode(), "sha256").hexdigest()


def _key(home: Home) -> bytes:
    path = home.keys / "patient_salt"
    if not path.exists():
        partial = path.with_name(f"patient_salt.{secrets.token_hex(4)}")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        # Of two processes that make it at once one wins, and both read the winner's.
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
        partial.unlink()
    return path.read_bytes()
