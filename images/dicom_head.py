"""The head of a DICOM file, read without pydicom: what the file says about itself before its data.

It is written the same way in every DICOM file, whatever its transfer syntax, and holds no word about a patient.
"""

import re
import struct

HEAD_BYTES = 16_384
TRANSFER_SYNTAX, SOP_INSTANCE = 0x0010, 0x0003
"""Elements of group 0002."""

UID = re.compile(r"[0-9]+(\.[0-9]+){3,}")
"""A text that is a unique identifier and no file name or number."""

_LONG_LENGTH = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_MAX_ELEMENTS = 100


def file_meta(data: bytes) -> tuple[dict[int, str], int]:
    """Return the elements of group 0002 as texts, by element number, and where the data begins."""
    found: dict[int, str] = {}
    at = 132
    for _ in range(_MAX_ELEMENTS):
        if at + 12 > len(data) or data[at : at + 2] != b"\x02\x00":
            break
        (element,) = struct.unpack_from("<H", data, at + 2)
        is_long = data[at + 4 : at + 6] in _LONG_LENGTH
        start = at + (12 if is_long else 8)
        (length,) = struct.unpack_from("<I", data, at + 8) if is_long else struct.unpack_from("<H", data, at + 6)
        if start + length > len(data):
            break
        found[element] = data[start : start + length].decode("latin-1").strip(" \x00")
        at = start + length
    return found, at
