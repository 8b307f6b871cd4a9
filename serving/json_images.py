"""Images in JSON: base64 texts in bodies that may be as large as an upload."""

import base64
import binascii

from records.errors import DataError

MAX_VALUES = 10_000
"""Values of a JSON body that may be as large as an image."""


def require_few_values(body: bytes) -> None:
    """Raise DataError if a JSON body has many values: its limit of size is that of images, which are one value each.

    It counts characters before anything is parsed, since a parser makes an object of every two bytes. Base64 has none
    of these characters.
    """
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
        raise DataError(f"the JSON has more than {MAX_VALUES} values; send images as base64 texts")


def decoded_base64(text: str, name: str) -> bytes:
    """Return the bytes of a base64 text, which may have line breaks; DataError names the field if it is none."""
    try:
        # As bytes: a list of the words of a text of spaces would take many times its size.
        return base64.b64decode(text.encode("ascii").translate(None, b" \t\r\n"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"{name}: the text is not base64; send the bytes of the file so encoded, and no data:"
        ) from error
