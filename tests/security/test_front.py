"""What anybody can send before a key is looked at, and what monitoring is told."""

import contextlib
import gzip
import http.client
import json
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx
import pytest

from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Scope
from serving.access.keys import admin_token, create_key
from serving.settings import ServingSettings
from tests.security.front import JPEG, connect, head, response_of

# ---------------------------------------------------------------- the key, by headers alone


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        pytest.param("/v1/predictions", "image/jpeg", id="image"),
        pytest.param("/v1/predictions/batch", "multipart/form-data; boundary=b", id="batch"),
        pytest.param(f"/v1/predictions/{'0' * 32}/flags", "application/json", id="json"),
        pytest.param(f"/v1/predictions/{'0' * 32}/outcomes", "application/json", id="outcome"),
        pytest.param("/v1/rollout", "application/json", id="rollout"),
        pytest.param("/v1/explanations", "image/png", id="explanation"),
    ],
)
@pytest.mark.parametrize(("key", "status"), [(None, 401), ("rlk_0_wrong", 401), ("reader", 403)])
def test_a_request_without_permission_is_refused_before_its_body(
    front: Any, keys: dict[str, str], path: str, content_type: str, key: str | None, status: int
) -> None:
    token = keys.get(key, key) if key else None
    with closing(connect(front)) as raw:
        # Nothing of the body is ever sent, and no 100 Continue comes to ask for it.
        lines = (f"Content-Type: {content_type}\r\n".encode(), b"Content-Length: 900\r\nExpect: 100-continue\r\n")
        raw.sendall(head(path, token, *lines))
        assert response_of(raw)[0] == status
        # The connection ends, since the rest of it would be a body.
        assert raw.recv(100) == b""


def test_anonymous_bodies_are_not_read(front: Any) -> None:
    with closing(connect(front)) as raw:
        raw.sendall(head("/v1/rollout", None, b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"))
        status, _ = response_of(raw)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 200_000_000:
                raw.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                sent += 0x10000
    assert status == 401
    assert sent < 200_000_000, "the service took a body that it had refused"


@pytest.mark.parametrize("how", ["declared", "chunked", "nested"])
def test_json_has_64_kilobytes(front: Any, keys: dict[str, str], how: str) -> None:
    body = b"[" * 70_000 if how == "nested" else json.dumps({"reason": "unsure", "comment": "x" * 70_000}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {keys['honest']}"}
    content = iter([body[:1000], body[1000:]]) if how == "chunked" else body
    response = httpx.post(
        f"{front.url}/v1/predictions/{'0' * 32}/flags", content=content, headers=headers, trust_env=False
    )
    assert (response.status_code, response.json()["code"]) == (413, "too_large")
    assert "64 kB" in response.json()["detail"]


# ---------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", 414, id="request line"),
        pytest.param(head("/healthz", None, b"X: " + b"a" * 20_000 + b"\r\n", method=b"GET"), 431, id="one line"),
        pytest.param(head("/healthz", None, *[b"X: a\r\n"] * 500, method=b"GET"), 431, id="many lines"),
        pytest.param(head("/healthz", None, *[b"X: " + b"a" * 7000 + b"\r\n"] * 6, method=b"GET"), 431, id="in all"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 3_000_000, 431, id="a line without an end"),
        pytest.param(head("/healthz", None, b"Cookie: " + b"a=b;" * 5000 + b"\r\n", method=b"GET"), 431, id="cookies"),
    ],
)
def test_headers_have_limits(front: Any, sent: bytes, status: int) -> None:
    with closing(connect(front)) as raw:
        with contextlib.suppress(OSError):
            raw.sendall(sent)
        found, problem = response_of(raw)
    assert (found, problem["code"]) == (status, "too_large")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(
            head("/v1/predictions", None, JPEG, b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n"), 400,
            id="length and chunked",
        ),
        pytest.param(
            head("/v1/predictions", None, b"Content-Length: 3\r\nContent-Length: 4\r\n"), 400, id="two lengths"
        ),
        pytest.param(head("/v1/predictions", None, b"Content-Length: -1\r\n"), 400, id="negative length"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400, id="TLS"),
        pytest.param(b"FETCH /v1/model HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 405, id="unknown method"),
        pytest.param(b"CONNECT example.org:443 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400, id="CONNECT"),
        pytest.param(b"GET /v1/model HTTP/1.1\r\nHo st: 127.0.0.1\r\n\r\n", 400, id="space in a name"),
        pytest.param("GET /\u00e4 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode(), 400, id="path not ASCII"),
        pytest.param(head("/v1/nowhere", None, method=b"PROPFIND"), 404, id="path that is not there"),
        pytest.param(head("/v1/model", None, method=b"TRACE"), 405, id="method that the route has not"),
    ],
)  # fmt: skip
def test_what_is_no_request_gets_a_problem_document(front: Any, keys: dict[str, str], sent: bytes, status: int) -> None:
    key = f"Authorization: Bearer {keys['honest']}\r\n\r\n".encode()
    with closing(connect(front)) as raw:
        raw.sendall(sent[:-2] + key if sent.endswith(b"\r\n\r\n") else sent)
        found, problem = response_of(raw)
    assert (found, problem["status"]) == (status, status)


def test_a_compressed_body_is_refused(front: Any, keys: dict[str, str], make_image: Callable[..., bytes]) -> None:
    headers = {"Content-Type": "image/jpeg", "Authorization": f"Bearer {keys['honest']}"}
    for coding in ("gzip", "deflate, gzip", "br"):
        response = httpx.post(
            f"{front.url}/v1/predictions", content=gzip.compress(make_image(0)), trust_env=False,
            headers=headers | {"Content-Encoding": coding},
        )  # fmt: skip
        assert (response.status_code, response.json()["code"]) == (415, "unsupported_type")


def test_pipelined_requests_are_answered_in_order_and_bounded(front: Any) -> None:
    with closing(connect(front)) as raw:
        raw.sendall(head("/healthz", method=b"GET") * 3)
        received = b""
        while received.count(b'{"status":"ok"}') < 3:
            received += raw.recv(65536)
    with closing(connect(front)) as raw:
        raw.sendall(head("/healthz", method=b"GET") * 5000)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := raw.recv(65536):
                received += data
    assert received.count(b"HTTP/1.1 200") < 50


def test_endless_framing_of_a_body_ends(front: Any, keys: dict[str, str]) -> None:
    for framing in (b"1;" + b"x" * 60_000 + b"\r\na\r\n", b"0\r\n" + b"Trailer: a\r\n" * 20_000):
        with closing(connect(front)) as raw:
            raw.sendall(head("/v1/predictions", keys["honest"], JPEG, b"Transfer-Encoding: chunked\r\n"))
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 1000:
                    raw.sendall(framing)
                    sent += 1
        assert sent < 1000


# ---------------------------------------------------------------- time


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", b"\r\n"],
    ids=["silent", "line", "header", "empty"],
)
def test_a_connection_that_does_not_go_on_is_closed(front: Any, sent: bytes) -> None:
    with closing(connect(front)) as raw:
        raw.sendall(sent)
        # A byte now and then does not help: the deadline is that of all headers.
        for _ in range(20):
            time.sleep(0.3)
            try:
                raw.sendall(b"\r\n" if not sent.strip() and sent else b"a" if sent else b"")
            except OSError:
                break
        received = raw.recv(1000)
    assert received == b"" or received.startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_a_slow_body_is_given_up(front: Any, keys: dict[str, str]) -> None:
    with closing(connect(front)) as raw:
        raw.sendall(head("/v1/predictions", keys["greedy"], JPEG, b"Content-Length: 100000\r\n"))
        for _ in range(60):
            try:
                raw.sendall(b"a")
            except OSError:
                break
            time.sleep(0.5)
        assert response_of(raw)[0] == 408
    text = httpx.get(
        f"{front.url}/metrics", headers={"Authorization": f"Bearer {keys['reader']}"}, trust_env=False
    ).text
    assert 'relook_responses_total{status="408"}' in text


# ---------------------------------------------------------------- what monitoring is told


def test_a_caller_who_hangs_up_is_no_fault(front: Any, keys: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    reading = {"Authorization": f"Bearer {keys['reader']}"}

    def counted() -> dict[str, float]:
        lines = httpx.get(f"{front.url}/metrics", headers=reading, trust_env=False).text.splitlines()
        found = [line for line in lines if line.startswith("relook_responses_total{")]
        return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in found}

    before = counted()
    kinds = [
        (JPEG, "/v1/predictions"),
        (b"Content-Type: application/json\r\n", f"/v1/predictions/{'0' * 32}/flags"),
        (b"Content-Type: multipart/form-data; boundary=b\r\n", "/v1/predictions/batch"),
    ]
    for content_type, path in kinds:
        with closing(connect(front)) as raw:
            raw.sendall(head(path, keys["greedy"], content_type, b"Content-Length: 5000\r\n") + b"--b\r\n")
            time.sleep(0.2)
    deadline = time.monotonic() + 600
    while counted().get("499", 0) < before.get("499", 0) + len(kinds) and time.monotonic() < deadline:
        time.sleep(0.1)
    after = counted()
    assert after.get("499", 0) == before.get("499", 0) + len(kinds)
    assert after.get("500", 0) == before.get("500", 0)
    assert "failed" not in caplog.text


def test_health_answers_head_and_metrics_have_a_scope_of_their_own(front: Any, kept: Store) -> None:
    _, token = create_key(kept, name="prometheus", organisation="ops", scopes=[Scope.METRICS], actor="test")
    with httpx.Client(base_url=front.url, trust_env=False) as client:
        for path in ("/healthz", "/readyz", "/docs"):
            response = client.head(path)
            assert (response.status_code, response.content) == (200, b"")
        assert client.get("/metrics").status_code == 401
        headers = {"Authorization": f"Bearer {token}"}
        deadline = time.monotonic() + 600
        while (scraped := client.get("/metrics", headers=headers)).status_code == 401 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert scraped.status_code == 200
        assert client.get("/v1/predictions", headers=headers).json()["items"] == []
        assert client.post("/v1/predictions", headers=headers, content=b"x").status_code == 403


@pytest.mark.parametrize("gone", ["ledger", "images", "disk"])
def test_readiness_follows_what_predictions_need_and_names_no_place(
    tools: Any, tmp_path: Any, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "secret-home"))
    tools.serve_bundle(store, tools.make_bundle(store))
    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.1)
    with (
        tools.run_service(store, settings) as running,
        httpx.Client(base_url=running.url, trust_env=False, timeout=600) as client,
    ):
        assert client.get("/readyz").json()["ready"] is True
        if gone == "ledger":
            (store.home.root / "ledger.db").rename(tmp_path / "away.db")
        elif gone == "images":
            store.home.blobs.rename(tmp_path / "away")
        else:
            import serving.health

            def full(folder: Any) -> None:
                raise OSError(28, f"No space left on device: {folder}")

            monkeypatch.setattr(serving.health, "_write_into", full)
        deadline = time.monotonic() + 600
        while (seen := client.get("/readyz")).status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert (seen.status_code, seen.json()["ready"]) == (503, False)
        assert str(tmp_path) not in seen.text
        assert "sqlite" not in seen.text
        assert client.get("/healthz").status_code == 200
        told = client.get("/readyz", headers={"Authorization": f"Bearer {admin_token(store.home)}"})
        assert len(told.json()["detail"]) > len(seen.json()["detail"])
        if gone == "ledger":
            (tmp_path / "away.db").rename(store.home.root / "ledger.db")
    store.close()


def test_a_refusal_before_the_body_does_not_cost_the_next_request(service: Any) -> None:
    """The response does not say that the connection ends, so it must not: the caller uses it again."""
    connection = http.client.HTTPConnection("127.0.0.1", service.settings.port, timeout=600)
    for _ in range(50):
        connection.request("POST", "/v1/nothing", b"x" * 5000, {"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        response.read()
        assert response.status == 404
    connection.close()
