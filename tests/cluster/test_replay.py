"""A replay of a round from its manifest gives the same results."""

import json
from collections.abc import Iterator

import pytest

from cluster.gate import GateReport
from cluster.gate.run import count_looks
from cluster.provenance import manifest_file, round_folder
from cluster.replay import TOLERANCE, replay_round
from cluster.round import run_round
from cluster.settings import RoundSettings, Settings
from images.importer import import_folder
from images.synth import synthesize
from records.errors import IntegrityError, RefusedError, UnknownIdError
from records.frames import Frame
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import AuditEvent, ModelRecord, RoundStep
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings

# Importing Ray raises its own deprecation warnings; a round uses Ray if another test's session is running.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")]


@pytest.fixture(scope="module", params=["fp32", pytest.param("bf16", marks=pytest.mark.soak)])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, str]]:
    """A small finished round and its precision, run in this process without Ray."""
    folder = tmp_path_factory.mktemp("replay")
    settings = Settings(
        records=RecordsSettings(home=folder / "home"),
        trainers=TrainersSettings(
            model=ModelSettings(name="custom_cnn", side_px=32),
            epochs=2,
            context=True,
            views=2,
            precision=request.param,
            workers=WorkersSettings(threads=1),
        ),
        round=RoundSettings(tune="never", select_budget=0),
    )
    patch = pytest.MonkeyPatch()
    for module in ("cluster.round_steps", "cluster.replay"):
        patch.setattr(f"{module}.ray_is_running", lambda: False)
    synthesize(folder / "images", lesions=140, seed=3, width_px=96)
    store = open_store(settings.records)
    import_folder(store, folder / "images", frames=(Frame(32),))
    run_round(store, settings, started_by="test")
    yield store, request.param
    patch.undo()
    store.close()


def test_the_metrics_are_the_same(finished: tuple[Store, str]) -> None:
    store, precision = finished
    with store.ledger.read() as tx:
        before = tx.count(ModelRecord), tx.count(AuditEvent, where={"action": "round.started"})
    found = replay_round(store, 1)
    assert found.precision == precision
    assert set(found.differences) == {"balanced_accuracy", "accuracy", "macro_auc", "ece"}
    assert TOLERANCE == {"fp32": 0.0, "bf16": 1e-3}
    assert all(value is not None and abs(value) <= TOLERANCE[precision] for value in found.differences.values())
    assert found.within_tolerance
    assert found.other_packages == {}
    if precision == "fp32":
        assert found.same_model
        assert set(found.differences.values()) == {0.0}
    with store.ledger.read() as tx:
        after = tx.count(ModelRecord), tx.count(AuditEvent, where={"action": "round.started"})
        assert tx.count(AuditEvent, where={"actor": "replay of round 1"}) == 1
    assert after == before == (1, 1)


def test_readings_of_gate_and_test_are_counted_in_the_report(finished: tuple[Store, str]) -> None:
    store, _ = finished
    with store.ledger.read() as tx:
        (gate,) = tx.find(RoundStep, where={"step": "gate"})
        replays = tx.count(AuditEvent, where={"action": "test.read", "actor": "replay of round 1"})
    looks = GateReport.model_validate(gate.result).looks
    now = count_looks(store)
    assert looks["gate"] == now["gate"] >= 1
    assert looks["test"] + replays == now["test"] > replays


@pytest.mark.parametrize("finished", ["fp32"], indirect=True)
def test_a_different_result_is_reported(finished: tuple[Store, str]) -> None:
    store, _ = finished
    path = manifest_file(round_folder(store.home, 1))
    kept = path.read_text()
    document = json.loads(kept)
    document["result"]["test"]["macro_auc"] += 0.01
    document["packages"]["torch"] = "0.1"
    path.write_text(json.dumps(document))
    try:
        found = replay_round(store, 1)
    finally:
        path.write_text(kept)
    assert not found.within_tolerance
    assert found.differences["macro_auc"] == pytest.approx(-0.01, abs=2e-3)
    assert found.other_packages["torch"][0] == "0.1"


@pytest.mark.parametrize("finished", ["fp32"], indirect=True)
def test_a_round_that_cannot_be_replayed_is_an_error(finished: tuple[Store, str]) -> None:
    store, _ = finished
    with pytest.raises(UnknownIdError, match="no round has the number 7"):
        replay_round(store, 7)
    unfinished = round_folder(store.home, 2)
    unfinished.mkdir()
    document = json.loads(manifest_file(round_folder(store.home, 1)).read_text())
    manifest_file(unfinished).write_text(json.dumps(document | {"result": None}))
    with pytest.raises(RefusedError, match="round 2 has not ended"):
        replay_round(store, 2)
    manifest_file(unfinished).write_text("{")
    with pytest.raises(IntegrityError, match="not the manifest of a round"):
        replay_round(store, 2)
    manifest_file(unfinished).unlink()
    unfinished.rmdir()
