"""In a real Chromium: a page of another port or host name reaches nothing, and the key is where no script reads it."""

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest

from bench.drills.live_service import live_service
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Consent, Prediction, Scope
from serving.access.keys import create_key
from serving.client import Client
from serving.schemas import Context
from serving.session import COOKIE
from serving.settings import ServingSettings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, Response

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"),
]

API = "/gradio_api"
TIMEOUT_MS = 600_000

ATTACKS = """
const S = "SERVICE", ME = location.origin, read = [];
const event = JSON.stringify({data: [], fn_index: 0, session_hash: "abc"});
const attempt = async (name, make) => { try { if (await make()) read.push(name); } catch {} };
const readable = (path, options) => attempt(path + JSON.stringify(options ?? {}), async () => {
  const response = await fetch(S + path, options);
  return response.type !== "opaque" && response.type !== "error";
});
const loads = (kind, set) => attempt(kind, () => new Promise((done) => {
  const element = document.createElement(kind.split(" ")[0]);
  element.onload = () => done(!["iframe", "object", "embed"].includes(kind.split(" ")[0]));
  element.onerror = () => done(false);
  set(element);
  document.body.append(element);
  setTimeout(() => done(false), 1000);
}));
const posted = (action, type, fields) => {
  const form = document.createElement("form"), frame = document.createElement("iframe");
  frame.name = "frame" + Math.random();
  Object.assign(form, {method: "POST", action: S + action, enctype: type, target: frame.name});
  for (const [name, value] of Object.entries(fields)) {
    const field = document.createElement("textarea");
    Object.assign(field, {name, value});
    form.append(field);
  }
  document.body.append(frame, form);
  form.submit();
};
window.attack = async () => {
  const image = await (await fetch(`data:image/jpeg;base64,IMAGE`)).blob();
  const form = () => { const made = new FormData(); made.append("files", image, "a.jpg"); return made; };
  const gets = ["/", "/docs", "/openapi.json", "/v1/predictions", "/v1/events", "/v1/model",
    "/v1/predictions/PREDICTION", "/v1/explanations", "/metrics", "/readyz", "/page.js",
    "GRADIO/queue/data?session_hash=abc", `GRADIO/file=${ME}/relay.html`];
  for (const path of gets)
    for (const options of [{}, {credentials: "include"}, {mode: "no-cors", credentials: "include"}])
      await readable(path, options);
  for (const path of ["/v1/predictions", "/v1/explanations", "/v1/session", "GRADIO/queue/join", "GRADIO/upload"]) {
    for (const body of [image, event, form()])
      for (const mode of ["cors", "no-cors"])
        await readable(path, {method: "POST", mode, body, credentials: "include"});
    navigator.sendBeacon(S + path, event);
  }
  await readable("/v1/session", {method: "DELETE", credentials: "include"});
  await readable("/v1/predictions", {headers: {"X-Relook-Proof": "AAAA"}, credentials: "include"});
  const paths = [`GRADIO/file=${ME}/relay.html`, `GRADIO/file=//${location.host}/relay.html`, "FILE", "/page.js",
    "/v1/predictions", "/v1/predictions/PREDICTION/explanation.png", "/theme.css", "/docs", "/"];
  for (const path of paths) {
    await loads("img " + path, (e) => { e.src = S + path; });
    await loads("script " + path, (e) => { e.src = S + path; });
    await loads("link " + path, (e) => { e.rel = "stylesheet"; e.href = S + path; });
    await loads("iframe " + path, (e) => { e.src = S + path; });
    await loads("iframe sandboxed " + path, (e) => { e.sandbox = "allow-scripts"; e.src = S + path; });
    await loads("object " + path, (e) => { e.data = S + path; });
    await loads("embed " + path, (e) => { e.src = S + path; });
  }
  await loads("iframe srcdoc", (e) => { e.srcdoc = `<img src="${S}FILE"><script src="${S}/page.js"><\\/script>`; });
  for (const path of ["/v1/predictions", "GRADIO/queue/join", "GRADIO/upload", "/v1/session", "/"]) {
    posted(path, "text/plain", {'{"data":[],"fn_index":0,"session_hash":"abc","a':'":"b"}'});
    posted(path, "multipart/form-data", {image: "x"});
  }
  for (const path of ["/", "GRADIO/queue/data", "/v1/predictions"])
    await attempt("socket " + path, () => new Promise((done) => {
      const socket = new WebSocket(S.replace("http", "ws") + path);
      socket.onopen = () => done(true);
      socket.onerror = () => done(false);
    }));
  await attempt("events", () => new Promise((done) => {
    const source = new EventSource(S + "GRADIO/queue/data?session_hash=abc", {withCredentials: true});
    source.onopen = () => done(true);
    source.onerror = () => { source.close(); done(false); };
  }));
  await new Promise((done) => setTimeout(done, 1500));
  return read;
};
"""


class Stranger(ThreadingHTTPServer):
    """A server on another port: it shows the hostile page, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.html = ""
        self.asked: list[str] = []
        self.cookies: set[str] = set()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        stranger = self.server
        assert isinstance(stranger, Stranger)
        stranger.asked.append(self.path)
        stranger.cookies.add(self.headers.get("cookie", ""))
        owned = f"<script>fetch('http://{self.headers['host']}/owned', {{mode: 'no-cors'}})</script>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write((stranger.html if self.path == "/" else owned).encode())

    def log_message(self, *_: Any) -> None:
        pass


BEHIND_SERVE = "with keys, behind Ray Serve's proxy"
EXAMPLES = "relook-page-*/examples/*.jpg"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("without keys", marks=pytest.mark.long),
        "with keys",
        pytest.param(BEHIND_SERVE, marks=pytest.mark.soak),
    ],
)
def exposed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tools: Any, make_image: Any
) -> Iterator[Any]:
    """The service with one stored prediction; `key` is None while no key was made."""
    folder = tmp_path_factory.mktemp("exposed")
    store = open_store(RecordsSettings(home=folder / "home"))
    tools.serve_bundle(store, tools.make_bundle(store, 0, bias={"bcc": -2.0}))
    key = None
    if request.param != "without keys":
        scopes = [Scope.PREDICT, Scope.FLAG]
        _, key = create_key(store, name="a", organisation="clinic", scopes=scopes, actor="test")
    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.5, page_folder=folder)
    behind = ("serving.http=serve", "serving.page=true", "serving.model_poll_s=0.5", f"serving.page_folder={folder}")
    start: Any = partial(tools.run_service, store, settings, page=True)
    if request.param == BEHIND_SERVE:
        start = partial(live_service, folder / "home", *behind)
    with start() as service:
        with Client(service.url, key, retry_s=60.0) as client:
            prediction = client.predict(make_image(5), context=Context(consent=Consent.TRAINING)).id
        # The page is a deployment of its own, which may start after the service is ready.
        deadline = time.monotonic() + 300
        while not list(folder.glob(EXAMPLES)) and time.monotonic() < deadline:
            time.sleep(0.2)
        yield SimpleNamespace(url=service.url, store=store, key=key, folder=folder, prediction=prediction)
    store.close()


@pytest.fixture
def stranger(exposed: Any, make_image: Any) -> Iterator[Stranger]:
    example = next(exposed.folder.glob(EXAMPLES))
    script = (
        ATTACKS.replace("SERVICE", exposed.url)
        .replace("IMAGE", base64.b64encode(make_image(6)).decode())
        .replace("FILE", f"{API}/file={example}")
        .replace("PREDICTION", exposed.prediction)
        .replace("GRADIO", API)
    )
    links = "".join(
        f'<a id="l{number}" target="_blank" rel="opener" href="{exposed.url}{path}">x</a>'
        for number, path in enumerate(["/", "/v1/predictions", "/docs", "/?deep_link=x", f"{API}/file=HERE/relay.html"])
    )
    with Stranger() as server:
        here = f"http://127.0.0.1:{server.server_address[1]}"
        server.html = f"<body>{links.replace('HERE', here)}<script>{script}</script>"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def opened(context: "BrowserContext", url: str) -> "Page":
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(url)
    return page


def sign_in(page: "Page", key: str) -> None:
    page.fill("#rl-key input", key)
    page.click("#rl-sign-in-button")
    page.wait_for_selector("#rl-caller >> text=Organisation: clinic")


@pytest.mark.parametrize(
    ("exposed", "host"),
    [
        pytest.param("without keys", "127.0.0.1", marks=pytest.mark.long),
        ("with keys", "localhost"),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (
                ("without keys", "localhost"),
                ("with keys", "127.0.0.1"),
                (BEHIND_SERVE, "127.0.0.1"),
                (BEHIND_SERVE, "localhost"),
            )
        ),
    ],
    indirect=["exposed"],
)
def test_a_hostile_page_of_another_port_or_name_reaches_nothing(
    browser: "Browser", exposed: Any, stranger: Stranger, host: str
) -> None:
    context = browser.new_context()
    victim = opened(context, exposed.url)
    victim.wait_for_selector("#rl-head, #rl-model, [role=alert]")
    if exposed.key:
        sign_in(victim, exposed.key)
    victim.close()
    got: list[tuple[str, int]] = []

    def keep(response: "Response") -> None:
        is_own = response.url.startswith(exposed.url)
        # The page itself, opened by a link, loads what it needs; it can do no harm to itself.
        if is_own and (response.request.is_navigation_request() or not response.frame.url.startswith(exposed.url)):
            got.append((response.url.removeprefix(exposed.url), response.status))

    tried: list[str] = []
    context.on("response", keep)
    context.on("request", lambda request: tried.append(request.url))
    hostile = opened(context, f"http://{host}:{stranger.server_address[1]}/")
    assert hostile.evaluate("attack()") == []
    for number in range(5):
        with context.expect_page() as found:
            hostile.click(f"#l{number}")
        found.value.wait_for_load_state()
        # A handle on the opened page is of no use: it is in a group of its own.
        assert found.value.evaluate("window.opener") is None
        found.value.close()
    hostile.goto(hostile.url)
    hostile.evaluate(f"location.href = '{exposed.url}{API}/file=' + location.origin + '/relay.html'")
    hostile.wait_for_url(re.compile("relay"))
    served = {(path, status) for path, status in got if status != 403}
    assert served == {("/", 200)}, served
    # Blocked reads have no response here, so attempts are counted beside them.
    assert len(got) > 30
    assert len([url for url in tried if url.startswith(exposed.url)]) > 100
    # Neither the service nor a script on its origin asked the stranger for anything.
    assert set(stranger.asked) <= {"/", "/favicon.ico"}
    with exposed.store.ledger.read() as tx:
        assert [prediction.id for prediction in tx.find(Prediction)] == [exposed.prediction]
    assert list(exposed.folder.glob("relook-page-*/uploads/*")) == []
    _no_use_of_cookies(exposed, stranger)
    context.close()


def _no_use_of_cookies(exposed: Any, stranger: Stranger) -> None:
    """Browsers send cookies to every port of a host name: what the stranger got must be worth nothing."""
    for cookie in stranger.cookies:
        assert exposed.key is None or exposed.key not in cookie
        if exposed.key and COOKIE in cookie:
            headers = {"Cookie": cookie, "Sec-Fetch-Site": "same-origin", "Origin": exposed.url}
            assert httpx.get(f"{exposed.url}/v1/caller", headers=headers).status_code == 401
            files = {"files": ("a.jpg", b"x", "image/jpeg")}
            assert httpx.post(f"{exposed.url}{API}/upload", files=files, headers=headers).status_code == 401


def test_the_page_works_and_the_key_is_in_nothing_that_it_sends(
    browser: "Browser", exposed: Any, make_image: Any, tmp_path: Path
) -> None:
    context = browser.new_context()
    page = opened(context, exposed.url)
    sent: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: sent.append(f"{request.url} {request.post_data_buffer or b''!r}"))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    file = tmp_path / "lesion.jpg"
    file.write_bytes(make_image(7))
    if exposed.key:
        page.wait_for_selector("[role=alert] >> text=requires an API key")
        page.fill("#rl-key input", "rlk_wrong_key")
        page.click("#rl-sign-in-button")
        page.wait_for_selector("#rl-sign-in-problem >> text=unknown, expired or revoked")
        errors.clear()
        sign_in(page, exposed.key)
    page.wait_for_selector("#rl-model")
    with page.expect_response(lambda response: response.url.endswith(file.name)):
        page.set_input_files("#rl-image input[type=file]", str(file))
    page.click("#rl-predict")
    page.wait_for_selector("#rl-decision")
    page.locator(".gallery-item, .gallery button, table.table tr").first.click()
    page.wait_for_selector("#rl-image img[src*=generated_]")
    page.click("#rl-predict")
    page.wait_for_selector("#rl-map .heat")
    page.get_by_role("tab", name="History").click()
    page.wait_for_selector("#rl-history .rl-past")
    assert errors == []
    assert {urlsplit(line.split(" ")[0]).netloc for line in sent} == {urlsplit(exposed.url).netloc}
    if exposed.key:
        stored = page.evaluate(
            "JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}, gradio_config])"
        )
        assert json.loads(stored)[0] == ""
        assert exposed.key not in stored + page.content()
        assert not [line for line in sent if exposed.key in line]
        cookies: list[Any] = context.cookies()
        assert [(c["name"], c["httpOnly"], c["sameSite"]) for c in cookies] == [(COOKIE, True, "Strict")]
        # Another tab of the same browser is signed in, and signing out ends both.
        again = opened(context, exposed.url)
        again.wait_for_selector("#rl-caller >> text=Organisation: clinic")
        again.get_by_text("Sign in with an API key").click()
        again.click("#rl-sign-out")
        again.wait_for_selector("[role=alert] >> text=requires an API key")
        assert context.cookies() == []
    context.close()
