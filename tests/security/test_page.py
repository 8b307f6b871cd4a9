"""The page as an attacker reaches it: routes, files, events, uploads and sessions; see also test_page_browser."""

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from records.errors import AccessError, ConfigError, DataError
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Scope
from serving.access.keys import create_key
from serving.page.uploads import PageFiles
from serving.session import COOKIE, PROOF_HEADER
from serving.settings import ServingSettings

pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")

API = "/gradio_api"
META = {"_type": "gradio.FileData"}
PREDICT_INPUTS = 5  # image, consent, and the three columns of context of HAM10000
MARK = b"<script>top.location='http://HOST/owned'</script>"


@pytest.fixture(scope="module", params=["without keys", "with keys"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[Any]:
    """The service with its page; `key` is None while no key was made."""
    folder = tmp_path_factory.mktemp("exposed")
    store = open_store(RecordsSettings(home=folder / "home"))
    tools.serve_bundle(store, tools.make_bundle(store, 0, bias={"bcc": -2.0}))
    key = None
    if request.param == "with keys":
        scopes = [Scope.PREDICT, Scope.FLAG]
        _, key = create_key(store, name="a", organisation="clinic", scopes=scopes, actor="test")
    settings = ServingSettings(port=tools.free_port(), max_upload_mb=0.2, model_poll_s=0.5, page_folder=folder / "page")
    with tools.run_service(store, settings, page=True) as running:
        (root,) = (folder / "page").iterdir()
        yield SimpleNamespace(url=running.url, store=store, key=key, root=root, folder=folder)
    store.close()


@pytest.fixture
def browser_like(page: Any) -> Iterator[httpx.Client]:
    """A client with what the page's script sends: same origin, and a session if there are keys."""
    headers = {"Sec-Fetch-Site": "same-origin"}
    with httpx.Client(base_url=page.url, trust_env=False, headers=headers) as client:
        if page.key:
            signed_in = client.post("/v1/session", headers={"Authorization": f"Bearer {page.key}"})
            client.headers[PROOF_HEADER] = signed_in.json()["proof"]
        yield client


class Stranger(http.server.ThreadingHTTPServer):
    """A server of somebody else: it shows `html`, and remembers paths and cookies of what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.html = b""
        self.asked: list[tuple[str, str]] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        stranger = self.server
        assert isinstance(stranger, Stranger)
        stranger.asked.append((self.path, self.headers.get("cookie", "")))
        body = stranger.html if self.path == "/" else MARK.replace(b"HOST", self.headers["host"].encode())
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - the name that http.server calls

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    with Stranger() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def event(*first: Any, **changes: Any) -> dict[str, Any]:
    """Return an event of the button that predicts: its first inputs, and None for the other ones."""
    data = [*first, *[None] * (PREDICT_INPUTS - len(first))]
    return {"data": data, "event_data": None, "fn_index": 2, "trigger_id": 14, "session_hash": "abc"} | changes


def upload(client: httpx.Client, data: bytes, name: str = "a.jpg") -> httpx.Response:
    return client.post(f"{API}/upload", params={"upload_id": "x"}, files={"files": (name, data, "image/jpeg")})


def raw(url: str, method: str, target: str) -> tuple[int, bytes]:
    """Send a target exactly as it is; httpx would tidy it."""
    import http.client

    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)
    connection.request(method, target)
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


# ---------------------------------------------------------------- routes and files


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"{API}/deep_link?session_hash=abc"), ("GET", f"{API}/proxy=http://127.0.0.1/"), ("GET", f"{API}/info"),
        ("GET", f"{API}/file//etc/passwd"), ("POST", f"{API}/run/predict"), ("POST", f"{API}/api/predict"),
        ("POST", f"{API}/call/predict"), ("GET", f"{API}/call/predict/abc"), ("POST", f"{API}/call/v2/predict"),
        ("POST", f"{API}/component_server"), ("GET", f"{API}/stream/a/b/c/playlist.m3u8"), ("POST", f"{API}/stream/a"),
        ("GET", f"{API}/queue/status"), ("POST", f"{API}/process_recording"), ("POST", f"{API}/vibe-edit"),
        ("GET", f"{API}/runs"), ("GET", f"{API}/openapi.json"), ("GET", f"{API}/app_id"), ("GET", f"{API}/token"),
        ("GET", f"{API}/user"), ("GET", f"{API}/login_check"), ("GET", f"{API}/startup-events"), ("GET", "/config"),
        ("GET", f"{API}/custom_component/a/client/component/x"), ("POST", f"{API}/cancel"), ("POST", "/login"),
        ("GET", "/logout"), ("GET", "/monitoring"), ("GET", "/monitoring/summary"), ("GET", "/manifest.json"),
        ("GET", "/static/js/iframeResizer.contentWindow.min.js"), ("GET", "/svelte/x.js"), ("GET", "/robots.txt"),
        ("GET", "/pwa_icon"), ("GET", "/assets/x.js"), ("GET", "//"), ("GET", "/assets/../config"),
        ("GET", "/assets/%2e%2e/config"),
        ("PUT", "/"), ("DELETE", f"{API}/upload"), ("GET", f"{API}/queue/join"), ("POST", f"{API}/queue/join/"),
        ("POST", f"{API}/heartbeat/abc"), ("GET", f"{API}/heartbeat/a/b"), ("TRACE", "/"),
    ],
)  # fmt: skip
def test_every_other_route_of_gradio_is_a_problem_document(page: Any, method: str, path: str) -> None:
    status, body = raw(page.url, method, path)
    assert (status, json.loads(body)["code"]) == (404, "not_found")


def test_no_address_and_no_path_outside_the_folder_is_a_file(page: Any, stranger: Stranger, make_image: Any) -> None:
    host = "{}:{}".format(*stranger.server_address)
    (page.folder / "secret.jpg").write_bytes(make_image(1))
    (page.root / "link.jpg").symlink_to(page.folder / "secret.jpg")
    example = next((page.root / "examples").iterdir())
    ledger = next(page.folder.glob("home/*.db"), page.folder / "home")
    names = [
        f"http://{host}/x.png", f"http:%2f%2f{host}/x.png", f"http%3A%2F%2F{host}/x.png", f"HTTP://{host}/x.png",
        f"//{host}/x.png", f"%2f%2f{host}/x.png", f"\\\\{host}\\x.png", f"%5c%5c{host}%5cx.png", f"ftp://{host}/x.png",
        f"file://{example}", f"file:{example}", "data:image/png;base64,iVBORw0KGgo=", "blob:x", "",
        str(ledger), "/etc/passwd", "/dev/zero", "/proc/self/environ", str(page.root), f"{page.root}/link.jpg",
        f"{page.root}/../../secret.jpg", f"{page.root}/%2e%2e/%2e%2e/secret.jpg", f"{page.root}%2f..%2f..%2fsecret.jpg",
        f"{page.root}/%252e%252e/secret.jpg", f"/{example}", f"{example}/", f"{example}%00", f"{example}%0a",
        f"{example.parent}/./{example.name}", str(example).lstrip("/"), f"{page.root}-other/secret.jpg",
        f"[{host}]", f"http://[::ffff:127.0.0.1]:{stranger.server_address[1]}/x.png", "http://100.64.0.1/x.png",
        "http://169.254.169.254/latest/meta-data/", f"{example}?url=http://{host}/x.png#x".replace("?", "%3f"),
    ]  # fmt: skip
    (page.root.parent / f"{page.root.name}-other").mkdir(exist_ok=True)
    (page.root.parent / f"{page.root.name}-other" / "secret.jpg").write_bytes(make_image(1))
    for name in names:
        status, body = raw(page.url, "GET", f"{API}/file={name}")
        assert (status, json.loads(body)["code"]) == (404, "not_found"), name
    assert stranger.asked == []
    assert raw(page.url, "GET", f"{API}/file={example}")[0] == 200


def test_a_file_is_an_image_or_nothing(browser_like: httpx.Client, make_image: Any) -> None:
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    for data in (b"<html><script>alert(1)</script>", svg, b"GIF89a<script>", b"%PDF-1.4", b"", b"\x89PN"):
        (path,) = upload(browser_like, data, "x.html").json()
        assert browser_like.get(f"{API}/file={path}").status_code == 404
    for name in ("x.html", "../../etc/x.svg", "a\r\nX: y.js", "\u202egpj.exe", "." * 300, "x" * 300):
        (path,) = upload(browser_like, make_image(2) + svg, name).json()
        response = browser_like.get(f"{API}/file={path}")
        assert (response.status_code, response.headers["content-type"]) == (200, "image/jpeg")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-security-policy"].startswith("sandbox; default-src 'none'")


# ---------------------------------------------------------------- events


def hostile_events(root: Path, url: str, host: str) -> list[Any]:
    example = str(next((root / "examples").iterdir()))
    evil = f"http://{host}/x.png"
    file = {"path": example, "meta": META}
    return [
        event(file | {"url": evil}, "none"), event({"path": evil, "meta": META}, "none"),
        event(file | {"path": "/etc/passwd"}, "none"), event(file | {"path": str(root.parent / "secret.jpg")}, "none"),
        event(file | {"url": f"//{host}/x.png"}, "none"), event(file | {"url": "data:image/png;base64,aaaa"}, "none"),
        event(file | {"url": f"{url}{API}/file={evil}"}, "none"), event(file | {"url": f"{url}{API}/file=/etc/passwd"}),
        event(file | {"is_stream": True}, "none"), event(file | {"extra": evil}, "none"),
        event({"path": example}, "none"), event({"url": evil}, "none"), event({"url": evil, "meta": META}, "none"),
        event({"a": {"b": {"path": evil}}}, "none"), event([[{"path": evil, "meta": META}]], "none"),
        event([{"path": evil, "meta": META}], "none"), event({"meta": {**META, "url": evil}, "path": example}),
        event({"image": file}, "none"), event({"path": {"path": evil}, "meta": META}), event(evil, "none"),
        event(f"\\\\{host}\\x.png"), event("file:///etc/passwd"), event(["HTTP://x/y"]), event(f" {evil}\n"),
        event("a", event_data={"path": evil}), event("a", event_data={"value": [{"path": evil, "meta": META}]}),
        event("a", event_data={"value": {"deep": evil}}), event("a", event_data={"index": evil}),
        event("a", event_data=evil),
        event("a", request={"headers": {}}), event("a", batched=True), event("a", event_id="1"),
        event("a", root_path=evil),
        event("a", simple_format=True), event("a", session_hash="../x"), event("a", session_hash=None),
        event("a", fn_index="predict"), event("a", data={"path": evil}), [event("a")], evil,
        event(file | {"path": f"{root}/examples/../../secret.jpg"}), event(file | {"path": example + "\0"}),
    ]  # fmt: skip


def test_no_event_names_another_host_or_file(page: Any, browser_like: httpx.Client, stranger: Stranger) -> None:
    host = "{}:{}".format(*stranger.server_address)
    for body in hostile_events(page.root, page.url, host):
        response = browser_like.post(f"{API}/queue/join", json=body)
        assert (response.status_code, response.json()["code"]) == (422, "invalid"), body
    nested = '{"data": ' + "[" * 10_000 + "]" * 10_000 + ', "fn_index": 2, "session_hash": "a"}'
    twice = f'{{"data": [], "data": ["http://{host}/x.png"], "fn_index": 2, "session_hash": "a"}}'
    kind = {"Content-Type": "application/json"}
    for fewer_or_unknown in (
        event("a", data=["a"] * (PREDICT_INPUTS - 1)),
        event(*["a"] * (PREDICT_INPUTS + 1)),
        event("a", "b", fn_index=99),
        event("a", "b", fn_index=-1),
    ):
        assert browser_like.post(f"{API}/queue/join", json=fewer_or_unknown).status_code == 422
    for text in (nested, twice, "null", "{", "\ufeff{}", '{"data": [NaN]}'):
        assert browser_like.post(f"{API}/queue/join", content=text, headers=kind).status_code == 422, text[:40]
    large = event("x" * 70_000)
    assert browser_like.post(f"{API}/queue/join", json=large).status_code == 413
    plain = browser_like.post(
        f"{API}/queue/join", content=json.dumps(event("a")), headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 415
    assert stranger.asked == []


def test_an_event_of_the_page_is_accepted(page: Any, browser_like: httpx.Client, make_image: Any) -> None:
    (path,) = upload(browser_like, make_image(3)).json()
    file = {"path": path, "url": f"{page.url}{API}/file={path}", "orig_name": "a.jpg", "size": 9, "meta": META}
    response = browser_like.post(f"{API}/queue/join", json=event(file, "none"))
    assert (response.status_code, list(response.json())) == (200, ["event_id"])
    comment = event("as in https://example.org/atlas, page 3", "none")
    assert browser_like.post(f"{API}/queue/join", json=comment).status_code == 200


# ---------------------------------------------------------------- headers


PATHS = [
    "/", "/page.js", "/theme.css", "/docs", "/openapi.json", "/healthz", "/readyz", "/v1/model", "/v1/predictions",
    "/v1/session", "/metrics", f"{API}/file=/x", f"{API}/upload", f"{API}/queue/join", "/nothing",
]  # fmt: skip


@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "SAME-ORIGIN", "same-origin, none"])
def test_no_route_serves_a_page_of_another_site_or_port(page: Any, site: str) -> None:
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    with httpx.Client(base_url=page.url, trust_env=False, headers=headers) as client:
        for path in PATHS:
            for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS"):
                assert client.request(method, path).status_code == 403, (method, path)
        # Following a link only shows the page; with a query it might do more.
        assert client.get("/", headers={"Sec-Fetch-Dest": "document"}).status_code == 200
        assert client.get("/?deep_link=x", headers={"Sec-Fetch-Dest": "document"}).status_code == 403
        assert client.get("/docs", headers={"Sec-Fetch-Dest": "document"}).status_code == 403


def test_every_response_has_a_policy(page: Any) -> None:
    with httpx.Client(base_url=page.url, trust_env=False) as client:
        for path in PATHS:
            for method in ("GET", "POST", "OPTIONS"):
                headers = client.request(method, path).headers
                policy = headers["content-security-policy"]
                assert "default-src 'none'" in policy, (method, path)
                assert "frame-ancestors 'none'" in policy
                assert headers["x-content-type-options"] == "nosniff"
                assert "access-control-allow-origin" not in headers
        index = client.get("/")
        forwarded = client.get("/", headers={"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"})
    directives = dict(part.strip().split(" ", 1) for part in index.headers["content-security-policy"].split(";"))
    assert "'unsafe-inline'" not in directives["script-src"]
    assert not any(word in index.headers["content-security-policy"] for word in ("http:", "https:", "*"))
    assert "evil.example" not in forwarded.text


# ---------------------------------------------------------------- sessions and uploads


def test_a_session_is_a_cookie_and_a_proof_and_neither_is_the_key(page: Any) -> None:
    if page.key is None:
        assert httpx.post(f"{page.url}/v1/session").status_code == 401
        return
    bearer = {"Authorization": f"Bearer {page.key}"}
    signed_in = httpx.post(f"{page.url}/v1/session", headers=bearer)
    cookie = signed_in.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    assert page.key not in cookie + signed_in.text
    assert signed_in.headers["cache-control"] == "no-store"
    assert httpx.post(f"{page.url}/v1/session", headers=bearer).headers["set-cookie"] != cookie
    value = {"Cookie": f"{COOKIE}={signed_in.cookies[COOKIE]}"}
    proof = {PROOF_HEADER: signed_in.json()["proof"]}
    files = {"files": ("a.jpg", b"x", "image/jpeg")}
    others = [
        {}, value, proof, value | {PROOF_HEADER: "AAAA"}, value | {PROOF_HEADER: "%"}, value | {PROOF_HEADER: ""},
        {"Cookie": f"{COOKIE}=é".encode(), **proof}, {"Cookie": f"{COOKIE}={page.key}", PROOF_HEADER: ""},
        value | proof | {"Sec-Fetch-Site": "none"}, bearer,
    ]  # fmt: skip
    for headers in others:
        refused = httpx.post(f"{page.url}{API}/upload", files=files, headers=headers)
        assert refused.status_code == 401, headers
    assert httpx.post(f"{page.url}{API}/upload", files=files, headers=value | proof).status_code == 200
    # The session is of the page alone: the API takes keys.
    assert httpx.get(f"{page.url}/v1/caller", headers=value | proof).status_code == 401
    assert httpx.post(f"{page.url}/v1/session", headers=value | proof).status_code == 401
    assert httpx.post(f"{page.url}/v1/session", headers={"Authorization": "Bearer rlk_x_y"}).status_code == 401
    gone = httpx.delete(f"{page.url}/v1/session", headers=value)
    assert (gone.status_code, "Max-Age=0" in gone.headers["set-cookie"]) == (204, True)


def test_an_upload_without_the_key_or_too_large_leaves_nothing(page: Any, browser_like: httpx.Client) -> None:
    before = sorted((page.root / "uploads").iterdir())
    assert upload(browser_like, b"x" * 250_000).status_code == 413
    many = [("files", ("a.jpg", b"x", "image/jpeg"))] * 2
    for refused in (
        browser_like.post(f"{API}/upload", files=many),
        browser_like.post(f"{API}/upload", data={"files": "x"}),
        browser_like.post(f"{API}/upload", content=b"x", headers={"Content-Type": "multipart/form-data; boundary=a"}),
        browser_like.post(f"{API}/upload", files={"other": ("a.jpg", b"x", "image/jpeg")}),
    ):
        assert 400 <= refused.status_code < 500
        assert refused.headers["content-type"] == "application/problem+json"
    if page.key:
        assert httpx.post(f"{page.url}{API}/upload", files=dict(many)).status_code == 401
    assert sorted((page.root / "uploads").iterdir()) == before


def page_files(folder: Path, **changes: Any) -> PageFiles:
    folder.mkdir(exist_ok=True)
    settings = {"page_folder": folder, "page_uploads_mb": 0.1, "page_uploads_per_caller_mb": 0.03, **changes}
    return PageFiles(ServingSettings(**settings), folder / "home")


def test_uploads_have_quotas_and_an_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = page_files(tmp_path)
    kept = files.store("a", "x.jpg", b"x" * 20_000)
    with pytest.raises(AccessError, match=r"0\.03 MB of uploads per caller and 0\.1 MB in all") as refused:
        files.store("a", "x.jpg", b"x" * 20_000)
    assert refused.value.code == "rate_limited"
    for caller in "bcd":
        files.store(caller, "x.jpg", b"x" * 26_000)
    with pytest.raises(AccessError):
        files.store("e", "x.jpg", b"x" * 26_000)
    assert len(list(files.uploads.iterdir())) == 4
    later_s = time.monotonic() + 601
    # In this module alone: the event loops of running services read the same clock.
    monkeypatch.setattr("serving.page.uploads.time", SimpleNamespace(monotonic=lambda: later_s))
    files.store("a", "x.jpg", b"x" * 20_000)
    assert not kept.exists()
    assert len(list(files.uploads.iterdir())) == 1
    page_files(tmp_path)
    assert list(files.uploads.iterdir()) == []


def test_the_folder_is_private_and_of_this_user(tmp_path: Path) -> None:
    files = page_files(tmp_path)
    assert files.root.stat().st_mode & 0o777 == 0o700
    with pytest.raises(DataError):
        files.find(str(files.root.parent / f"{files.root.name}x"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    files.uploads.rmdir()
    files.examples.rmdir()
    files.root.rmdir()
    files.root.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="belongs to another user"):
        page_files(tmp_path)
    assert list(elsewhere.iterdir()) == []
    if os.getuid() == 0:
        files.root.unlink()
        files.root.mkdir()
        os.chown(files.root, 12345, 12345)
        with pytest.raises(ConfigError, match="belongs to another user"):
            page_files(tmp_path)


def test_two_homes_do_not_share_a_folder(tmp_path: Path) -> None:
    settings = ServingSettings(page_folder=tmp_path)
    first, second = PageFiles(settings, tmp_path / "a"), PageFiles(settings, tmp_path / "b")
    path = first.store("a", "x.jpg", b"x")
    with pytest.raises(DataError):
        second.find(str(path))
    assert "/home" not in str(PageFiles(ServingSettings(), tmp_path / "home").root)
