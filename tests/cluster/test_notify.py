"""A receiver is notified of the end of a round; a receiver that fails changes nothing."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.gate import Verdict
from cluster.notify import notifying
from cluster.settings import RoundSettings, Settings, settings_hash
from records.errors import UnavailableError
from records.ids import new_id, utc_now
from records.types import ModelStatus, RoundRecord


class Receiver(HTTPServer):
    """Keeps the bodies it gets and responds with one status."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.bodies: list[dict[str, Any]] = []

    @property
    def settings(self) -> RoundSettings:
        return RoundSettings.model_validate({"notify_url": f"http://127.0.0.1:{self.server_port}/hook/s3cret"})


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture(params=[200])
def receiver(request: pytest.FixtureRequest) -> Iterator[Receiver]:
    with Receiver(request.param) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ended(verdict: Verdict) -> RoundRecord:
    return RoundRecord(
        id=new_id(), number=3, started_at=utc_now(), seed=0, settings_hash="h", verdict=verdict, why="because",
        model_id="ab" * 32, dataset_id="cd" * 32, finished_at=utc_now(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "status", "event"),
    [
        (Verdict.PROMOTE, ModelStatus.CHAMPION, "round.ended"),
        (Verdict.PROMOTE, ModelStatus.CANDIDATE, "round.waits"),
        (Verdict.REFUSE, ModelStatus.REFUSED, "round.ended"),
    ],
)
def test_the_end_is_notified_with_what_to_do(receiver: Receiver, verdict: Verdict, status: str, event: str) -> None:
    with notifying(receiver.settings, 3) as notify_end:
        notify_end(ended(verdict), {"rollout": {"status": status, "text": f"model abab is {status}"}})
    (body,) = receiver.bodies
    assert (body["event"], body["round"], body["verdict"], body["why"]) == (event, 3, verdict, "because")
    assert str(status) in body["text"]
    assert ("relook promote abababababab" in body["text"]) == (event == "round.waits")


def test_a_failed_round_is_notified_and_still_fails(receiver: Receiver) -> None:
    with pytest.raises(UnavailableError, match="the disk is full"), notifying(receiver.settings, 3):
        raise UnavailableError("the disk is full")
    (body,) = receiver.bodies
    assert (body["event"], body["error"]) == ("round.failed", "UnavailableError")
    assert "the disk is full" in body["text"]


@pytest.mark.parametrize("receiver", [500], indirect=True)
def test_a_receiver_that_fails_is_a_warning_without_its_address(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    settings = receiver.settings
    with notifying(settings, 3) as notify_end:
        notify_end(ended(Verdict.REFUSE), {})
    receiver.server_close()
    with notifying(settings, 3) as notify_end:
        notify_end(ended(Verdict.REFUSE), {})
    responded, unreachable = (record.getMessage() for record in caplog.records if record.name == "cluster.notify")
    assert "responded with 500" in responded
    assert "did not get" in unreachable
    assert "s3cret" not in caplog.text + repr(settings)


def test_nothing_is_sent_without_a_receiver() -> None:
    with notifying(RoundSettings(), 3) as notify_end:
        notify_end(ended(Verdict.REFUSE), {})


def test_the_receiver_does_not_change_the_settings_hash() -> None:
    notified = Settings(round=RoundSettings.model_validate({"notify_url": "https://example.org/hook"}))
    assert settings_hash(notified) == settings_hash(Settings())


def test_an_invalid_address_is_refused() -> None:
    with pytest.raises(ValidationError, match="begin it with https://"):
        RoundSettings.model_validate({"notify_url": "ftp://example.org"})
