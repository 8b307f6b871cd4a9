"""Outbound hooks: signed, in order, at least once, by one replica, and to no address that nobody allowed."""

import hmac
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from records.errors import UnavailableError, UnknownIdError
from records.ids import id_after, utc_now
from records.store import Store
from records.types import Cursor, EventRecord
from serving.access.keys import admin_token
from serving.client import Client
from serving.hooks.delivery import (
    MANY_FAILURES,
    Hooks,
    HookState,
    deliver_due,
    secret_of,
    send_test,
    state_of,
    troubles,
)
from serving.hooks.requests import _checked, is_public, post
from serving.schemas import OutcomeRequest
from serving.settings import HookSettings, ServingSettings

PATIENCE_S = 600.0


@dataclass
class Receiver:
    """A program that is told about events; it responds with the next status, 204 once there is none."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def accepted(self) -> list[str]:
        return [headers["x-relook-event"] for headers, _ in self.received if headers["status"] == "204"]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


@contextmanager
def receiving(context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = found.statuses.pop(0) if found.statuses else 204
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.received.append(({**headers, "status": str(status), "path": self.path}, body))
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    found.url = f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def hook_to(receiver: Receiver, **changes: Any) -> HookSettings:
    return HookSettings(**{"name": "clinic", "url": receiver.url, "organisation": "clinic-a", **changes})


def add_events(store: Store, number: int, organisation: str = "clinic-a", kind: str = "amended") -> list[str]:
    added = []
    with store.ledger.begin() as tx:
        newest = tx.find(EventRecord, order_by=("-id",), limit=1)
        last = newest[0].id if newest else None
        for _ in range(number):
            last = id_after(last)
            event = EventRecord(
                id=last, created_at=utc_now(), organisation=organisation, kind=kind, prediction_id="0" * 32, source=last
            )
            tx.add(event)
            added.append(last)
    return added


def no_pause(store: Store, hook: HookSettings) -> None:
    """Let the last attempt of a hook lie a day back."""
    state = state_of(store, hook).position()
    with store.ledger.begin() as tx:
        position = {**state, "tried_at": (utc_now() - timedelta(days=1)).isoformat()}
        tx.update(Cursor, f"hook.{hook.name}", position=position)


def wait_for(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


# ---------------------------------------------------------------- delivery


def test_events_are_signed_and_in_order(store: Store, receiver: Receiver) -> None:
    hook = hook_to(receiver)
    add_events(store, 2)
    assert deliver_due(store, hook) == 0
    wanted = add_events(store, 3)
    add_events(store, 1, organisation="clinic-b")
    assert deliver_due(store, hook) == 3
    assert receiver.accepted == wanted
    secret = (store.home.keys / "hook-clinic").read_bytes()
    for headers, body in receiver.received:
        at, signed = (part.partition("=")[2] for part in headers["x-relook-signature"].split(","))
        assert hmac.new(secret, at.encode() + b"." + body, "sha256").hexdigest() == signed
        assert abs(int(at) - time.time()) < PATIENCE_S
        assert json.loads(body)["id"] == headers["x-relook-event"]
        assert set(json.loads(body)) == {"id", "created_at", "kind", "prediction_id", "details"}
    assert deliver_due(store, hook) == 0


def test_only_chosen_kinds_are_sent_and_the_others_are_passed(store: Store, receiver: Receiver) -> None:
    hook = hook_to(receiver, kinds=("recalled",))
    deliver_due(store, hook)
    add_events(store, 3, kind="confirmed")
    recalled = add_events(store, 1, kind="recalled")
    last = add_events(store, 1, kind="overdue")
    assert deliver_due(store, hook) == 1
    assert receiver.accepted == recalled
    assert state_of(store, hook).after == last[0]


def test_a_refused_event_is_repeated_and_holds_up_those_behind_it(store: Store, receiver: Receiver) -> None:
    hook = hook_to(receiver)
    deliver_due(store, hook)
    first, second = add_events(store, 2)
    receiver.statuses = [204, 500, 503]
    assert deliver_due(store, hook) == 1
    # It is not tried again before its pause is over.
    assert deliver_due(store, hook) == 0
    assert len(receiver.received) == 2
    no_pause(store, hook)
    assert deliver_due(store, hook) == 0
    assert state_of(store, hook).failures == 2
    assert "503" in str(state_of(store, hook).error)
    assert not troubles(store, [hook])
    no_pause(store, hook)
    assert deliver_due(store, hook) == 1
    assert receiver.accepted == [first, second]
    assert state_of(store, hook).failures == 0


def test_an_event_whose_delivery_was_not_noted_comes_again_with_the_same_id(store: Store, receiver: Receiver) -> None:
    hook = hook_to(receiver)
    deliver_due(store, hook)
    before = state_of(store, hook).position()
    (event,) = add_events(store, 1)
    assert deliver_due(store, hook) == 1
    # What a process leaves that was killed between the response and its note.
    with store.ledger.begin() as tx:
        tx.update(Cursor, f"hook.{hook.name}", position=before)
    assert deliver_due(store, hook) == 1
    assert receiver.accepted == [event, event]
    assert receiver.received[0][1] == receiver.received[1][1]


def test_pauses_grow_up_to_a_quarter_of_an_hour() -> None:
    pauses = [HookState(failures=number).pause_s for number in (0, 1, 2, 3, 8, 9, 1000)]
    assert pauses == [0, 5, 10, 20, 640, 900, 900]


def test_a_redirect_is_not_followed(store: Store, receiver: Receiver) -> None:
    for status in (301, 302, 307, 308):
        receiver.statuses = [status]
        with pytest.raises(UnavailableError, match="redirect"):
            send_test(store.home, hook_to(receiver))
    assert {headers["path"] for headers, _ in receiver.received} == {"/hook"}


def test_a_restart_continues_and_two_replicas_deliver_once(store: Store, receiver: Receiver) -> None:
    hook = hook_to(receiver)
    deliver_due(store, hook)
    wanted = add_events(store, 5)
    replicas = [Hooks(store, [hook], poll_s=0.05) for _ in range(2)]
    for replica in replicas:
        replica.check()
    assert wait_for(lambda: len(receiver.received) >= 5)
    for replica in replicas:
        replica.check()
        replica.stop()
    wanted += add_events(store, 2)
    again = Hooks(store, [hook], poll_s=0.05)
    again.check()
    assert wait_for(lambda: len(receiver.received) >= 7)
    again.stop()
    assert receiver.accepted == wanted


def test_a_dead_hook_holds_up_no_other_one(store: Store, receiver: Receiver) -> None:
    dead = hook_to(receiver, name="dead", url="http://127.0.0.1:9/nobody")
    alive = hook_to(receiver, name="alive")
    for hook in (dead, alive):
        deliver_due(store, hook)
    (event,) = add_events(store, 1)
    both = Hooks(store, [dead, alive], poll_s=0.05)
    both.check()
    assert wait_for(lambda: receiver.accepted == [event])
    assert wait_for(lambda: state_of(store, dead).failures == 1)
    both.stop()


def test_a_dead_hook_is_said_in_health_and_metrics(
    kept: Store, tools: Any, receiver: Receiver, make_image: Callable[..., bytes]
) -> None:
    hook = hook_to(receiver, organisation="local")
    settings = ServingSettings(port=tools.free_port(), hooks=(hook,))
    deliver_due(kept, hook)
    with tools.run_service(kept, settings) as running, Client(running.url) as client:
        prediction = client.predict(make_image(0))
        outcome = {"diagnosis": "mel", "confirmation": "histopathology", "observed_at": "2026-01-15T09:00:00Z"}
        client.outcome(prediction.id, OutcomeRequest.model_validate(outcome))
        receiver.statuses = [500] * MANY_FAILURES
        for _ in range(MANY_FAILURES):
            deliver_due(kept, hook)
            no_pause(kept, hook)
        token = {"Authorization": f"Bearer {admin_token(kept.home)}"}
        with httpx.Client(base_url=running.url, trust_env=False) as http:
            everybody = http.get("/readyz")
            assert (everybody.status_code, everybody.json()["detail"]) == (200, "a hook is not delivered")
            assert "127.0.0.1 responds with 500" in http.get("/readyz", headers=token).json()["detail"]
            assert 'relook_hook_failures{hook="clinic"} 3.0' in http.get("/metrics", headers=token).text
            assert deliver_due(kept, hook) == 1
            assert 'relook_hook_failures{hook="clinic"} 0.0' in http.get("/metrics", headers=token).text
    sent = json.loads(receiver.received[-1][1])
    assert (sent["prediction_id"], sent["details"]["label"]) == (prediction.id, "mel")


# ---------------------------------------------------------------- addresses


def test_the_certificate_must_be_that_of_the_name(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {kind: str(tmp_path / kind) for kind in ("key", "crt")}
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", files["key"],
         "-out", files["crt"]],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["crt"], files["key"])
    with receiving(context) as receiver:
        named = hook_to(receiver, url=receiver.url.replace("127.0.0.1", "localhost"), private=True)
        with pytest.raises(UnavailableError, match="certificate"):
            send_test(store.home, named)
        # What an operator does who has an authority of their own.
        monkeypatch.setenv("SSL_CERT_FILE", files["crt"])
        send_test(store.home, named)
        with pytest.raises(UnavailableError, match="certificate"):
            send_test(store.home, hook_to(receiver))
    assert len(receiver.received) == 1


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.0.0.1", "017700000001"])
def test_a_name_of_a_private_address_is_refused_unless_it_is_allowed(
    store: Store, receiver: Receiver, host: str
) -> None:
    url = receiver.url.replace("127.0.0.1", host)
    named = hook_to(receiver, url=url.replace("http:", "https:"))
    with pytest.raises(UnavailableError, match=r"private address|cannot be resolved"):
        send_test(store.home, named)
    assert receiver.received == []
    with pytest.raises(UnavailableError, match="cannot be resolved"):
        post(hook_to(receiver, url="https://nobody.invalid/"), b"{}", {})
    if host == "localhost":
        send_test(store.home, hook_to(receiver, url=url, private=True))
        assert receiver.received[0][0]["host"] == url.split("/")[2]


def test_a_name_is_refused_if_any_of_its_addresses_is_private(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [["8.8.8.8", "10.0.0.1"], ["8.8.8.8", "1.1.1.1"]]
    monkeypatch.setattr(
        "serving.hooks.requests.socket.getaddrinfo",
        lambda host, port, type: [(0, 0, 0, "", (one, port)) for one in answers.pop(0)],
    )
    hook = hook_to(receiver, url="https://hooks.example.org/")
    with pytest.raises(UnavailableError, match=r"is the private address 10\.0\.0\.1"):
        _checked(hook, "hooks.example.org", 443)
    assert str(_checked(hook, "hooks.example.org", 443)) == "8.8.8.8"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("10.0.0.1", False), ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False),
        ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False), ("::1", False), ("fe80::1", False),
        ("fc00::1", False), ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False), ("2002:a00:1::", False),
        ("2001:0:808:808:0:ffff:f5ff:fffe", False),
        ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True),
    ],
)  # fmt: skip
def test_private_addresses_are_known_in_all_their_forms(address: str, public: bool) -> None:
    import ipaddress

    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    "changes",
    [
        {"url": "ftp://example.org/"}, {"url": "https://"}, {"url": "/hook"}, {"url": "https://example.org:99999/"},
        {"url": "https://me:secret@example.org/"}, {"url": "http://example.org/hook"}, {"url": "https://a.org/\n"},
        {"url": "https://a.org/#part"}, {"name": "../key"}, {"name": ""}, {"kinds": ("created",)}, {"organisation": ""},
        {"secrt": "x"},
    ],
)  # fmt: skip
def test_a_hook_that_does_not_fit_is_refused_at_start(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        HookSettings(**{"name": "a", "url": "https://example.org/hook", "organisation": "o", **changes})
    assert "secret@" not in str(caught.value.errors(include_input=False))


def test_two_hooks_need_two_names(receiver: Receiver) -> None:
    with pytest.raises(ValidationError, match="one name"):
        ServingSettings(hooks=(hook_to(receiver), hook_to(receiver)))


def test_a_secret_may_lie_in_a_file_of_the_operator(store: Store, receiver: Receiver, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    hook = hook_to(receiver, secret_file=file)
    for text, words in ((None, "cannot be read"), (" \n", "is empty")):
        if text is not None:
            file.write_text(text)
        with pytest.raises(UnavailableError, match=words):
            send_test(store.home, hook)
    file.write_text("mine\n")
    assert secret_of(store.home, hook) == b"mine"


# ---------------------------------------------------------------- the command


def test_hooks_are_listed_and_tried_by_the_command(store: Store, receiver: Receiver, tmp_path: Path) -> None:
    from cluster.cli import app

    file = tmp_path / "relook.yaml"
    url = f"{receiver.url}?token=hidden"
    one = {"name": "clinic", "url": url, "organisation": "clinic-a"}
    file.write_text(json.dumps({"serving": {"hooks": [one]}, "records": {"home": str(store.home.root)}}))
    runner = CliRunner()
    done = runner.invoke(app, ["hooks", "test", "clinic", "--config", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(receiver.received[0][1])["kind"] == "test"
    listed = runner.invoke(app, ["hooks", "list", "--config", str(file), "--json"])
    assert json.loads(listed.stdout)["hooks"][0]["address"] == receiver.url
    assert "hidden" not in listed.output
    nobody = runner.invoke(app, ["hooks", "test", "nobody", "--config", str(file)])
    assert isinstance(nobody.exception, UnknownIdError)
    receiver.statuses = [404]
    refused = runner.invoke(app, ["hooks", "test", "clinic", "--config", str(file)])
    assert isinstance(refused.exception, UnavailableError)
    file.write_text(json.dumps({"serving": {"hooks": [{**one, "url": "http://example.org/"}]}}))
    http = runner.invoke(app, ["hooks", "list", "--config", str(file)])
    assert "needs https" in str(http.exception)
