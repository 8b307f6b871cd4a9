"""Behind a reverse proxy: the shipped nginx configuration, and what is believed of forwarded headers."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from records.errors import ConfigError
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Scope
from serving.access.keys import create_key
from serving.access.proxies import Proxies
from serving.preconditions import require_startable
from serving.settings import ServingSettings

CONFIGURATION = Path(__file__).parents[2] / "cluster" / "deploy" / "nginx.conf"
NAME = "relook.example.org"


@dataclass(frozen=True)
class Proxied:
    """A service behind nginx."""

    url: str
    direct: Any
    key: str
    certificate: Path
    port: int

    def client(self, **more: Any) -> httpx.Client:
        """A client as outside of the proxy: TLS, the public name, an address that is not loopback."""
        import ssl

        context = ssl.create_default_context(cafile=str(self.certificate))
        transport = httpx.HTTPTransport(verify=context, retries=0)
        headers = {"Host": f"{NAME}:{self.port}", "Authorization": f"Bearer {self.key}"} | more
        client = httpx.Client(base_url=self.url, headers=headers, transport=transport, trust_env=False, timeout=600)
        client.event_hooks["request"].append(lambda request: request.extensions.update(sni_hostname=NAME))
        return client


@pytest.fixture(scope="module")
def key(kept: Store) -> str:
    return create_key(kept, name="outside", organisation="out", scopes=[Scope.PREDICT, Scope.AUDIT], actor="test")[1]


@pytest.fixture(scope="module")
def proxied(kept: Store, key: str, tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    nginx = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if nginx is None:
        reason = "no nginx on this machine; on Debian: apt-get install nginx-light"
        if os.environ.get("RELOOK_REQUIRE_NGINX") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    folder, outside, inside = tmp_path_factory.mktemp("nginx"), tools.free_port(), tools.free_port()
    certificate = folder / "relook.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}", "-addext",
         f"subjectAltName=DNS:{NAME}", "-keyout", str(folder / "relook.key"), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    shipped = CONFIGURATION.read_text()
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{outside} ssl"),
        ("127.0.0.1:8000", f"127.0.0.1:{inside}"),
        ("/etc/nginx/", f"{folder}/"),
        ("$remote_addr;", "203.0.113.9;"),  # as if the caller came from another machine
    ):
        assert old in shipped
        shipped = shipped.replace(old, new)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary}\n{shipped}\n}}\n"
    )
    settings = ServingSettings(
        port=inside, model_poll_s=0.1, root_path="/relook", trusted_hosts=(NAME,), forwarded_allow_ips=("127.0.0.1",)
    )
    with tools.run_service(kept, settings, page=True) as running:
        process = subprocess.Popen([nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)])
        try:
            found = Proxied(f"https://127.0.0.1:{outside}", running, key, certificate, outside)
            with found.client() as client:
                _until(lambda: _answers(client))
            yield found
        finally:
            process.terminate()
            process.wait(600)


def test_the_api_answers_below_the_path_of_the_proxy(proxied: Proxied, make_image: Callable[..., bytes]) -> None:
    with proxied.client() as client:
        predicted = client.post("/relook/v1/predictions", content=make_image(0), headers={"Content-Type": "image/jpg"})
        assert predicted.status_code == 200, predicted.text
        assert client.get(f"/relook/v1/predictions/{predicted.json()['id']}").status_code == 200
        assert client.get("/relook/readyz").status_code == 200
        assert client.get("/relook/openapi.json").json()["servers"] == [{"url": "/relook"}]
        moved = client.get("/relook")
        assert (moved.status_code, moved.headers["location"].endswith("/relook/")) == (308, True)
        missing = client.get("/relook/v1/nowhere")
        assert missing.headers["content-type"] == "application/problem+json"
        assert client.get("/relook/v1/models", headers={"Authorization": "Bearer no"}).status_code == 401


def test_the_page_and_its_events_come_through(proxied: Proxied) -> None:
    with proxied.client() as client:
        page = client.get("/relook/")
        assert page.status_code == 200
        # Whatever the page names has to be below the path, and over TLS.
        assert f"http://{NAME}" not in page.text
        assert f"http://127.0.0.1:{proxied.direct.settings.port}" not in page.text
        for path in ("/relook/theme.css", "/relook/page.js"):
            assert client.get(path).status_code == 200, path
        missing = client.get("/relook/assets/nothing.js")
        assert (missing.status_code, missing.headers["content-type"]) == (404, "application/problem+json")
        with client.stream("GET", "/relook/gradio_api/heartbeat/abc123", timeout=600) as stream:
            assert stream.status_code == 200
            assert next(stream.iter_lines()).startswith("data:")


def test_a_stranger_needs_a_key_though_he_comes_from_loopback(tools: Any, tmp_path: Path) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    tools.serve_bundle(store, tools.make_bundle(store))
    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.1)
    with (
        tools.run_service(store, settings, page=True) as running,
        httpx.Client(base_url=running.url, trust_env=False, timeout=600) as client,
    ):
        assert client.get("/v1/predictions").status_code == 200, "the user of this machine needs none"
        for header in ("X-Forwarded-For", "X-Real-IP", "Forwarded", "Via", "CF-Connecting-IP", "X-Forwarded-Proto"):
            for path in ("/v1/predictions", "/metrics", "/"):
                refused = client.get(path, headers={header: "127.0.0.1"})
                assert (refused.status_code, refused.json()["code"]) == (401, "unauthenticated"), (header, path)
        assert client.get("/healthz", headers={"X-Forwarded-For": "203.0.113.9"}).status_code == 200
    for proxy in ({"root_path": "/relook"}, {"trusted_hosts": (NAME,)}, {"forwarded_allow_ips": ("10.0.0.0/8",)}):
        with pytest.raises(ConfigError, match="no API keys"):
            require_startable(ServingSettings(port=tools.free_port(), **proxy), store.settings)
    store.close()


def test_forwarded_headers_are_believed_from_proxies_only() -> None:
    proxies = Proxies(("127.0.0.1", "10.0.0.0/8"), "/relook")

    def resolved(peer: str, *headers: tuple[str, str], path: str = "/relook/v1/model") -> Any:
        raw = [(name.encode(), value.encode()) for name, value in (("host", "inside"), *headers)]
        scope = {"type": "http", "client": (peer, 1), "scheme": "http", "path": path, "raw_path": path.encode()}
        return proxies.resolve({**scope, "headers": raw})

    forwarded = (
        ("x-forwarded-for", "6.6.6.6, 203.0.113.9, 10.1.2.3"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", NAME),
    )
    believed = resolved("127.0.0.1", *forwarded)
    # The last hop that is no proxy of ours; whatever is before it, the caller has written.
    assert believed["client"][0] == "203.0.113.9"
    assert (believed["scheme"], dict(believed["headers"])[b"host"]) == ("https", NAME.encode())
    assert (believed["path"], believed["raw_path"]) == ("/v1/model", b"/v1/model")
    lied = resolved("203.0.113.7", *forwarded)
    assert (lied["client"][0], lied["scheme"], dict(lied["headers"])) == ("203.0.113.7", "http", {b"host": b"inside"})
    assert lied["state"]["proxied"] is True
    assert resolved("203.0.113.7")["state"]["proxied"] is False
    assert resolved("::ffff:127.0.0.1", *forwarded)["client"][0] == "203.0.113.9"
    assert resolved("10.0.0.1", ("x-forwarded-for", "<script>"))["client"][0] == "10.0.0.1"
    # A proxy that strips the path itself, a path that only begins alike, and the path alone.
    assert resolved("10.0.0.1", path="/v1/model")["path"] == "/v1/model"
    assert resolved("10.0.0.1", path="/relooked")["path"] == "/relooked"
    assert resolved("10.0.0.1", path="/relook")["path"] == "/"


@pytest.mark.parametrize(
    "wrong",
    [
        {"root_path": "relook"}, {"root_path": "/relook/"}, {"root_path": "/a/../b"}, {"root_path": "//evil"},
        {"trusted_hosts": ("relook.example.org:443",)}, {"trusted_hosts": ("*",)},
        {"forwarded_allow_ips": ("proxy.example.org",)}, {"forwarded_allow_ips": ("*",)},
    ],
)  # fmt: skip
def test_settings_of_proxies_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"is not|is neither"):
        ServingSettings(**wrong)


def test_only_named_hosts_are_served(proxied: Proxied, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=proxied.direct.url, headers=headers, trust_env=False) as client:
        assert client.get("/v1/model", headers={"Host": "evil.example"}).json()["code"] == "foreign_host"
        assert client.get("/v1/model", headers={"X-Forwarded-Host": "evil.example"}).json()["code"] == "foreign_host"
        assert client.get("/v1/model", headers={"Host": NAME}).status_code == 200
        assert client.get("/v1/model", headers={"Host": NAME, "Origin": "https://evil.example"}).status_code == 403
        assert client.get("/v1/model", headers={"Host": NAME, "Origin": f"https://{NAME}"}).status_code == 200


@pytest.mark.parametrize("media_type", ["image/jpg", "image/pjpeg", "IMAGE/JPEG", "image/jpeg; charset=binary"])
def test_old_names_of_jpeg_are_jpeg(
    proxied: Proxied, key: str, make_image: Callable[..., bytes], media_type: str
) -> None:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": media_type}
    url = f"{proxied.direct.url}/v1/predictions"
    assert httpx.post(url, content=make_image(1), headers=headers, trust_env=False, timeout=600).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nowhere", 404), ("PUT", "/v1/predictions", 405), ("GET", "/static/x.js", 404),
        ("GET", "/gradio_api/info", 404), ("POST", "/", 404), ("OPTIONS", "/theme.css", 404),
        ("PROPFIND", "/v1/model", 405), ("GET", "/docs/oauth2-redirect", 404), ("PATCH", "/healthz", 405),
    ],
)  # fmt: skip
def test_every_404_and_405_is_a_problem_document(
    proxied: Proxied, key: str, method: str, path: str, status: int
) -> None:
    response = httpx.request(
        method, f"{proxied.direct.url}{path}", headers={"Authorization": f"Bearer {key}"}, trust_env=False
    )
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert response.json()["status"] == status


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/relook/healthz").status_code == 200
    except httpx.TransportError:
        return False


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
