"""A prediction under review is waited for: until its annotation, the end of the time, a hang-up or a shutdown."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from records.ids import utc_now
from records.types import Decision, ReviewItem, ReviewState
from serving.client import Client
from serving.schemas import PredictionResponse
from serving.settings import ServingSettings

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def running(kept: Any, tools: Any) -> Iterator[Any]:
    with tools.run_service(kept, ServingSettings(port=tools.free_port(), max_waiting=3)) as service:
        yield service


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def predicted(url: str, make_image: Callable[..., bytes], wanted: Decision, start: int) -> PredictionResponse:
    with Client(url) as client:
        found = (client.predict(make_image(number)) for number in range(start, start + 30))
        return next(each for each in found if each.decision is wanted)


def read(url: str, prediction: PredictionResponse, wait: float) -> httpx.Response:
    path = f"{url}/v1/predictions/{prediction.id}"
    return httpx.get(path, params={"wait": wait}, trust_env=False, timeout=2 * PATIENCE_S)


def close(store: Any, prediction: PredictionResponse, state: ReviewState) -> None:
    with store.ledger.begin() as tx:
        (item,) = tx.find(ReviewItem, where={"prediction_id": prediction.id})
        tx.update(ReviewItem, item.id, state=state, answered_at=utc_now())


def test_a_response_comes_with_the_annotation(
    running: Any, kept: Any, threads: ThreadPoolExecutor, make_image: Callable[..., bytes]
) -> None:
    first = predicted(running.url, make_image, Decision.REVIEW, 100)
    other = predicted(running.url, make_image, Decision.REVIEW, 140)
    begun = time.monotonic()
    waiting = threads.submit(read, running.url, first, PATIENCE_S)
    others = threads.submit(read, running.url, other, 2.0)
    # Another image's end of the time changes nothing.
    assert others.result().json()["review"]["state"] == "new"
    assert not waiting.done()
    close(kept, first, ReviewState.ANSWERED)
    assert waiting.result().json()["review"]["state"] == "answered"
    assert time.monotonic() - begun < PATIENCE_S
    with Client(running.url) as client:
        assert client.prediction(first.id, wait_s=PATIENCE_S).review.state is ReviewState.ANSWERED  # type: ignore[union-attr]


def test_what_is_not_under_review_is_not_waited_for(running: Any, make_image: Callable[..., bytes]) -> None:
    answered = predicted(running.url, make_image, Decision.ANSWERED, 180)
    begun = time.monotonic()
    assert read(running.url, answered, PATIENCE_S).json()["review"] is None
    assert time.monotonic() - begun < PATIENCE_S
    missing = answered.model_copy(update={"id": "0" * 32})
    assert read(running.url, missing, PATIENCE_S).status_code == 404
    for wait in (-1.0, 61.0, float("inf"), float("nan")):
        assert read(running.url, answered, wait).status_code == 422


def test_a_withdrawn_review_ends_the_wait(
    running: Any, kept: Any, threads: ThreadPoolExecutor, make_image: Callable[..., bytes]
) -> None:
    prediction = predicted(running.url, make_image, Decision.REVIEW, 220)
    waiting = threads.submit(read, running.url, prediction, PATIENCE_S)
    assert not wait_for(waiting.done, 1.0)
    close(kept, prediction, ReviewState.WITHDRAWN)
    assert waiting.result().json()["review"] is None


def wait_for(condition: Callable[[], bool], limit_s: float) -> bool:
    until = time.monotonic() + limit_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def test_few_may_wait_and_predictions_do_not_wait_for_them(
    running: Any, kept: Any, threads: ThreadPoolExecutor, make_image: Callable[..., bytes]
) -> None:
    prediction = predicted(running.url, make_image, Decision.REVIEW, 260)
    refused: list[httpx.Response] = []

    def admitted() -> httpx.Response:
        # The probe below may hold the place that one of the three needs.
        while (response := read(running.url, prediction, PATIENCE_S)).status_code == 429:
            time.sleep(0.05)
        return response

    three = [threads.submit(admitted) for _ in range(3)]

    def is_refused() -> bool:
        refused.append(read(running.url, prediction, 0.01))
        return refused[-1].status_code == 429

    assert wait_for(is_refused, PATIENCE_S)
    assert (refused[-1].json()["code"], refused[-1].headers["retry-after"]) == ("busy", "1")
    with Client(running.url) as client:
        assert client.predict(make_image(261)).label
        assert client.prediction(prediction.id).id == prediction.id
    close(kept, prediction, ReviewState.ANSWERED)
    assert {one.result().status_code for one in three} == {200}


def test_who_hangs_up_waits_no_longer(running: Any, kept: Any, make_image: Callable[..., bytes]) -> None:
    prediction = predicted(running.url, make_image, Decision.REVIEW, 300)
    path = f"{running.url}/v1/predictions/{prediction.id}"
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(path, params={"wait": 60}, trust_env=False, timeout=httpx.Timeout(5, read=0.3))
    assert wait_for(lambda: read(running.url, prediction, 0.01).status_code == 200, PATIENCE_S)


def test_a_shutdown_ends_the_waits(
    kept: Any, tools: Any, threads: ThreadPoolExecutor, make_image: Callable[..., bytes]
) -> None:
    with tools.run_service(kept, ServingSettings(port=tools.free_port())) as other:
        prediction = predicted(other.url, make_image, Decision.REVIEW, 340)
        waiting: Future[httpx.Response] = threads.submit(read, other.url, prediction, 60.0)
        assert not wait_for(waiting.done, 1.0)
        begun = time.monotonic()
    response = waiting.result()
    assert (response.status_code, response.json()["review"]["state"]) == (200, "new")
    assert time.monotonic() - begun < PATIENCE_S
