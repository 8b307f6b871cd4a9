"""An incident from end to end with a planted blind spot, and everything that cannot be an incident.

The second of two devices shows melanomas in another way, and none of them is in the training data, so the first model
misses them. The tests of this file share one store and follow one another.
"""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from bench.drills import incident as drill
from cluster.cli import run
from cluster.gate.run import run_gate
from cluster.incidents.affected import find_affected, was_handled
from cluster.incidents.evidence import examine, limits_of
from cluster.incidents.figures import incident_report
from cluster.incidents.register import close_incident, open_incident
from cluster.promotion import caller_of, promote_model
from cluster.settings import Settings
from images.importer import import_folder
from records import audit
from records.bundles import Bundle, OperatingPoints
from records.datasets import load_dataset
from records.erasure import erase_images
from records.errors import AccessError, DataError, RefusedError, RelookError, TaxonomyError, UnknownIdError
from records.frames import Frame
from records.ids import new_id
from records.incidents import regression_cases
from records.lineage import trace
from records.models import serving_id
from records.store import Store, open_store
from records.types import (
    AuditEvent,
    Consent,
    DatasetRecord,
    Incident,
    IncidentPrediction,
    IncidentState,
    ModelStatus,
    Prediction,
    ReasonCode,
    ReviewItem,
    Scope,
)
from records.types.incidents import Criterion
from serving.access.keys import create_key
from serving.app import create_app
from serving.erasure import serving_places
from serving.events import events_of
from serving.rollout.control import begin

CASE, SITE = "mel", f"clinic {drill.BLIND}"


@dataclass
class World:
    """A store in which a trained model has predicted the images of a day."""

    store: Store
    settings: Settings
    folder: Path
    first: Bundle
    sent: list[drill.Sent] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    incident: Incident | None = None
    second: Bundle | None = None

    def open(self, **changes: Any) -> Incident:
        given = {"prediction": None, "image": None, "truth": CASE, "actor": "lead"}
        return open_incident(self.store, self.settings, **(given | changes))

    def of(self, device: str, truth: str, *, missed: bool = True) -> list[Prediction]:
        pairs = zip(self.sent, self.predictions, strict=True)
        found = [p for one, p in pairs if (one.device, one.truth) == (device, truth)]
        return [p for p in found if drill.was_handled(p, CASE) is not missed]

    def rows(self) -> int:
        with self.store.ledger.read() as tx:
            return sum(tx.count(kind) for kind in (Incident, IncidentPrediction, ReviewItem, AuditEvent))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("incident")
    settings = drill.settings_of(folder / "home")
    drill.write_training_data(folder / "data")
    store = open_store(settings.records)
    import_folder(store, folder / "data", frames=(Frame(drill.SIDE_PX),))
    first = drill.train(store, settings, folder / "run-1")
    promote_model(store, settings, first.id, provisional=True)
    sent = drill.images_of_the_day()
    yield World(store, settings, folder, first, sent, drill.predict(store, settings, sent))
    store.close()


@pytest.fixture(scope="module")
def opened(world: World) -> World:
    """The world after an incident was opened about its clearest miss."""
    world.incident = world.open(
        prediction=drill.first_missed(world.sent, world.predictions).id, note="found by a biopsy"
    )
    return world


@pytest.fixture(scope="module")
def learned(opened: World) -> World:
    """The world after annotators looked at what was found, and a model learned from them; it does not serve yet."""
    truths = {p.image_id: one.truth for one, p in zip(opened.sent, opened.predictions, strict=True)}
    drill.annotate(opened.store, truths)
    opened.second = drill.learn(opened.store, opened.settings, opened.folder / "run-2")
    return opened


# ---------------------------------------------------------------- what cannot be an incident


def test_the_planted_blind_spot_is_there(world: World) -> None:
    assert len(world.of(drill.BLIND, "mel")) >= 8
    assert len(world.of(drill.FAMILIAR, "mel", missed=False)) >= 8


def test_what_cannot_be_an_incident_is_a_sentence_and_changes_nothing(world: World) -> None:
    missed = drill.first_missed(world.sent, world.predictions)
    right = world.of(drill.FAMILIAR, "mel", missed=False)
    named = next(p for p in right if p.label == CASE)
    with world.store.ledger.read() as tx:
        imported = load_dataset(world.store, tx.find(DatasetRecord)[0].id).rows["image_id"][0]
    attempts: list[tuple[dict[str, Any], type[RelookError], str]] = [
        ({}, DataError, "name either a prediction"),
        ({"prediction": missed.id, "image": missed.image_id}, DataError, "name either a prediction"),
        ({"prediction": "f" * 32}, UnknownIdError, "no served prediction has the id"),
        ({"image": "f" * 64}, UnknownIdError, "no image has the id"),
        ({"image": imported}, UnknownIdError, "was served, so none missed it"),
        ({"prediction": missed.id, "truth": "melanoma!"}, TaxonomyError, "melanoma!"),
        ({"prediction": named.id}, RefusedError, "says mel itself"),
        ({"prediction": missed.id, "note": " "}, DataError, "the note or reason is empty"),
        ({"prediction": missed.id, "note": "a\x00b"}, DataError, "cannot be stored"),
        ({"prediction": missed.id, "then": "roll-back"}, RefusedError, "replaced no model"),
        ({"prediction": missed.id, "then": "block"}, RefusedError, "serves now; --then roll-back"),
    ]
    before = world.rows()
    for changes, kind, sentence in attempts:
        with pytest.raises(kind, match=sentence) as caught:
            world.open(**changes)
        assert "\n" not in str(caught.value)
    assert world.rows() == before


def test_an_image_that_was_erased_or_never_stored_has_no_incident(world: World) -> None:
    extra = drill.Sent(drill.image_of("mel", drill.BLIND, 1, seed=9), drill.BLIND, "mel")
    (erased,) = drill.predict(world.store, world.settings, [extra])
    erase_images(world.store, [erased.image_id], actor="test", places=serving_places(world.settings.serving))
    before = world.rows()
    with pytest.raises(RefusedError, match="was erased, so there is nothing to replay"):
        world.open(prediction=erased.id, truth="df")
    assert world.rows() == before
    unkept = erased.model_copy(update={"id": new_id(), "image_id": "e" * 64, "consent": Consent.NONE, "context": {}})
    with world.store.ledger.begin() as tx:
        tx.add(unkept)
    with pytest.raises(RefusedError, match="came without consent and was not stored"):
        world.open(prediction=unkept.id, truth="df")


def test_a_prediction_whose_bundle_is_gone_or_altered_has_no_incident(world: World) -> None:
    case, before = drill.first_missed(world.sent, world.predictions), world.rows()
    folder, aside = world.first.path, world.folder / "aside"
    folder.rename(aside)
    try:
        with pytest.raises(UnknownIdError, match=r"cannot be replayed, since the bundle of its model .* is gone"):
            world.open(prediction=case.id)
    finally:
        aside.rename(folder)
    document = folder / "bundle.json"
    text = document.read_text()
    document.write_text(text + " ")
    try:
        with pytest.raises(UnknownIdError, match="was altered"):
            world.open(prediction=case.id)
    finally:
        document.write_text(text)
    assert world.rows() == before


# ---------------------------------------------------------------- opened


def test_the_prediction_is_replayed_bit_for_bit_and_its_surroundings_are_kept(opened: World) -> None:
    assert opened.incident is not None
    evidence = opened.incident.evidence
    assert evidence["replay"]["is_same"], evidence["replay"]
    assert evidence["replay"]["largest_difference"] == 0.0
    limits = {limit["name"]: limit["short_by"] for limit in evidence["limits"]}
    assert limits["p(mel) for a referral"] > 0
    assert {"p(malignant) for a referral", "distance from the training images"} <= set(limits)
    assert set(evidence["maps"]) == {evidence["label"], CASE}
    assert len(evidence["neighbours"]) == 5
    assert CASE not in {one["label"] for one in evidence["neighbours"]}
    assert evidence["looked_at"] == evidence["looked_at_of"] >= len(opened.predictions)


def test_the_affected_predictions_are_found(opened: World) -> None:
    assert opened.incident is not None
    found = drill.compare(opened.store, opened.incident, opened.sent, opened.predictions)
    assert found.recall >= 0.9
    assert found.precision >= 0.6


def test_callers_are_told_and_annotators_asked_at_once(opened: World) -> None:
    assert opened.incident is not None
    with opened.store.ledger.read() as tx:
        rows = tx.find(IncidentPrediction, where={"incident_id": opened.incident.id})
        items = [item for item in tx.find(ReviewItem) if ReasonCode.INCIDENT in item.reasons]
    assert {item.image_id for item in items} == {row.image_id for row in rows}
    assert all(item.due is not None and item.priority >= 300 for item in items)
    told = [event for event in events_of(opened.store, SITE, None, 1000) if event.kind == "recalled"]
    elsewhere = events_of(opened.store, f"clinic {drill.FAMILIAR}", None, 1000)
    concerned = {row.prediction_id for row in rows}
    assert {event.prediction_id for event in [*told, *elsewhere]} == concerned
    assert opened.incident.prediction_id in {event.prediction_id for event in told}
    assert all(event.details["incident_id"] == opened.incident.id for event in told)
    assert events_of(opened.store, SITE, told[-1].id, 1000) == []


def test_it_is_opened_once(opened: World) -> None:
    assert opened.incident is not None
    before = opened.rows()
    with pytest.raises(RefusedError, match=f"incident {opened.incident.id} about this image is open since"):
        opened.open(prediction=opened.incident.prediction_id)
    with pytest.raises(RefusedError, match="is open since"):
        opened.open(image=opened.incident.image_id, truth="df")
    assert opened.rows() == before


def test_it_is_not_closed_without_proof(opened: World) -> None:
    assert opened.incident is not None
    name = opened.incident.id
    with pytest.raises(RefusedError, match="closed by a champion other than"):
        close_incident(opened.store, opened.settings, name, actor="lead")
    with pytest.raises(RefusedError, match="needs a key with the scope admin"):
        close_incident(opened.store, opened.settings, name, actor="lead", because="a mistake")
    _, weak = create_key(opened.store, name="app", organisation="a", scopes=[Scope.REVIEW], actor="test")
    caller = caller_of(opened.store, weak)
    with pytest.raises(AccessError, match="admin"):
        close_incident(opened.store, opened.settings, name, actor="x", caller=caller, because="a mistake")
    with pytest.raises(UnknownIdError, match="no incident has the id"):
        close_incident(opened.store, opened.settings, "f" * 32, actor="lead")
    with opened.store.ledger.read() as tx:
        assert tx.require(Incident, name).state is IncidentState.OPEN


def test_its_history_is_traced_and_audited(opened: World) -> None:
    assert opened.incident is not None
    steps = trace(opened.store, opened.incident.prediction_id).steps
    assert [step.text for step in steps if step.kind == "incident"] == [
        f"incident opened of model {opened.first.id[:12]}"
    ]
    with opened.store.ledger.read() as tx:
        (event,) = tx.find(AuditEvent, where={"action": "incident.opened"})
    assert (event.subject, event.actor) == (opened.incident.id, "lead")
    assert CASE not in json.dumps(event.details)


# ---------------------------------------------------------------- the next model


def test_a_model_that_still_misses_a_case_is_refused_by_the_gate(learned: World) -> None:
    with learned.store.ledger.read() as tx:
        dataset = tx.find(DatasetRecord, order_by=("-created_at",), limit=1)[0]
        audited = tx.count(AuditEvent, where={"action": "incident.case_added"})
    loaded = load_dataset(learned.store, dataset.id)
    report = run_gate(learned.store, learned.settings, learned.first, loaded, actor="test")
    assert report.verdict == "refuse"
    assert report.why.startswith("it misses ")
    assert "cases of the regression set: image" in report.why
    with learned.store.ledger.read() as tx:
        cases = regression_cases(tx)
        added = tx.count(AuditEvent, where={"action": "incident.case_added"})
    missed = {p.image_id for p in learned.of(drill.BLIND, "mel")}
    assert {case.truth for case in cases} == {CASE}
    assert {case.image_id for case in cases} <= missed
    assert len(cases) >= 0.9 * len(missed)
    assert added - audited == len(cases) - 1


def test_the_next_champion_passes_and_the_incident_is_closed_with_proof(learned: World) -> None:
    assert learned.second is not None
    assert learned.incident is not None
    promoted = drill.promote_all_the_same(learned.store, learned.settings, learned.second)
    (check,) = [check for check in promoted["gate"]["checks"] if check["name"] == "regression set"]
    assert check["outcome"] == "pass"
    closed = close_incident(learned.store, learned.settings, learned.incident.id[:12], actor="lead")
    assert closed.state is IncidentState.CLOSED
    assert closed.proof["model_id"] == learned.second.id
    assert len(closed.proof["cases"]) == check["lesions"]
    with pytest.raises(RefusedError, match="is closed since"):
        close_incident(learned.store, learned.settings, closed.id, actor="lead")
    with pytest.raises(RefusedError, match="about this image is closed since"):
        learned.open(prediction=closed.prediction_id)
    assert audit.verify(learned.store.ledger, learned.store.home) == []


# ---------------------------------------------------------------- pages, command, other endings


def test_the_pages_are_for_keys_that_see_every_organisation(learned: World) -> None:
    assert learned.incident is not None
    incident_report(learned.store, learned.settings.serving.audit_share)
    _, lead = create_key(learned.store, name="lead", organisation="a", scopes=[Scope.REVIEW], actor="test")
    _, app = create_key(learned.store, name="app", organisation="b", scopes=[Scope.PREDICT], actor="test")
    name = learned.incident.id

    async def read(token: str, *paths: str) -> list[httpx.Response]:
        service: Any = SimpleNamespace(store=learned.store, settings=learned.settings.serving)
        transport = httpx.ASGITransport(create_app(service))
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as http:
            return [await http.get(f"/v1/incidents{path}") for path in paths]

    paths = ("", f"/{name}", f"/{name}/page", "/report", f"/{'f' * 32}")
    listed, one, page, report, unknown = asyncio.run(read(lead, *paths))
    assert [entry["id"] for entry in listed.json()["items"]] == [name]
    body = one.json()
    assert (body["state"], body["truth"], body["prediction_id"]) == ("closed", CASE, learned.incident.prediction_id)
    assert len(body["predictions"]) == body["affected"] + 1
    assert "every probability has the same bits" in page.text
    assert page.text.count("data:image/png;base64") == 3 + 5, "the image, two heat maps and five training images"
    assert page.headers["content-security-policy"].startswith("sandbox")
    assert "Sensitivity and specificity" in report.text
    assert unknown.status_code == 404
    assert {response.status_code for response in asyncio.run(read(app, *paths))} == {403}


def test_the_command_lists_shows_and_reports(
    learned: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert learned.incident is not None
    monkeypatch.setenv("RELOOK_HOME", str(learned.store.home.root))

    def said(*arguments: str) -> dict[str, Any]:
        assert run(["incident", *arguments, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    (listed,) = said("list")["items"]
    shown = said("show", learned.incident.id, "--out", str(tmp_path / "page.html"))
    assert listed == {name: shown[name] for name in listed}
    assert shown["proof"]["model_id"] == listed["closed_by_model"]
    assert "Proof" in (tmp_path / "page.html").read_text()
    figures = said("report")["incidents"]
    assert [(one["by"], one["opened"], one["still_open"]) for one in figures] == [
        ("all", 1, 0),
        ("model", 1, 0),
        ("device", 1, 0),
    ]
    assert run(["incident", "show", learned.incident.id]) == 0
    assert "classifies or refers every case" in capsys.readouterr().out
    assert run(["incident", "open", "--truth", CASE, "--image", "f" * 64]) == 2


def test_a_model_is_taken_away_kept_away_and_comes_back_when_the_incident_was_a_mistake(
    learned: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert learned.second is not None
    store, settings, second = learned.store, learned.settings, learned.second.id
    assert serving_id_of(store) == second
    (prediction,) = drill.predict(store, settings, learned.sent[:1])
    before = len(cases_of(store))
    monkeypatch.setenv("RELOOK_HOME", str(store.home.root))
    arguments = ["incident", "open", "--prediction", prediction.id, "--truth", "df", "--then", "roll-back", "--json"]
    for scope, code in ((Scope.REVIEW, 2), (Scope.ADMIN, 0)):
        _, token = create_key(store, name=f"key-{scope}", organisation="a", scopes=[scope], actor="test")
        monkeypatch.setenv("RELOOK_KEY", token)
        capsys.readouterr()
        assert run(arguments) == code
    shown = json.loads(capsys.readouterr().out)
    with store.ledger.read() as tx:
        incident = tx.require(Incident, shown["id"])
    assert serving_id_of(store) == learned.first.id
    assert len(cases_of(store)) == before + 1
    with pytest.raises(RefusedError, match=f"kept from serving by incident {incident.id}"):
        promote_model(store, settings, second, provisional=True)
    with pytest.raises(RefusedError, match="kept from serving by incident"):
        begin(store, second, 5, actor="test", reason="all the same")
    _, token = create_key(store, name="chief", organisation="a", scopes=[Scope.ADMIN], actor="test")
    admin = caller_of(store, token)
    closed = close_incident(
        store, settings, incident.id, actor="chief", caller=admin, because="the biopsy was mixed up"
    )
    assert (closed.state, closed.why) == (IncidentState.WITHDRAWN, "the biopsy was mixed up")
    assert len(cases_of(store)) == before
    assert promote_model(store, settings, second, provisional=True)["status"] == ModelStatus.PROVISIONAL


def test_a_model_that_does_not_serve_is_blocked(learned: World) -> None:
    other = next(p for p in learned.of(drill.FAMILIAR, "vasc", missed=False) + learned.of(drill.FAMILIAR, "vasc"))
    with pytest.raises(RefusedError, match="does not serve now; --then block"):
        learned.open(prediction=other.id, truth="df", then="roll-back")
    learned.open(prediction=other.id, truth="df", then="block")
    with pytest.raises(RefusedError, match="kept from serving by incident"):
        promote_model(learned.store, learned.settings, learned.first.id, provisional=True)


def test_limits_that_a_model_lacks_are_not_listed(world: World) -> None:
    taxonomy = world.first.document.taxonomy
    few = OperatingPoints(refer={}, refer_malignant=None, urgent_threshold=None, conformal_thresholds={})
    bundle: Any = SimpleNamespace(document=world.first.document.model_copy(update={"operating": few}))
    nothing: Any = SimpleNamespace(confidence=None, suitability=SimpleNamespace(ood_score=None, quality_score=None))
    even = np.full(len(taxonomy.codes), 1 / len(taxonomy.codes))
    settings = world.settings.serving
    assert limits_of(bundle, settings, even, nothing, CASE) == []
    assert limits_of(world.first, settings, even, nothing, CASE)
    assert limits_of(world.first, settings, np.full_like(even, np.nan), nothing, CASE) == []


def test_another_prediction_of_the_same_image_is_always_affected(world: World) -> None:
    (first, second) = drill.predict(world.store, world.settings, [world.sent[0], world.sent[0]])
    seen = examine(world.store, world.settings.serving, first, CASE)
    case = first.model_copy(update={"probabilities": None, "label": "df", "context": {}})
    found, _, _ = find_affected(world.store, case, CASE, replace(seen, reach=None))
    alike = {one.prediction.id: one.criteria for one in found}
    if not was_handled(second, CASE):
        assert Criterion.IMAGE in alike[second.id]
    assert all(Criterion.NEIGHBOURHOOD not in criteria for criteria in alike.values()), "the model has no checks"


def test_an_erasure_takes_the_case_out_of_everything(learned: World) -> None:
    assert learned.incident is not None
    from serving.incidents.page import incident_html

    store, case = learned.store, learned.incident
    before = len(cases_of(store))
    erase_images(store, [case.image_id], actor="test", places=serving_places(learned.settings.serving))
    with store.ledger.read() as tx:
        incident = tx.require(Incident, case.id)
    assert (incident.truth, incident.note, incident.evidence) == ("", None, {})
    assert len(cases_of(store)) == before - 1
    assert "The image was erased" in incident_html(store, case.id)


def serving_id_of(store: Store) -> str | None:
    with store.ledger.read() as tx:
        return serving_id(tx)


def cases_of(store: Store) -> list[IncidentPrediction]:
    with store.ledger.read() as tx:
        return regression_cases(tx)
