"""The interactive documentation: served from here, under a policy of its own, and usable in a browser."""

import base64
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image as PillowImage

from records.types import Scope
from serving.docs_page import SHA256, assets, example_image
from serving.settings import ServingSettings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WANTED = os.environ.get("RELOOK_SCREENSHOTS")


@pytest.fixture(scope="module")
def running(kept: Any, tools: Any) -> Iterator[Any]:
    with tools.run_service(kept, ServingSettings(port=tools.free_port())) as service:
        yield service


@pytest.fixture
def http(running: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, trust_env=False, timeout=600) as opened:
        yield opened


def test_the_page_names_only_files_of_this_service(http: httpx.Client) -> None:
    page = http.get("/docs")
    named = re.findall(r"""(?:src|href|url: |url=)=?["']([^"']*)["']""", page.text)
    assert sorted(named) == ["data:,", "docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "openapi.json"]
    for path in ("/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"):
        plain, packed = (http.get(path, headers={"Accept-Encoding": coding}) for coding in ("identity", "gzip"))
        assert "content-encoding" not in plain.headers
        assert packed.headers["content-encoding"] == "gzip"
        # httpx unpacks.
        assert hashlib.sha256(plain.content).hexdigest() == SHA256[path.rpartition("/")[2]]
        assert plain.content == packed.content
        assert plain.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert http.get("/redoc").status_code == http.get("/docs/swagger-ui.js").status_code == 404
    assert http.get("/docs/..%2f..%2fsettings.py").status_code == 404


def test_the_policy_allows_the_one_script_of_the_page_and_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/docs")
    policy = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    (script,) = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == {
        "default-src": "'none'", "script-src": f"'self' 'sha256-{digest}'", "style-src": "'self'",
        "img-src": "'self' data: blob:", "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'",
        "frame-ancestors": "'none'",
    }  # fmt: skip
    # Every other response keeps the strict one.
    assert http.get("/openapi.json").headers["content-security-policy"].startswith("default-src 'none'; frame")


def test_licences_lie_beside_the_packed_files() -> None:
    folder = Path(__file__).parents[2] / "serving" / "swagger_ui"
    assert "Apache License" in (folder / "LICENSE.txt").read_text()
    assert "SmartBear" in (folder / "NOTICE.txt").read_text()
    assert {name: hashlib.sha256(gzip.decompress(a.packed)).hexdigest() for name, a in assets().items()} == SHA256


def test_the_document_has_examples_that_work_and_says_which_operations_take_a_key(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    example = document["components"]["schemas"]["EncodedImage"]["examples"][0]
    assert PillowImage.open(io.BytesIO(base64.b64decode(example_image()))).size == (160, 120)
    assert http.post("/v1/predictions", json=example).status_code == 200
    tensors = document["components"]["schemas"]["InferenceRequest"]["examples"][0]
    assert http.post("/v2/models/relook/infer", json=tensors).status_code == 200
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    keyed = {path for path, verbs in document["paths"].items() for verb in verbs.values() if "security" in verb}
    assert {"/v1/predictions", "/v1/model", "/v2/models/{name}/infer", "/metrics"} <= keyed
    assert not {"/healthz", "/readyz", "/v2/health/live"} & keyed
    assert "servers" not in document


def test_below_a_path_of_a_proxy_requests_go_below_it(kept: Any, tools: Any) -> None:
    settings = ServingSettings(port=tools.free_port(), root_path="/relook")
    with tools.run_service(kept, settings) as behind, httpx.Client(base_url=behind.url, trust_env=False) as http:
        assert http.get("/relook/openapi.json").json()["servers"] == [{"url": "/relook"}]
        assert http.get("/relook/docs/swagger-ui.css").status_code == 200


@pytest.mark.slow
@pytest.mark.browser
def test_a_prediction_is_tried_out_in_the_page(
    browser: "Browser", running: Any, kept: Any, tools: Any, tmp_path: Path
) -> None:
    token = tools.make_key(kept, "docs", Scope.PREDICT)
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.set_default_timeout(600_000)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{running.url}/docs")
    page.wait_for_selector(".opblock")
    assert _tried(page, "post", "/v1/predictions") == 401
    page.click(".auth-wrapper .authorize")
    page.fill(".auth-container input", token)
    page.click(".auth-btn-wrapper .authorize")
    page.click(".auth-btn-wrapper .btn-done")
    assert _tried(page, "post", "/v1/predictions") == 200
    shown = page.locator(".opblock.is-open .live-responses-table .response-col_description .microlight").first
    assert json.loads(shown.inner_text())["label"] in kept.taxonomy.codes
    page.screenshot(path=(Path(WANTED) if WANTED else tmp_path) / "docs.png", full_page=False)
    assert not [url for url in asked if not url.startswith((running.url, "data:", "blob:"))]
    assert not [text for text in said if "Content Security Policy" in text]
    page.context.close()


def _tried(page: "Page", verb: str, path: str) -> int:
    """Execute an operation with what the page fills in, and return the status."""
    block = page.locator(f".opblock-{verb}").filter(has=page.locator(f'[data-path="{path}"]'))
    if "is-open" not in (block.get_attribute("class") or ""):
        block.locator(".opblock-summary-control").click()
    with page.expect_response(lambda response: urlsplit(response.url).path == path) as found:
        block.locator(".execute").click()
    block.locator(".live-responses-table .response-col_status").first.wait_for()
    return found.value.status
