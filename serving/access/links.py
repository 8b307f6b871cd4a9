"""Links to stored images that end by themselves: whoever holds one sees one image until it expires."""

import hmac
import time
from urllib.parse import urlencode

from records.errors import AccessError
from records.home import Home
from records.keys import key_of

LONGEST_S = 7 * 24 * 3600


def sign_image_path(home: Home, image_id: str, lifetime_s: int, now_s: float | None = None) -> str:
    """Return the path of an image with its expiry and signature.

    Args:
        home: whose key signs.
        image_id: 64 hex characters.
        lifetime_s: how long the link works, at most a week.
        now_s: seconds since 1970; default: the clock.
    Returns:
        A path that starts with /v1/images/.
    """
    expires = int((time.time() if now_s is None else now_s) + min(lifetime_s, LONGEST_S))
    query = urlencode({"expires": expires, "signature": _signature(home, image_id, expires)})
    return f"/v1/images/{image_id}?{query}"


def check_link(home: Home, image_id: str, expires: int, signature: str) -> None:
    """Raise AccessError unless a link was signed by this home and has not expired."""
    # As bytes: of strings it compares only those that are ASCII.
    if not hmac.compare_digest(_signature(home, image_id, expires).encode(), signature.encode()):
        raise AccessError("the signature of this link does not fit", "forbidden")
    if time.time() > expires:
        raise AccessError("this link has expired; ask for a fresh one", "forbidden")


def _signature(home: Home, image_id: str, expires: int) -> str:
    return hmac.new(key_of(home, "link-key").encode(), f"{image_id}:{expires}".encode(), "sha256").hexdigest()
