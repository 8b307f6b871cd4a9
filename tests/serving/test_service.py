"""The service on a real Ray: every part once, a model swap under traffic without a failed request, and shutdown."""

import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from bench.processes import processes_with
from bench.serve.interleaved import ask_all, differing, draw_calls, stored_once
from records.errors import ConfigError, UnknownIdError
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Decision, Flag, FlagReason, ModelStatus, Prediction, ReviewItem
from serving.client import Client
from serving.schemas import Context, FlagRequest, PredictionResponse
from serving.settings import ServingSettings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

VERDICTS = re.compile(r"\b(benign|harmless|safe|no cancer|healthy)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def served_store(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[Store]:
    opened = open_store(RecordsSettings(home=tmp_path_factory.mktemp("on-ray")))
    tools.serve_bundle(opened, tools.make_bundle(opened, 0, bias={"bcc": -2.0}), ModelStatus.PROVISIONAL)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def url(ray_session: Any, served_store: Store, tools: Any) -> Iterator[str]:
    with warnings.catch_warnings():
        # Ray Serve's own declarations are not clean under the newest pydantic.
        warnings.simplefilter("ignore")
        from serving.launch import run_service

    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.2, start_timeout_s=900)
    with run_service(settings, served_store.settings) as handle:
        yield handle.url


def ingress_process(url: str) -> psutil.Process:
    port = int(url.rpartition(":")[2])
    listening = (c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port)
    return psutil.Process(next(c.pid for c in listening if c.pid))


def test_predict_explain_flag_and_read(url: str, served_store: Store, make_image: Callable[..., bytes]) -> None:
    with Client(url) as client:
        prediction = client.predict(make_image(0), explain="gradcam", context=Context(age=50))
        assert prediction.explanation is not None
        assert client.explanation(prediction.id) == prediction.explanation
        assert client.explanation_png(prediction.id, target="mel").startswith(b"\x89PNG")
        flagged = client.flag(prediction.id, FlagRequest(reason=FlagReason.WRONG_LABEL, suggested_label="mel"))
        assert client.prediction(prediction.id).review == flagged.review
        assert client.model().id == client.ready().model.id == prediction.model.id  # type: ignore[union-attr]
    with served_store.ledger.read() as tx:
        assert tx.require(Prediction, prediction.id).num_threads == 1
        assert tx.count(Flag, where={"prediction_id": prediction.id}) == 1


def test_problems_cross_the_replicas_as_they_are(url: str, make_image: Callable[..., bytes]) -> None:
    def post(data: bytes, **headers: str) -> Any:
        response = httpx.post(f"{url}/v1/predictions", content=data, headers={"Content-Type": "image/jpeg"} | headers)
        return response.status_code, response.json()["code"]

    assert post(b"text") == (415, "not_an_image")
    assert post(make_image(0)[:700]) == (422, "damaged")
    key = {"Idempotency-Key": "ray-1"}
    assert httpx.post(
        f"{url}/v1/predictions", content=make_image(0), headers={"Content-Type": "image/jpeg"} | key
    ).is_success
    assert post(make_image(1), **key) == (409, "refused")


@pytest.mark.slow
def test_interleaved_calls_get_the_predictions_of_one_at_a_time_and_are_stored_once(
    url: str, served_store: Store, make_image: Callable[..., bytes]
) -> None:
    # bench/drills/interleaved.py is the long form.
    calls = draw_calls(seed=3, num_calls=45, num_images=8, codes=served_store.taxonomy.codes)
    with Client(url) as client:
        predictions = [client.predict(make_image(number)).id for number in range(8)]
        exactly = client.model().precision == "bf16"
    alone = ask_all(url, calls, make_image, predictions, 1, "alone")
    together = ask_all(url, calls, make_image, predictions, 16, "together")
    assert differing(alone, together, exactly=exactly) == []
    assert len({repr(said.body) for said in alone}) > len(calls) / 4
    with served_store.ledger.read() as tx:
        for tag, said in (("alone", alone), ("together", together)):
            assert stored_once(tx, calls, said, tag) == {"predictions": 15, "flags": 15}


def test_the_page_is_on_the_same_port_and_names_no_foreign_host(url: str) -> None:
    page = httpx.get(url).text
    assert '"title":"Relook"' in page.replace('": "', '":"')
    assert "googleapis" not in page
    assert httpx.get(f"{url}/v1/nothing").json()["code"] == "not_found"
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403


def test_only_loopback_is_listened_on(url: str) -> None:
    port = int(url.rpartition(":")[2])
    addresses = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    assert addresses == {"127.0.0.1"}


# ---------------------------------------------------------------- the page in a browser


def open_page(browser: "Browser", url: str, width_px: int) -> tuple["Page", list[str]]:
    """A page of a fresh browser session, and every address that it asked for."""
    page = browser.new_context(viewport={"width": width_px, "height": 900}).new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.wait_for_selector("#rl-model")
    return page, asked


def upload_and_ask(page: "Page", file: Path) -> None:
    with page.expect_response(lambda response: response.url.endswith(file.name)):
        page.set_input_files("#rl-image input[type=file]", str(file))
    page.click("#rl-predict")


@pytest.mark.browser
# The wide page is also opened in the tests without Ray, and by the next test.
@pytest.mark.parametrize(
    "width_px", [pytest.param(1280, marks=pytest.mark.soak), pytest.param(390, marks=pytest.mark.long)]
)
def test_a_person_uploads_reads_and_objects(
    browser: "Browser", url: str, served_store: Store, make_image: Callable[..., bytes], tmp_path: Path, width_px: int
) -> None:
    file = tmp_path / "lesion.jpg"
    file.write_bytes(make_image(30 + width_px % 7))
    page, asked = open_page(browser, url, width_px)
    assert "provisional" in page.inner_text("#rl-model")
    assert not page.is_visible("#rl-flag-form")

    upload_and_ask(page, file)
    page.wait_for_selector("#rl-map img")
    assert "Most likely" in page.inner_text("#rl-decision")
    assert page.locator("#rl-probabilities .rl-bar").count() == 7
    drawn = page.locator("#rl-map img")
    assert drawn.evaluate("image => image.naturalWidth") == 224

    page.get_by_text("Flag this prediction").click()
    page.fill("#rl-comment textarea", f"seen at {width_px}")
    page.click("#rl-flag")
    page.wait_for_selector("#rl-flagged .rl-card")
    assert "goes to an annotator" in page.inner_text("#rl-flagged")

    text = page.inner_text("body")
    assert "not a diagnosis" in text
    assert not VERDICTS.search(text)
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    assert not [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    with served_store.ledger.read() as tx:
        (flag,) = tx.find(Flag, where={"comment": f"seen at {width_px}"})
        item = tx.require(ReviewItem, flag.review_item_id)
    assert "flagged" in item.reasons
    assert item.heat_map is not None
    page.context.close()


@pytest.mark.browser
def test_an_example_is_predicted_by_keyboard_and_a_wrong_file_is_reported(
    browser: "Browser", url: str, tmp_path: Path
) -> None:
    page, _ = open_page(browser, url, 1280)
    page.locator(".gallery-item, .gallery button, [class*=gallery] img").first.click()
    page.wait_for_selector("#rl-image img")
    page.focus("#rl-predict")
    page.keyboard.press("Enter")
    page.wait_for_selector("#rl-decision")

    damaged = tmp_path / "broken.png"
    damaged.write_bytes(b"this is no image")
    page.get_by_label("Remove Image").click()
    upload_and_ask(page, damaged)
    page.wait_for_selector("#rl-result [role=alert]")
    assert "not an image that Relook reads" in page.inner_text("#rl-result")
    page.context.close()


def test_the_page_reads_no_file_but_uploads(url: str, served_store: Store, make_image: Callable[..., bytes]) -> None:
    secret = served_store.home.keys / "image.jpg"
    secret.write_bytes(make_image(0))
    with httpx.Client(base_url=url, timeout=600) as http:
        file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
        for number in range(8):
            for values in ([file], [file, "training"], [file, "training", None]):
                sent = {"data": values, "event_data": None, "fn_index": number, "session_hash": "s1"}
                refused = http.post("/gradio_api/queue/join", json=sent)
                assert (refused.status_code, refused.json()["code"]) == (422, "invalid")
        assert http.get(f"/gradio_api/file={secret}").status_code == 404


# ---------------------------------------------------------------- exchange and trouble


def test_a_swap_under_traffic_fails_no_request_and_every_prediction_is_stored_once(
    url: str, served_store: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    second = tools.make_bundle(served_store, 1, bias={"vasc": 2.0})
    predictions: list[PredictionResponse] = []
    errors: list[Exception] = []
    stop = threading.Event()

    def send(thread: int) -> None:
        # No retries: a request that fails must be seen.
        with Client(url, retry_s=0.0) as client:
            number = thread
            while not stop.is_set():
                try:
                    predictions.append(client.predict(make_image(number % 20)))
                except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                    errors.append(error)
                    return
                number += 1

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    tools.serve_bundle(served_store, second)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not any(prediction.model.id == second.id for prediction in predictions[-8:]):
        time.sleep(0.1)
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()

    assert errors == []
    assert len({prediction.model.id for prediction in predictions}) == 2
    assert predictions[-1].model.id == second.id
    with served_store.ledger.read() as tx:
        stored = tx.find(Prediction, where={"id": [prediction.id for prediction in predictions]})
        waiting = {item.image_id for item in tx.find(ReviewItem)}
    assert len(stored) == len(predictions) == len({prediction.id for prediction in predictions})
    doubtful = {prediction.image_id for prediction in predictions if prediction.decision is not Decision.ANSWERED}
    assert doubtful <= waiting


def test_a_killed_ingress_comes_back_on_its_port_and_loses_no_prediction(
    url: str, served_store: Store, make_image: Callable[..., bytes]
) -> None:
    with Client(url, retry_s=600) as client:
        before = client.predict(make_image(3), idempotency_key="before-the-kill")
        os.kill(ingress_process(url).pid, signal.SIGKILL)
        after = client.predict(make_image(3), idempotency_key="before-the-kill")
    assert after == before


def test_a_killed_page_comes_back_and_the_api_goes_on(url: str, make_image: Callable[..., bytes]) -> None:
    (page,) = processes_with("ServeReplica:relook:page")
    page.kill()
    with Client(url, retry_s=0.0) as client:
        client.predict(make_image(1))
    deadline = time.monotonic() + 600
    while (status := httpx.get(url, timeout=600).status_code) != 200:
        assert status == 503
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_failed_preconditions_are_reported_before_anything_is_started(
    url: str, served_store: Store, tmp_path: Any, tools: Any
) -> None:
    from serving.launch import start_service

    port = int(url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"serving.port {port} .* cannot be used"):
        start_service(ServingSettings(port=port), served_store.settings)
    with pytest.raises(UnknownIdError, match="promote"):
        start_service(ServingSettings(port=tools.free_port()), RecordsSettings(home=tmp_path / "empty"))
