"""The images of tasks that somebody else made, fetched from this Label Studio and from hosts that the caller names.

Whoever writes a task writes the address of its image, so an address is checked before anything is sent: no other host
is asked, no redirect leads to one, and the token goes to this Label Studio alone.
"""

import base64
import binascii
import posixpath
import re
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any, Self
from urllib.parse import SplitResult, parse_qs, unquote, urljoin, urlsplit

import httpx

from images.members import MAX_MEMBER_BYTES
from labeling.client import LabelStudioClient
from records.errors import ConfigError, DataError
from records.types.base import LINE

_OWN_FILES = re.compile(r"/(data|storage-data)/|/(tasks|projects)/[0-9]+/(resolve|presign)/")
_HOPS = 3
_PAUSES_S = (0.3, 1.0, 3.0)
_RETRIED = frozenset({429, 502, 503, 504})
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[A-Za-z0-9_.-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")


class TaskFiles:
    """Fetches the images of tasks; `with` closes its connections.

    Args:
        client: connected to the Label Studio of the tasks.
        allowed: further hosts, as HOST or HOST:PORT, that the caller trusts with requests from here.
    Raises:
        ConfigError: a host is not written like one.
    """

    def __init__(self, client: LabelStudioClient, allowed: Sequence[str] = ()) -> None:
        for host in allowed:
            if not _HOST.fullmatch(host):
                raise ConfigError(f"--allow-host {host!r} is no host; write for example images.example.org or it:8443")
        self._client = client
        self._base = urlsplit(client.url)
        self._allowed = frozenset(host.lower() for host in allowed)
        self._others = httpx.Client(timeout=60.0, follow_redirects=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._others.close()

    def read(self, value: Any) -> bytes:
        """Return the image that a task's data names.

        Args:
            value: an address, an embedded image, or a list of one of them.
        Returns:
            The bytes, whatever they are.
        Raises:
            DataError: there is no image, there are several, or it is not fetched; the sentence says why.
            LabelStudioError: Label Studio cannot be reached.
        """
        if isinstance(value, list) and len(value) > 1:
            raise DataError(f"it has {len(value)} images, and an annotation says the class of one")
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, str) or not value.strip():
            raise DataError("it has no image")
        if value[:5].lower() == "data:":
            return _embedded(value)
        return self._fetched(value.strip())

    def _fetched(self, value: str) -> bytes:
        address = value
        for hop in range(_HOPS):
            where, is_own = self._checked(address, is_redirect=hop > 0)
            found = self._get(where, is_own)
            if isinstance(found, bytes):
                return found
            address = urljoin(where, found)
        raise DataError(f"its image is behind more than {_HOPS - 1} redirects")

    def _checked(self, value: str, *, is_redirect: bool) -> tuple[str, bool]:
        """Return the address to ask and whether it is this Label Studio's; DataError if it is not to be asked."""
        # Its own paths come without the prefix under which a proxy has it.
        prefix = self._base.path.rstrip("/")
        if value.startswith("/") and not value.startswith(("//", f"{prefix}/")):
            value = prefix + value
        try:
            there = urlsplit(urljoin(f"{self._client.url}/", value))
            host = _host_of(there)
        except ValueError as error:
            raise DataError("the address of its image cannot be read") from error
        # Without path and query, which may hold somebody's token.
        shown = LINE.keep(f"{there.scheme}://{host}")
        if there.scheme not in _PORTS:
            raise DataError(f"its image is at {shown}, which this Label Studio has no storage for; it is not fetched")
        if there.username is not None or there.password is not None:
            raise DataError(f"the address of its image at {shown} holds a user's name or password; it is not fetched")
        if (there.scheme, host) == (self._base.scheme, _host_of(self._base)):
            if is_redirect:
                raise DataError("Label Studio sends its image on to another page of its own; it is not fetched")
            path = unquote(there.path)
            inside = path.removeprefix(prefix) if path.startswith(f"{prefix}/") else ""
            # Beside the prefix is another program, which must not get the token.
            if ".." in path.replace("\\", "/").split("/") or not _OWN_FILES.match(inside):
                raise DataError(f"its image is at {LINE.keep(path)}, where Label Studio has no images")
            return there.geturl(), True
        if not {host, there.hostname} & self._allowed:
            reason = "to which Label Studio sends on" if is_redirect else "not in this Label Studio"
            raise DataError(f"its image is at {shown}, {reason}; it is not fetched without --allow-host {host}")
        return there.geturl(), False

    def _get(self, address: str, is_own: bool) -> bytes | str:
        """Return the bytes at an address, or where it redirects to; nothing is sent there."""
        for pause_s in (*_PAUSES_S, None):
            try:
                return self._ask(address, is_own, last=pause_s is None)
            except httpx.InvalidURL as error:
                raise DataError("the address of its image cannot be read") from error
            except (httpx.TransportError, _BusyError) as error:
                if pause_s is None and is_own:
                    with self._client.translated_errors("read the image of a task"):
                        raise
                if pause_s is None:
                    host = LINE.keep(urlsplit(address).hostname or "")
                    raise DataError(f"its image was not fetched: {host} cannot be reached") from error
                time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _ask(self, address: str, is_own: bool, *, last: bool) -> bytes | str:
        http, headers = self._client.transport() if is_own else (self._others, {})
        # An image compresses badly, and a compressed response could be of any size.
        headers = {**headers, "accept": "image/*,*/*;q=0.5", "accept-encoding": "identity"}
        headers.pop("Content-Type", None)
        response = http.send(http.build_request("GET", address, headers=headers), stream=True, follow_redirects=False)
        with closing(response):
            if response.is_redirect and "location" in response.headers:
                return response.headers["location"]
            if response.status_code in _RETRIED and not last:
                raise _BusyError
            if not response.is_success:
                raise DataError(f"its image was not fetched: {LINE.keep(urlsplit(address).hostname or '')} responded "
                                f"with {response.status_code}")  # fmt: skip
            data = bytearray()
            for part in response.iter_bytes():
                data += part
                if len(data) > MAX_MEMBER_BYTES:
                    raise DataError(f"its image has more than {MAX_MEMBER_BYTES // 2**20} MB")
        return bytes(data)


class _BusyError(Exception):
    """The server asks to be asked again."""


def file_name(value: Any) -> str:
    """Return the name of the file that a task's data names; empty for an embedded image or none."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str) or value[:5].lower() == "data:":
        return ""
    try:
        address = urlsplit(value)
    except ValueError:
        return ""
    query = parse_qs(address.query)
    path = address.path
    # Files of a local storage and of a cloud storage are named in the query, the latter encoded.
    if "d" in query and path.endswith("/local-files/"):
        path = query["d"][0]
    elif "fileuri" in query:
        try:
            path = urlsplit(base64.urlsafe_b64decode(query["fileuri"][0] + "==").decode()).path
        except ValueError:
            path = ""
    return posixpath.basename(unquote(path))


def _host_of(address: SplitResult) -> str:
    host = address.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return host if address.port in (None, _PORTS.get(address.scheme)) else f"{host}:{address.port}"


def _embedded(value: str) -> bytes:
    head, _, body = value.partition(",")
    if not head.lower().endswith(";base64"):
        raise DataError("its image is embedded in a form that is not base64")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as error:
        raise DataError("its embedded image is not base64") from error
