"""The client: it comes back after a broken connection with the same key, and says in one sentence when it cannot."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from records.errors import (
    AccessError,
    DataError,
    ImageError,
    RefusedError,
    RelookError,
    UnavailableError,
    UnknownIdError,
)
from records.types import Prediction
from serving.client import Client
from tests.unreliable import unreliable_way


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


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "no_key", AccessError), (404, "not_found", UnknownIdError), (409, "refused", RefusedError),
        (413, "too_large", ImageError), (422, "damaged", ImageError), (422, "invalid", DataError),
        (503, "busy", UnavailableError), (500, "bug", RelookError),
    ],
)  # fmt: skip
def test_problems_become_the_errors_of_the_library(status: int, code: str, kind: type[RelookError]) -> None:
    problem = {"type": "about:blank", "title": "t", "status": status, "detail": "why", "code": code, "request_id": "r"}
    given = httpx.MockTransport(lambda _: httpx.Response(status, json=problem))
    with Client("http://127.0.0.1", transport=given, retry_s=0.0) as client, pytest.raises(kind, match="why") as raised:
        client.models()
    assert type(raised.value) is kind


def test_a_key_is_sent_as_bearer() -> None:
    seen: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"items": []})

    with Client("http://127.0.0.1", "secret", transport=httpx.MockTransport(respond)) as client:
        client.models()
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert "secret" not in repr(client)
