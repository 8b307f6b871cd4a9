"""Reverse proxies: whom a request comes from, under which name and path, if a proxy stands before the service.

Anybody can send X-Forwarded headers, so they are believed only from the addresses of `serving.forwarded_allow_ips`
and removed otherwise: the page, which also reads them, gets only what was believed.
"""

import ipaddress
from collections.abc import Sequence
from typing import cast

from starlette.datastructures import Headers
from starlette.types import Scope

FORWARDED = frozenset(
    {
        b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-port", b"x-forwarded-prefix",
        b"x-forwarded-proto", b"x-forwarded-server", b"x-real-ip", b"x-client-ip", b"true-client-ip",
        b"cf-connecting-ip", b"x-original-url", b"x-rewrite-url",
    }
)  # fmt: skip
"""Headers by which a proxy shows itself."""


class Proxies:
    """The reverse proxies that are believed.

    Args:
        trusted: addresses or networks.
        root_path: path below which they show the service, without a slash at its end.
    """

    def __init__(self, trusted: Sequence[str], root_path: str) -> None:
        self._trusted = [ipaddress.ip_network(network) for network in trusted]
        self._root_path = root_path

    def resolve(self, scope: Scope) -> Scope:
        """Return the scope of a request as if it had come without the proxy.

        Args:
            scope: of an HTTP request, as the server made it.
        Returns:
            A scope whose client, scheme and Host are the caller's, whose path is without `root_path`, and whose state
            says whether a proxy was on the way (`proxied`).
        """
        headers = Headers(scope=scope)
        peer = (scope.get("client") or ("", 0))[0]
        believed = self.trusts(peer)
        kept = [(name, value) for name, value in scope["headers"] if name not in FORWARDED]
        proxied = believed or len(kept) < len(scope["headers"])
        # The state stays the same object: the listener writes into it how the request ended.
        scope.setdefault("state", {})["proxied"] = proxied
        changed = {**scope, "headers": kept, "root_path": self._root_path}
        # A proxy may strip the prefix or leave it. Its raw form is compared: an escaped slash is not a slash.
        prefix, raw = self._root_path.encode(), cast(bytes, scope.get("raw_path") or scope["path"].encode())
        if prefix and (raw == prefix or raw.startswith(prefix + b"/")):
            changed["path"] = scope["path"][len(self._root_path) :] or "/"
            changed["raw_path"] = raw[len(prefix) :] or b"/"
        if believed:
            self._believe(changed, headers, peer)
        return changed

    def trusts(self, host: str) -> bool:
        """Return whether an address is that of a believed proxy."""
        address = _address(host)
        return address is not None and any(address in network for network in self._trusted)

    def _believe(self, scope: Scope, headers: Headers, peer: str) -> None:
        hops = [part.strip() for value in headers.getlist("x-forwarded-for") for part in value.split(",")]
        # Each proxy appends the address it saw, so the last one that is no proxy of ours is the caller's.
        caller = next((hop for hop in reversed(hops) if not self.trusts(hop)), hops[0] if hops else peer)
        scope["client"] = (caller if _address(caller) is not None else peer, 0)
        proto = headers.get("x-forwarded-proto", "").strip().lower()
        if proto in ("http", "https"):
            scope["scheme"] = proto
        host = headers.get("x-forwarded-host", "").split(",")[-1].strip()
        if host:
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"host"]
            scope["headers"].append((b"host", host.encode("latin-1")))
        # For the page, which builds addresses from them.
        scope["headers"].append((b"x-forwarded-proto", scope["scheme"].encode()))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address
