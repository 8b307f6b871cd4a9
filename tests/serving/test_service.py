"""The service on a real Ray: every part once, a swap under traffic without a failed request, and its own end."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from records.errors import ConfigError, UnknownIdError
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Decision, Flag, FlagReason, Prediction, ReviewItem
from serving.client import Client
from serving.schemas import Context, FlagRequest, PredictionAnswer
from serving.settings import ServingSettings


@pytest.fixture(scope="module")
def served_store(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[Store]:
    opened = open_store(RecordsSettings(home=tmp_path_factory.mktemp("on-ray")))
    tools.serve_bundle(opened, tools.make_bundle(opened, 0, bias={"bcc": -2.0}))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def url(ray_session: Any, served_store: Store, tools: Any) -> Iterator[str]:
    from serving.launch import run_service

    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.2)
    with run_service(settings, served_store.settings) as handle:
        yield handle.url


def ingress_process(url: str) -> psutil.Process:
    port = int(url.rpartition(":")[2])
    listening = (c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port)
    return psutil.Process(next(c.pid for c in listening if c.pid))


def test_predict_explain_flag_and_read(url: str, served_store: Store, picture: Callable[..., bytes]) -> None:
    with Client(url) as client:
        answer = client.predict(picture(0), explain="gradcam", context=Context(age=50))
        assert answer.explanation is not None
        assert client.explanation(answer.id) == answer.explanation
        assert client.explanation_png(answer.id, target="mel").startswith(b"\x89PNG")
        flagged = client.flag(answer.id, FlagRequest(reason=FlagReason.WRONG_LABEL, suggested_label="mel"))
        assert client.prediction(answer.id).review == flagged.review
        assert client.model().id == client.ready().model.id == answer.model.id  # type: ignore[union-attr]
    with served_store.ledger.read() as tx:
        assert tx.require(Prediction, answer.id).num_threads == 1
        assert tx.count(Flag, where={"prediction_id": answer.id}) == 1


def test_problems_cross_the_replicas_as_they_are(url: str, picture: Callable[..., bytes]) -> None:
    def post(data: bytes, **headers: str) -> Any:
        response = httpx.post(f"{url}/v1/predictions", content=data, headers={"Content-Type": "image/jpeg"} | headers)
        return response.status_code, response.json()["code"]

    assert post(b"text") == (415, "not_a_picture")
    assert post(picture(0)[:700]) == (422, "damaged")
    key = {"Idempotency-Key": "ray-1"}
    assert httpx.post(
        f"{url}/v1/predictions", content=picture(0), headers={"Content-Type": "image/jpeg"} | key
    ).is_success
    assert post(picture(1), **key) == (409, "refused")


def test_the_page_is_on_the_same_port_and_names_no_foreign_host(url: str) -> None:
    page = httpx.get(url).text
    assert "<title>Relook</title>" in page
    assert "googleapis" not in page
    assert httpx.get(f"{url}/v1/nothing").json()["code"] == "not_found"
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403


def test_only_loopback_is_listened_on(url: str) -> None:
    port = int(url.rpartition(":")[2])
    addresses = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    assert addresses == {"127.0.0.1"}


def test_a_swap_under_traffic_fails_no_request_and_every_answer_is_stored_once(
    url: str, served_store: Store, tools: Any, picture: Callable[..., bytes]
) -> None:
    second = tools.make_bundle(served_store, 1, bias={"vasc": 2.0})
    answers: list[PredictionAnswer] = []
    errors: list[Exception] = []
    stop = threading.Event()

    def send(thread: int) -> None:
        # No retries: a request that fails must be seen.
        with Client(url, retry_s=0.0) as client:
            number = thread
            while not stop.is_set():
                try:
                    answers.append(client.predict(picture(number % 20)))
                except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                    errors.append(error)
                    return
                number += 1

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    tools.serve_bundle(served_store, second)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(answer.model.id == second.id for answer in answers[-8:]):
        time.sleep(0.1)
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()

    assert errors == []
    assert len({answer.model.id for answer in answers}) == 2
    assert answers[-1].model.id == second.id
    with served_store.ledger.read() as tx:
        stored = tx.find(Prediction, where={"id": [answer.id for answer in answers]})
        waiting = {item.image_id for item in tx.find(ReviewItem)}
    assert len(stored) == len(answers) == len({answer.id for answer in answers})
    doubtful = {answer.image_id for answer in answers if answer.decision is not Decision.ANSWERED}
    assert doubtful <= waiting


def test_a_killed_ingress_comes_back_on_its_port_and_loses_no_answer(
    url: str, served_store: Store, picture: Callable[..., bytes]
) -> None:
    with Client(url, retry_s=60) as client:
        before = client.predict(picture(3), idempotency_key="before-the-kill")
        os.kill(ingress_process(url).pid, signal.SIGKILL)
        after = client.predict(picture(3), idempotency_key="before-the-kill")
    assert after == before


def test_what_cannot_start_is_said_before_anything_is_started(
    url: str, served_store: Store, tmp_path: Any, tools: Any
) -> None:
    from serving.launch import start_service

    port = int(url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"serving.port {port} .* cannot be used"):
        start_service(ServingSettings(port=port), served_store.settings)
    with pytest.raises(UnknownIdError, match="promote"):
        start_service(ServingSettings(port=tools.free_port()), RecordsSettings(home=tmp_path / "empty"))
