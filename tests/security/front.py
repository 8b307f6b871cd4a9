"""A service with three keys, and requests to it byte by byte."""

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from records.store import Store
from records.types import Scope
from serving.exchange import SECURITY_HEADERS
from serving.settings import ServingSettings

JPEG = b"Content-Type: image/jpeg\r\n"


@pytest.fixture(scope="module")
def keys(kept: Store, tools: Any) -> dict[str, str]:
    return {
        "honest": tools.make_key(kept, "honest", Scope.PREDICT, Scope.FLAG),
        "greedy": tools.make_key(kept, "greedy", Scope.PREDICT, Scope.FLAG),
        "reader": tools.make_key(kept, "reader", Scope.AUDIT),
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
    return socket.create_connection(("127.0.0.1", front.settings.port), timeout=600)


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
    # Whoever made it: the app, the middleware before it, or the listener before both.
    assert {name: response.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    is_problem = response.headers["content-type"] == "application/problem+json"
    return response.status, json.loads(body) if is_problem else {}


def honest(front: Any, keys: dict[str, str], image: bytes, count: int = 5) -> list[int]:
    with httpx.Client(base_url=front.url, trust_env=False, timeout=600) as client:
        headers = {"Content-Type": "image/jpeg", "Authorization": f"Bearer {keys['honest']}"}
        return [client.post("/v1/predictions", content=image, headers=headers).status_code for _ in range(count)]
