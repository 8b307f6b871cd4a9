"""What anybody can send before a key is looked at, and what one caller can take from the others."""

import asyncio
import contextlib
import gzip
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest

from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import ReviewItem, Scope
from serving.access.keys import admin_token, create_key
from serving.access.shares import Shares, Turns
from serving.routes.admission import image_cost
from serving.settings import ServingSettings

JPEG = b"Content-Type: image/jpeg\r\n"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[Store]:
    opened = open_store(RecordsSettings(home=tmp_path_factory.mktemp("front")))
    tools.serve_bundle(opened, tools.make_bundle(opened, 0, bias={"bcc": -2.0}))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def keys(kept: Store) -> dict[str, str]:
    def make(name: str, *scopes: Scope) -> str:
        return create_key(kept, name=name, organisation=name, scopes=scopes, actor="test")[1]

    return {
        "honest": make("honest", Scope.PREDICT, Scope.FLAG),
        "greedy": make("greedy", Scope.PREDICT, Scope.FLAG),
        "reader": make("reader", Scope.AUDIT),
    }


@pytest.fixture(scope="module")
def front(kept: Store, keys: dict[str, str], tools: Any) -> Iterator[Any]:
    settings = ServingSettings(
        port=tools.free_port(), max_upload_mb=1.0, model_poll_s=0.1, header_timeout_s=1.0, max_connections=64,
        max_in_flight=16,
    )  # fmt: skip
    with tools.run_service(kept, settings) as running:
        yield running


def connect(front: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", front.settings.port), timeout=30)


def head(path: str = "/v1/predictions", key: str | None = None, *lines: bytes, method: bytes = b"POST") -> bytes:
    authorization = [] if key is None else [f"Authorization: Bearer {key}\r\n".encode()]
    return (
        b"".join((method, b" ", path.encode(), b" HTTP/1.1\r\nHost: 127.0.0.1\r\n", *authorization, *lines)) + b"\r\n"
    )


def response_of(raw: socket.socket) -> tuple[int, dict[str, Any]]:
    """Return status and problem document of the next response, and take nothing behind it."""
    with closing(http.client.HTTPResponse(raw)) as response:
        response.begin()
        body = response.read()
    is_problem = response.headers["content-type"] == "application/problem+json"
    return response.status, json.loads(body) if is_problem else {}


def honest(front: Any, keys: dict[str, str], image: bytes, count: int = 5) -> list[int]:
    with httpx.Client(base_url=front.url, trust_env=False, timeout=30) as client:
        headers = {"Content-Type": "image/jpeg", "Authorization": f"Bearer {keys['honest']}"}
        return [client.post("/v1/predictions", content=image, headers=headers).status_code for _ in range(count)]


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


# ---------------------------------------------------------------- shares


def test_idle_bodies_of_one_key_take_no_slot_of_another(
    front: Any, keys: dict[str, str], make_image: Callable[..., bytes]
) -> None:
    image = make_image(0)
    with ExitStack() as stack:
        for number in range(28):
            raw = stack.enter_context(closing(connect(front)))
            length = f"Content-Length: {len(image)}\r\n".encode()
            raw.sendall(head("/v1/predictions", keys["greedy"], JPEG, length) + image[: number * 10])
        assert honest(front, keys, image, 10) == [200] * 10


def test_more_silent_connections_than_there_may_be_keep_nobody_out(
    front: Any, keys: dict[str, str], make_image: Callable[..., bytes]
) -> None:
    with ExitStack() as stack:
        for source in range(2, 8):
            for _ in range(30):
                raw = socket.create_connection(
                    ("127.0.0.1", front.settings.port), timeout=5, source_address=(f"127.0.0.{source}", 0)
                )
                stack.enter_context(closing(raw))
                raw.sendall(b"GET / HTTP/1.1\r\n")
        assert honest(front, keys, make_image(0)) == [200] * 5


def test_requests_that_never_end_leave_connections_of_their_address_to_others(
    front: Any, keys: dict[str, str], make_image: Callable[..., bytes]
) -> None:
    with ExitStack() as stack:
        for _ in range(60):
            raw = stack.enter_context(closing(connect(front)))
            raw.sendall(head("/page/upload", None, b"Content-Length: 1000\r\n") + b"a" * 10)
            raw.sendall(head("/v1/predictions/batch", keys["greedy"], b"Content-Length: 900000\r\n"))
        assert honest(front, keys, make_image(0)) == [200] * 5


def test_one_key_with_all_it_may_send_leaves_room_for_another(
    front: Any, keys: dict[str, str], make_image: Callable[..., bytes]
) -> None:
    stop, seen = threading.Event(), []

    def flood(number: int) -> None:
        headers = {"Content-Type": "image/jpeg", "Authorization": f"Bearer {keys['greedy']}"}
        with httpx.Client(base_url=front.url, trust_env=False, timeout=60) as client:
            while not stop.is_set():
                response = client.post("/v1/predictions", content=make_image(number % 4), headers=headers)
                seen.append(response.status_code)

    with ThreadPoolExecutor(24) as threads:
        flooding = [threads.submit(flood, number) for number in range(24)]
        while len(seen) < 24:
            time.sleep(0.05)
        found = honest(front, keys, make_image(0), 10)
        stop.set()
        for future in flooding:
            future.result()
    assert found == [200] * 10
    assert set(seen) <= {200, 429}


def test_a_batch_costs_as_much_as_its_images(kept: Store, tools: Any, make_image: Callable[..., bytes]) -> None:
    _, token = create_key(kept, name="batches", organisation="b", scopes=[Scope.PREDICT, Scope.FLAG], actor="test")
    settings = ServingSettings(port=tools.free_port(), rate_limit_per_minute=40, model_poll_s=0.1)
    headers = {"Authorization": f"Bearer {token}"}
    with (
        tools.run_service(kept, settings) as running,
        httpx.Client(base_url=running.url, headers=headers, trust_env=False, timeout=60) as client,
    ):
        batch = [("image", (str(n), make_image(n), "image/jpeg")) for n in range(16)]
        first = client.post("/v1/predictions/batch", files=batch)
        assert first.status_code == 200
        prediction = first.json()["items"][0]["prediction"]["id"]
        assert client.post("/v1/predictions/batch", files=batch).status_code == 200
        refused = client.post("/v1/predictions/batch", files=batch)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert "retry-after" in refused.headers
        # An explanation of many evaluations costs more than is left.
        slow = client.get(f"/v1/predictions/{prediction}/explanation", params={"method": "occlusion"})
        assert slow.status_code == 429


def test_flags_cannot_make_the_text_of_an_item_grow_without_end(
    front: Any, kept: Store, keys: dict[str, str], make_image: Callable[..., bytes]
) -> None:
    headers = {"Authorization": f"Bearer {keys['greedy']}"}
    with httpx.Client(base_url=front.url, headers=headers, trust_env=False, timeout=60) as client:
        predicted = client.post(
            "/v1/predictions", content=make_image(40), headers={"Content-Type": "image/jpeg"}
        ).json()
        path = f"/v1/predictions/{predicted['id']}/flags"
        seen = [
            client.post(path, json={"reason": "other", "comment": f"{number} " + "x" * 1500}).status_code
            for number in range(60)
        ]
    with kept.ledger.read() as tx:
        items = tx.find(ReviewItem, where={"image_id": predicted["image_id"]})
    assert seen[0] == 200
    assert set(seen) == {200, 409}, "more flags than annotators could read are refused with one sentence"
    assert sum(len((item.comment or "").encode()) for item in items) < 100_000


def test_shares_leave_something_for_the_next_owner() -> None:
    shares = Shares(60)
    taken = {name: sum(shares.take(name) for _ in range(100)) for name in ("a", "b", "c")}
    assert taken["a"] == 40
    assert shares.take("d"), "whatever three callers take, a fourth finds room"
    assert not shares.take("a")
    alone = Shares(2)
    assert [alone.take(None) for _ in range(3)] == [True, True, False]
    alone.give_back(None)
    assert alone.take(None)


def test_a_costly_caller_does_not_run_before_a_cheap_one() -> None:
    async def order() -> list[str]:
        turns, began, release = Turns(alone=64, together=16), [], asyncio.Event()

        async def work(owner: str, cost: int) -> None:
            async with turns.turn(owner, cost):
                began.append(owner)
                await release.wait()

        first = asyncio.create_task(work("cheap", 1))
        await asyncio.sleep(0)
        costly = [asyncio.create_task(work("costly", 13)) for _ in range(5)]
        cheap = [asyncio.create_task(work("cheap", 1)) for _ in range(5)]
        await asyncio.sleep(0.01)
        found = list(began)
        # One that is cancelled while it waits passes its turn on.
        costly[1].cancel()
        release.set()
        await asyncio.gather(first, *costly, *cheap, return_exceptions=True)
        return [*found, f"{len(began)} in all"]

    assert asyncio.run(order()) == ["cheap", "costly", *["cheap"] * 5, "10 in all"]


def test_a_large_image_costs_more_than_a_small_one(make_image: Callable[..., bytes]) -> None:
    import io

    from PIL import Image

    large = io.BytesIO()
    Image.new("L", (7000, 7000)).save(large, "PNG")
    assert image_cost(make_image(0)) == 1
    assert image_cost(large.getvalue()) == 13
    assert image_cost(b"\xff\xd8" + b"\xff\xe0\x00\x02" * 100_000) == 4, "the size is not in its first bytes"


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
    deadline = time.monotonic() + 20
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
        deadline = time.monotonic() + 10
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
        httpx.Client(base_url=running.url, trust_env=False, timeout=30) as client,
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
        deadline = time.monotonic() + 20
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
    connection = http.client.HTTPConnection("127.0.0.1", service.settings.port, timeout=20)
    for _ in range(50):
        connection.request("POST", "/v1/nothing", b"x" * 5000, {"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        response.read()
        assert response.status == 404
    connection.close()
