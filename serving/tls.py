"""TLS of the service's own listener: certificate and key from two files, read again when they change.

A renewal replaces the files. New connections get the new certificate within `POLL_S`; open ones keep theirs. Files that
do not fit together, as in the middle of a renewal, change nothing until they do.
"""

import asyncio
import logging
import ssl
from pathlib import Path

from records.errors import ConfigError
from serving.settings import ServingSettings

POLL_S = 5.0
"""How often the files are looked at, seconds."""

logger = logging.getLogger(__name__)


class Certificate:
    """A certificate with its key, for a listener.

    Args:
        certificate: PEM file, the server's certificate first and then its chain.
        key: PEM file of its private key, not encrypted.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self._seen = self._stamp()
        self.context = self._current = _load(certificate, key)
        """what listens; each handshake gets the newest certificate"""
        # asyncio keeps the context that it began to listen with, and a half loaded one would refuse everybody. So the
        # newest is whole before a handshake is moved to it.
        self.context.sni_callback = self._choose

    def refresh(self) -> bool:
        """Read the files again if they changed, and return whether another certificate is used from now on."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self._current = _load(*self._files)
        except ConfigError as error:
            logger.warning("the certificate before stays in use: %s", error)
            return False
        logger.info("new connections get the certificate that %s holds now", self._files[0])
        return True

    async def watch(self) -> None:
        """Look at the files until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self.refresh)

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _listening: ssl.SSLContext) -> None:
        connection.context = self._current

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        # Followed through symbolic links: Kubernetes replaces the folder behind one.
        return tuple(_stamp_of(path) for path in self._files)


def certificate_of(settings: ServingSettings) -> Certificate | None:
    """Return the certificate of the service; None if it listens without TLS.

    Raises ConfigError if the files cannot be used.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return Certificate(settings.tls_certificate, settings.tls_key)


def trust_of(settings: ServingSettings) -> ssl.SSLContext | bool:
    """Return what a client on this machine checks the service's certificate by.

    It is called by the machine's address, which no certificate names, so this certificate with its chain is
    trusted, and nothing else is.
    """
    if settings.tls_certificate is None:
        return True
    try:
        context = ssl.create_default_context(cafile=str(settings.tls_certificate))
    except OSError as error:
        raise _unusable(settings.tls_certificate, error) from error
    context.check_hostname = False
    # The certificate itself is the anchor, whoever issued it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _load(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # With a password, even an empty one, an encrypted key is an error; without, OpenSSL would ask at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise _unusable(certificate, error) from error
    return context


def _unusable(certificate: Path, error: Exception) -> ConfigError:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return ConfigError(
        f"serving.tls_certificate {certificate} and serving.tls_key cannot be used ({reason}); give a PEM certificate "
        "with its chain, and the PEM private key that belongs to it, not encrypted"
    )


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ino, found.st_size)
