"""Models, rounds and callers over real HTTP: stored figures, and only for callers with a key."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from records.errors import AccessError, UnknownIdError
from records.ids import new_id, utc_now
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import RoundRecord, RoundStep, Scope
from serving.access.keys import CACHE_S, admin_token, create_key
from serving.client import Client
from serving.schemas import OutcomeRequest
from serving.settings import ServingSettings
from tests.serving.label_values import measured_labels, round_value

SCORES = [
    {"low": 0.5, "high": 0.6, "lesions": 4, "right": 1},
    {"low": 0.9, "high": 1.0, "lesions": 20, "right": 20},
]


@pytest.fixture
def served(tmp_path: Any, tools: Any) -> Iterator[tuple[Store, str, str]]:
    """A store, the id of its champion, and the address of its service."""
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    bundle = tools.make_bundle(store, 0, metrics={"calibration": {"scores": SCORES}})
    tools.serve_bundle(store, bundle)
    with tools.run_service(store, ServingSettings(port=tools.free_port(), page=False)) as running:
        yield store, bundle.id, running.url
    store.close()


def test_a_model_lists_how_often_its_scores_were_right(served: tuple[Store, str, str]) -> None:
    store, model_id, url = served
    with Client(url, retry_s=0.0) as client:
        found = client.model_details(model_id)
        with pytest.raises(UnknownIdError, match="no model"):
            client.model_details("0" * 64)
        with pytest.raises(UnknownIdError, match="no report"):
            client.report(model_id)
        assert not found.has_report
        folder = store.home.bundles / model_id / "report"
        folder.mkdir()
        (folder / "report.html").write_text("<h1>A report</h1>")
        assert client.model_details(model_id).has_report
        assert client.report(model_id) == "<h1>A report</h1>"
    assert [band.model_dump(exclude={"right_ci"}) for band in found.scores] == SCORES
    # Clopper-Pearson by hand: the lower end of 20 of 20 is 0.025 ** (1 / 20).
    assert found.scores[1].right_ci == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    assert (found.status, found.promise) == ("champion", 0.9)
    assert found.refer == {"mel": 0.2, "malignant": 0.4}
    answered = httpx.get(f"{url}/v1/models/{model_id}/report", trust_env=False)
    assert answered.headers["content-security-policy"].startswith("sandbox; default-src 'none'")


def test_rounds_show_stored_results(served: tuple[Store, str, str]) -> None:
    store, model_id, url = served
    record = RoundRecord(
        id=new_id(), number=1, started_at=utc_now(), seed=0, settings_hash="s", model_id=model_id, verdict="promote",
        why="it is better",
    )  # fmt: skip
    begun = RoundRecord(id=new_id(), number=2, started_at=utc_now(), seed=0, settings_hash="s")
    test = {"lesions": 30, "balanced_accuracy": 0.6, "balanced_accuracy_ci": [0.5, 0.7], "key_class": None}
    steps = {"version": {"dataset_id": "d", "images": 90, "labels_from_annotators": 7}, "evaluate": {"test": test}}
    with store.ledger.begin() as tx:
        tx.add(record, begun)
        for name, result in steps.items():
            now = utc_now()
            step = RoundStep(id=new_id(), round_id=record.id, step=name, started_at=now, finished_at=now, result=result)
            tx.add(step)
    with Client(url, retry_s=0.0) as client:
        first, second = client.rounds().items
    assert (first.labels_from_annotators, first.balanced_accuracy, first.balanced_accuracy_ci) == (7, 0.6, (0.5, 0.7))
    assert (first.dataset_id, first.images, first.lesions, first.verdict) == ("d", 90, 30, "promote")
    assert (second.number, second.labels_from_annotators, second.balanced_accuracy, second.verdict) == (
        2,
        None,
        None,
        None,
    )


def test_the_newest_value_of_labels_is_returned(served: tuple[Store, str, str]) -> None:
    store, _, url = served
    with Client(url, retry_s=0.0) as client:
        with pytest.raises(UnknownIdError, match="run `relook labels value`"):
            client.label_value()
        with store.ledger.begin() as tx:
            tx.add(measured_labels())
        assert client.label_value().last_round is None
        newest = measured_labels(round_value())
        with store.ledger.begin() as tx:
            tx.add(newest)
        found = client.label_value()
    assert found.created_at == newest.created_at
    assert (found.labels, found.curve[-1][0], found.curve[-1][1].value) == (720, 720, 0.6)
    assert [one.recall.value for one in found.classes] == [0.5, None]
    assert found.last_round is not None
    assert found.last_round.changed == {"nv -> mel": 3}


def test_a_caller_can_read_their_identity_and_a_stranger_cannot(served: tuple[Store, str, str]) -> None:
    store, _, url = served
    with Client(url, retry_s=0.0) as client:
        assert client.caller().id == "local"
        assert Scope.ADMIN not in client.caller().scopes
    _, token = create_key(store, name="ward", organisation="clinic", scopes=[Scope.PREDICT], actor="test")
    time.sleep(CACHE_S)
    with Client(url, token, retry_s=0.0) as client:
        assert (client.caller().organisation, client.caller().scopes) == ("clinic", [Scope.PREDICT])
    with Client(url, admin_token(store.home), retry_s=0.0) as client:
        assert Scope.ADMIN in client.caller().scopes


def test_without_a_key_routes_are_refused_once_keys_exist(served: tuple[Store, str, str]) -> None:
    store, model_id, url = served
    create_key(store, name="ward", organisation="clinic", scopes=[Scope.PREDICT], actor="test")
    time.sleep(CACHE_S)
    with Client(url, retry_s=0.0) as client:
        for ask in (client.caller, client.rounds, client.label_value, lambda: client.model_details(model_id)):
            with pytest.raises(AccessError):
                ask()


def test_events_of_named_predictions_only(served: tuple[Store, str, str], make_image: Callable[..., bytes]) -> None:
    _, _, url = served
    with Client(url, retry_s=0.0) as client:
        ids = [client.predict(make_image(number)).id for number in (50, 51, 52)]
        request = OutcomeRequest(diagnosis="mel", confirmation="follow_up", observed_at=utc_now())
        for prediction_id in ids:
            client.outcome(prediction_id, request)
        assert {event.prediction_id for event in client.events().items} == set(ids)
        assert [event.prediction_id for event in client.events(prediction_ids=ids[1:2]).items] == [ids[1]]
        assert client.events(prediction_ids=["0" * 32]).items == []
