"""Verbs that race, whose response is lost, or that are sent again: each acts once."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest

from cluster.promotion import promote_model
from cluster.settings import Settings
from records.errors import RelookError, UnavailableError
from records.ids import utc_now
from records.models import current_rollout
from records.settings import RecordsSettings
from records.store import open_store
from records.types import FlagReason, Rollout, RolloutStage
from serving.access.keys import admin_token
from serving.client import Client
from serving.rollout.control import add_counts, begin, promote, roll_back, undo_promotion
from serving.schemas import FlagRequest, OutcomeRequest, RolloutRequest, UndoRequest
from tests.security.rollouts import VIOLATED, Models, at_once
from tests.unreliable import unreliable_way

ENDINGS = ("model.champion", "rollout.rolled_back")

# ---------------------------------------------------------------- racing


@pytest.mark.parametrize("turn", range(4))
def test_racing_ends_of_one_rollout_have_one_outcome(models: Models, turn: int) -> None:
    """Two services on one database: promotion, rollbacks and a guardrail at the same moment."""
    rollout = begin(models.store, models.a, 10, actor="test")
    with closing(open_store(RecordsSettings(home=models.home))) as other:
        at_once(
            lambda: promote(models.store, rollout.id, models.a, actor="1"),
            lambda: roll_back(other, rollout.id, actor="2", why="by hand"),
            lambda: add_counts(models.store, rollout.id, VIOLATED),
            lambda: roll_back(other, rollout.id, actor="3", why="again"),
            lambda: promote(other, rollout.id, models.a, actor="4"),
            offset=turn,
        )
    endings = [action for action in models.actions() if action in ENDINGS]
    ended = models.rollout(rollout.id)
    assert len(endings) == 1
    assert endings == (["model.champion"] if ended.stage is RolloutStage.PROMOTED else ["rollout.rolled_back"])
    assert models.serving() == (models.a if ended.stage is RolloutStage.PROMOTED else models.champion)


def test_racing_starts_begin_one_rollout(models: Models) -> None:
    with closing(open_store(RecordsSettings(home=models.home))) as other:
        results = at_once(
            lambda: begin(models.store, models.a, 10, actor="1", champion_id=models.champion),
            lambda: begin(other, models.b, 10, actor="2", champion_id=models.champion),
            lambda: promote_model(other, Settings(), models.b, provisional=True),
        )
    assert len([result for result in results if isinstance(result, Exception)]) == 2
    with models.store.ledger.read() as tx:
        assert tx.count(Rollout) == (current_rollout(tx) is not None)
    assert models.actions().count("rollout.canary") + models.actions().count("model.provisional") == 1


def test_racing_undos_take_one_champion_away(models: Models) -> None:
    models.promote_directly(models.a)
    models.promote_directly(models.b)
    with closing(open_store(RecordsSettings(home=models.home))) as other:
        results = at_once(
            lambda: undo_promotion(models.store, models.b, models.a, actor="1", why="bad"),
            lambda: undo_promotion(other, models.b, models.a, actor="2", why="bad"),
            lambda: undo_promotion(other, models.a, models.champion, actor="3", why="not its turn"),
        )
    done = [result for result in results if not isinstance(result, Exception)]
    assert models.actions().count("model.promotion_undone") == len(done)
    # The third may follow the first, since it names what serves then; nothing is undone twice.
    assert models.serving() == (models.a if len(done) == 1 else models.champion)


# ---------------------------------------------------------------- the client


def test_a_lost_response_never_starts_moves_promotes_or_undoes_twice(models: Models, http: httpx.Client) -> None:
    port, token = http.base_url.port, admin_token(models.store.home)
    assert port is not None

    def lost(call: Callable[[Client], object]) -> None:
        with (
            unreliable_way(port, cuts=1) as way,
            Client(f"http://127.0.0.1:{way}", token) as client,
            pytest.raises(UnavailableError, match="may have been processed"),
        ):
            call(client)

    lost(lambda client: client.roll_out(RolloutRequest(model=models.a, percent=10)))
    with models.store.ledger.read() as tx:
        (started,) = tx.find(Rollout)
    lost(lambda client: client.roll_out(RolloutRequest(model=models.a, percent=50, rollout=started.id)))
    assert models.rollout(started.id).percent == 50
    with unreliable_way(port, cuts=2) as way, Client(f"http://127.0.0.1:{way}", token) as client:
        # Ended by the first attempt; the third reports it.
        assert client.roll_back(started.id, "enough").why == "enough"
    assert models.serving() == models.champion
    models.promote_directly(models.b)
    undo = UndoRequest(back_to=models.champion, reason="bad")
    lost(lambda client: client.undo_promotion(models.b, undo))
    assert models.serving() == models.champion
    assert models.actions().count("model.promotion_undone") == 1


IDEMPOTENT: dict[str, Callable[[Client], object]] = {
    "predict": lambda client: client.predict(b"x"),
    "predict_many": lambda client: client.predict_many([b"x"]),
    "prediction": lambda client: client.prediction("1"),
    "explain_image": lambda client: client.explain_image(b"x"),
    "erase": lambda client: client.erase("1"),
    "flag": lambda client: client.flag("1", FlagRequest(reason=FlagReason.UNSURE)),
    "outcome": lambda client: client.outcome(
        "1", OutcomeRequest(diagnosis="nv", confirmation="histopathology", observed_at=utc_now())
    ),
    "rollout": lambda client: client.rollout(),
    "roll_back": lambda client: client.roll_back("0" * 32, "x"),
}
NOT_IDEMPOTENT: dict[str, Callable[[Client], object]] = {
    "start": lambda client: client.roll_out(RolloutRequest(model="0" * 64)),
    "move": lambda client: client.roll_out(RolloutRequest(model="0" * 64, rollout="0" * 32, percent=5)),
    "undo_promotion": lambda client: client.undo_promotion("0" * 64, UndoRequest(back_to="1" * 64, reason="x")),
}


@pytest.mark.parametrize("name", [*IDEMPOTENT, *NOT_IDEMPOTENT])
@pytest.mark.parametrize("way", ["no response", "503"])
def test_only_what_changes_nothing_the_second_time_is_sent_again(name: str, way: str) -> None:
    call = (IDEMPOTENT | NOT_IDEMPOTENT)[name]
    with (
        _deaf_service(b"" if way == "no response" else _BUSY) as (port, requests),
        Client(f"http://127.0.0.1:{port}", retry_s=0.5) as client,
        pytest.raises(RelookError),
    ):
        call(client)
    assert (len(requests) > 1) is (name in IDEMPOTENT)


def test_a_request_that_no_service_got_is_sent_again(tools: Any) -> None:
    port, seen = tools.free_port(), list[bytes]()

    def answer_later() -> None:
        with socket.create_server(("127.0.0.1", port)) as listening, listening.accept()[0] as near:
            seen.append(near.recv(1 << 16))

    timer = threading.Timer(0.3, answer_later)
    timer.start()
    with Client(f"http://127.0.0.1:{port}", retry_s=60) as client, pytest.raises(UnavailableError):
        client.undo_promotion("0" * 64, UndoRequest(back_to="1" * 64, reason="x"))
    timer.join(timeout=600)
    assert len(seen) == 1


# ---------------------------------------------------------------- helpers

_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextmanager
def _deaf_service(response: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Read every request, send the same response or none, and close the connection."""
    listening, requests = socket.create_server(("127.0.0.1", 0)), list[bytes]()

    def serve() -> None:
        while True:
            try:
                near, _ = listening.accept()
            except OSError:
                return
            with near:
                requests.append(near.recv(1 << 16))
                near.sendall(response)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1], requests
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(timeout=5)
