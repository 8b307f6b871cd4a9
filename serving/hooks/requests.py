"""The requests of hooks: to an address that was checked, and to no other one.

A host name is resolved once, every address is checked, and the connection goes to one of these addresses: a name that
means another machine a moment later leads nowhere else. Redirects are not followed, and no proxy of the environment is
used.
"""

import ipaddress
import socket
import ssl
from collections.abc import Iterable
from urllib.parse import urlsplit, urlunsplit

import httpx

from records.errors import UnavailableError
from serving.hooks.settings import HookSettings

TIMEOUT_S = 10.0

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def post(hook: HookSettings, body: bytes, headers: dict[str, str]) -> None:
    """Send a body to a hook; UnavailableError, with the reason in one sentence, unless the response is a success."""
    parts = urlsplit(hook.url)
    host = parts.hostname or ""
    address = _checked(hook, host, parts.port or (443 if parts.scheme == "https" else 80))
    netloc = f"[{address}]" if address.version == 6 else str(address)
    url = urlunsplit((parts.scheme, f"{netloc}:{parts.port}" if parts.port else netloc, parts.path, parts.query, ""))
    # The certificate is that of the name, also where the connection is made by address.
    sent = {**headers, "Host": parts.netloc}
    # Of this machine, where an operator adds the authority of a private network.
    trusted = ssl.create_default_context()
    named = {} if is_address(host) else {"sni_hostname": host}
    try:
        with (
            httpx.Client(verify=trusted, trust_env=False, follow_redirects=False, timeout=TIMEOUT_S) as client,
            client.stream("POST", url, content=body, headers=sent, extensions=named) as got,
        ):
            # The body is not read: it may be of any size.
            status = got.status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnavailableError(f"{host} does not respond: {str(error) or type(error).__name__}") from error
    if 300 <= status < 400:
        raise UnavailableError(f"{host} responds with a redirect ({status}), which is not followed; set its target")
    if not 200 <= status < 300:
        raise UnavailableError(f"{host} responds with {status}; it must be 2xx")


def _checked(hook: HookSettings, host: str, port: int) -> Address:
    """Return the address to connect to; UnavailableError if a name leads to a private one that is not allowed."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnavailableError(f"{host} cannot be resolved: {error}") from error
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    # An address that stands in the settings was chosen by the administrator; a name is in the hands of its owner.
    if not (hook.private or is_address(host)):
        for address in addresses:
            if not is_public(address):
                raise UnavailableError(
                    f"{host} is the private address {address}; set `private` of this hook to allow it"
                )
    return addresses[0]


def is_address(host: str) -> bool:
    """Return whether a host is an IP address and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_public(address: Address) -> bool:
    """Return whether an address is one of the internet, and contains none of a private network."""
    return all(part.is_global and not part.is_multicast for part in (address, *_contained(address)))


def _contained(address: Address) -> Iterable[Address]:
    """Yield the IPv4 addresses to which an IPv6 address is translated."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            yield address.ipv4_mapped
        if address.sixtofour is not None:
            yield address.sixtofour
        if address.teredo is not None:
            yield from address.teredo
        if address in _NAT64:
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
