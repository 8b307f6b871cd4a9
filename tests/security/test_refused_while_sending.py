"""A caller that is refused while its body is under way reads why, and its next request is not lost."""

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from serving.connections import LINGER_BYTES

JPEG = {"Content-Type": "image/jpeg"}


def parts(size: int) -> Iterator[bytes]:
    """A body of unknown length."""
    for _ in range(0, size, 65_536):
        yield bytes(65_536)


@pytest.mark.parametrize(
    ("path", "content_type", "size", "rounds"),
    [
        pytest.param("/v1/predictions", "image/jpeg", 1_300_000, 30, id="image"),
        pytest.param("/v1/predictions", "image/jpeg", 6_000_000, 2, id="more than is thrown away"),
        pytest.param("/v1/nothing", "image/jpeg", 1_300_000, 30, id="no such route"),
        pytest.param("/v1/rollout", "application/json", 1_300_000, 30, id="JSON"),
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_the_next_request_of_the_same_caller_is_not_lost(
    service: Any, path: str, content_type: str, size: int, rounds: int, framing: str
) -> None:
    with httpx.Client(base_url=service.url, trust_env=False, timeout=600) as client:
        for _ in range(rounds):
            # A body of parts cannot be sent twice, so a client does not repeat it by itself on a lost connection.
            content = bytes(size) if framing == "length" else parts(size)
            refused = client.post(path, content=content, headers={"Content-Type": content_type})
            assert refused.status_code in (403, 404, 413)
            assert refused.json()["status"] == refused.status_code


@pytest.mark.parametrize(
    ("lines", "ends"),
    [
        pytest.param([f"Content-Length: {LINGER_BYTES}"], False, id="a rest that is read and thrown away"),
        pytest.param([f"Content-Length: {LINGER_BYTES + 1}"], True, id="a rest that is too long for that"),
        pytest.param(["Transfer-Encoding: chunked"], True, id="a rest of unknown length"),
        pytest.param(["Content-Length: 10", "Expect: 100-continue"], True, id="a body that may never be sent"),
        pytest.param(["Content-Length: 10", "Connection: close"], True, id="the caller ends it"),
    ],
)
def test_a_response_says_whether_the_connection_ends(service: Any, lines: list[str], ends: bool) -> None:
    with closing(socket.create_connection(("127.0.0.1", service.settings.port), timeout=600)) as raw:
        request = ["POST /v1/nothing HTTP/1.1", "Host: 127.0.0.1", "Content-Type: image/jpeg", *lines]
        raw.sendall("\r\n".join(request).encode() + b"\r\n\r\n")
        with closing(http.client.HTTPResponse(raw)) as response:
            response.begin()
            assert json.loads(response.read())["status"] == response.status
            assert (response.headers["connection"] == "close") is ends


def test_a_response_after_the_whole_body_keeps_the_connection(service: Any) -> None:
    with httpx.Client(base_url=service.url, trust_env=False, timeout=600) as client:
        response = client.post("/v1/predictions", content=parts(1), headers=JPEG)
        assert response.status_code == 415
        assert "connection" not in response.headers
