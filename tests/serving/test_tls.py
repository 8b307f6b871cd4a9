"""TLS of the service's own listener, with certificates made here."""

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from cluster.doctor import _serving_port
from cluster.settings import Settings
from records.errors import ConfigError
from records.store import Store
from serving import tls
from serving.client import Client
from serving.page.api import PageApi
from serving.preconditions import require_servable
from serving.settings import ServingSettings
from serving.tls import Certificate, trust_of

NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "relook.example.org")])


def write_pair(folder: Path, serial: int, password: bytes | None = None) -> tuple[Path, Path]:
    """Write a certificate that signs itself, and its key, over those that are there."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(NAME)
        .issuer_name(NAME)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("relook.example.org")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    paths = folder / "tls.crt", folder / "tls.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(pem, form, locked))
    return paths


def serial_of(port: int) -> int:
    """Return the serial number of the certificate that a new connection gets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with closing(socket.create_connection(("127.0.0.1", port), timeout=600)) as raw, context.wrap_socket(raw) as found:
        return x509.load_der_x509_certificate(found.getpeercert(binary_form=True) or b"").serial_number


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def secure(kept: Store, tools: Any, folder: Path) -> Iterator[Any]:
    before, tls.POLL_S = tls.POLL_S, 0.05
    certificate, key = write_pair(folder, 1)
    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.1, tls_certificate=certificate, tls_key=key)
    with tools.run_service(kept, settings) as running:
        yield running
    tls.POLL_S = before


def test_predictions_are_served_over_tls_only(secure: Any, make_image: Callable[..., bytes], tmp_path: Path) -> None:
    assert secure.url.startswith("https://127.0.0.1:")
    with Client(secure.url, retry_s=0.0, verify=trust_of(secure.settings)) as client:
        assert client.predict(make_image(0)).id
        assert client.ready().ready
    with pytest.raises(httpx.TransportError):
        httpx.get(secure.url.replace("https", "http") + "/healthz", trust_env=False)
    # Neither the public authorities nor another certificate of the same name vouch for it.
    other = secure.settings.model_copy(update={"tls_certificate": write_pair(tmp_path, 9)[0]})
    for verify in (True, trust_of(other)):
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{secure.url}/healthz", trust_env=False, verify=verify)


def test_page_and_doctor_find_the_service(secure: Any) -> None:
    visitor: Any = SimpleNamespace(state=SimpleNamespace(key=None))
    api = PageApi(secure.url, secure.store.taxonomy, lambda: trust_of(secure.settings))
    with api.client(visitor) as client:
        assert client.ready().ready
    found = _serving_port(Settings(serving=secure.settings))
    assert (found.state, "is a Relook service" in found.detail) == ("ok", True)


def test_a_renewed_certificate_is_used_and_open_connections_stay(secure: Any, folder: Path) -> None:
    trusted = trust_of(secure.settings)
    with httpx.Client(base_url=secure.url, verify=trusted, trust_env=False, timeout=600) as client:
        assert client.get("/healthz").status_code == 200
        write_pair(folder, 2)
        deadline = time.monotonic() + 600
        while serial_of(secure.settings.port) != 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.get("/healthz").status_code == 200, "a connection that is open keeps its certificate"
    with Client(secure.url, retry_s=0.0, verify=trust_of(secure.settings)) as client:
        assert client.ready().ready


def test_a_renewal_by_half_changes_nothing(tmp_path: Path) -> None:
    certificate, key = write_pair(tmp_path, 1)
    held = Certificate(certificate, key)
    before, good = held._current, certificate.read_bytes()
    for written in (write_pair(tmp_path, 2)[0].read_bytes()[:200], good, b""):
        certificate.write_bytes(written)
        assert not held.refresh()
        assert held._current is before
    key.unlink()
    assert not held.refresh()
    write_pair(tmp_path, 3)
    assert held.refresh()
    assert held._current is not before
    assert not held.refresh(), "nothing changed since"


def test_files_that_cannot_be_used_are_refused_before_the_start(tmp_path: Path, kept: Store) -> None:
    certificate, key = write_pair(tmp_path, 1)
    other = tmp_path / "other"
    other.mkdir()
    other_key = write_pair(other, 2)[1]
    locked = tmp_path / "locked"
    locked.mkdir()
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    for files in (
        (tmp_path / "missing", key), (certificate, tmp_path / "missing"), (certificate, other_key), (text, key),
        (certificate, certificate), (tmp_path, key), write_pair(locked, 3, b"secret"),
    ):  # fmt: skip
        settings = ServingSettings(tls_certificate=files[0], tls_key=files[1])
        with pytest.raises(ConfigError, match="give a PEM certificate"):
            require_servable(settings, kept.settings)


def test_settings_of_tls_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="belong together"):
        ServingSettings(tls_certificate=tmp_path / "tls.crt")
    with pytest.raises(ValidationError, match="belong together"):
        ServingSettings(tls_key=tmp_path / "tls.key")
    with pytest.raises(ValidationError, match="http=own"):
        ServingSettings(tls_certificate=tmp_path / "tls.crt", tls_key=tmp_path / "tls.key", http="serve")
    assert ServingSettings(tls_certificate=Path("a"), tls_key=Path("b")).tls_key == Path.cwd() / "b"
