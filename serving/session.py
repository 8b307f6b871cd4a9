"""A visitor's key in a browser: a cookie that no script reads, and a proof that no other server gets.

Browsers send a cookie to every port of its host name, so any program that listens on this machine can collect the
cookies of 127.0.0.1. Therefore the cookie is not the key but the key XOR random bytes of the same length. Those bytes
are the proof; the page's script keeps them in the storage of its origin, which includes the port, and sends them as a
header. Either half alone is random and says nothing about the key, and a page of another origin can send no such
header. Nothing is stored on the server.
"""

import base64
import binascii
import secrets
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers

COOKIE = "relook_session"
PROOF_HEADER = "x-relook-proof"
SESSION_S = 12 * 3600
"""How long a browser keeps the cookie, seconds."""


def split_key(key: str) -> tuple[str, str]:
    """Return the value of the cookie and the proof, from which `key_of_session` makes the key again."""
    secret = key.encode()
    pad = secrets.token_bytes(len(secret))
    return _text(_xor(secret, pad)), _text(pad)


def key_of_session(headers: Headers) -> str | None:
    """Return the key of a request of the page's script; None if it has no session, or comes from another site."""
    # Only a browser can be tricked into sending a cookie, and it says where the request comes from.
    if headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return None
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        halves = [base64.urlsafe_b64decode(half) for half in (cookie.value if cookie else "", _proof(headers))]
        key = _xor(*halves).decode()
    except (CookieError, binascii.Error, ValueError):
        return None
    return key or None


def _proof(headers: Headers) -> str:
    return headers.get(PROOF_HEADER, "")


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


def _text(half: bytes) -> str:
    return base64.urlsafe_b64encode(half).decode()
