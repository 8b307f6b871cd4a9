"""A service with three keys, and requests to it byte by byte."""

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Scope
from serving.access.keys import create_key
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
