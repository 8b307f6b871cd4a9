"""The client: it comes back after a broken connection with the same key, and says in one sentence when it cannot."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from records.errors import RelookError, UnavailableError
from records.types import Prediction
from serving.client import Client


@contextmanager
def unreliable_way(port: int, cuts: int) -> Iterator[int]:
    """Forward TCP connections to a port; cut the first ones off after the answer was made, before it arrives."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for number in range(cuts + 2):
            try:
                near, _ = listening.accept()
            except OSError:
                return
            with near, socket.create_connection(("127.0.0.1", port)) as far:
                near.settimeout(1.0)
                far.settimeout(20.0)
                far.sendall(_message(near))
                response = _message(far)
                if number >= cuts:
                    near.sendall(response)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.close()
        thread.join(timeout=5)


def _message(way: socket.socket) -> bytes:
    """Read one whole HTTP message, in however many pieces it comes."""
    message = way.recv(1 << 20)
    while b"\r\n\r\n" not in message or len(message.partition(b"\r\n\r\n")[2]) < _length(message):
        piece = way.recv(1 << 20)
        if not piece:
            break
        message += piece
    return message


def _length(request: bytes) -> int:
    for line in request.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0


def test_a_request_with_a_lost_response_is_repeated_and_counted_once(
    service: Any, make_image: Callable[..., bytes]
) -> None:
    with service.store.ledger.read() as tx:
        before = tx.count(Prediction)
    with unreliable_way(service.settings.port, cuts=2) as port, Client(f"http://127.0.0.1:{port}") as client:
        prediction = client.predict(make_image(0))
    with service.store.ledger.read() as tx:
        assert tx.count(Prediction) == before + 1
        assert tx.get(Prediction, prediction.id) is not None


def test_a_service_that_is_not_there_is_one_sentence(tools: Any) -> None:
    with Client(f"http://127.0.0.1:{tools.free_port()}", retry_s=0.0) as client:
        with pytest.raises(UnavailableError, match="relook serve"):
            client.model()
        assert not client.ready().ready
        assert "no service responds" in client.ready().detail


def test_something_else_on_the_port_is_told_apart() -> None:
    other = httpx.MockTransport(lambda _: httpx.Response(200, text="a web shop"))
    with Client("http://127.0.0.1", transport=other) as client, pytest.raises(RelookError, match="ServedModelInfo"):
        client.model()
    silent = httpx.MockTransport(lambda _: httpx.Response(418, text="teapot"))
    with Client("http://127.0.0.1", transport=silent) as client, pytest.raises(RelookError, match="418"):
        client.model()


def test_a_key_is_sent_as_bearer() -> None:
    seen: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"items": []})

    with Client("http://127.0.0.1", "secret", transport=httpx.MockTransport(respond)) as client:
        client.models()
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert "secret" not in repr(client)
