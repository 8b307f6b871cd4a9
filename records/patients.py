"""What stands for a patient: a keyed hash, so that nobody without this home's key can test a guess."""

import hmac

from records.home import Home
from records.key_files import key_of


def patient_hash(home: Home, patient_id: str) -> str:
    """Return what is stored instead of a patient's id: HMAC-SHA-256 under this home's own key, 64 hex characters.

    Args:
        home: whose key is used; it is made at the first call and readable by its owner only.
        patient_id: as the source or the caller names the patient.
    Returns:
        The same value for the same patient in the same home.
    """
    return hmac.new(key_of(home, "patient_salt").encode(), patient_id.encode(), "sha256").hexdigest()
