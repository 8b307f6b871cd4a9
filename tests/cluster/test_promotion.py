"""Who may promote: not the person who started the round, and against the gate only an admin with a reason."""

from pathlib import Path

import pytest

from cluster import promotion
from cluster.gate import GateReport, Verdict
from cluster.promotion import caller_of, promote_model
from cluster.settings import RoundSettings, Settings
from images.importer import import_folder
from images.synth import synthesize
from records import audit
from records.bundles import Bundle
from records.errors import AccessError, RefusedError
from records.frames import Frame
from records.ids import new_id, utc_now
from records.models import register
from records.store import Store
from records.types import AuditEvent, ModelRecord, RoundRecord, Scope
from serving.access.keys import create_key
from trainers.fitting.fit import fit
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings


@pytest.fixture
def bundle(store: Store, tmp_path: Path) -> Bundle:
    """A small model from round 1, which `anna` started."""
    from records.datasets import load_dataset

    synthesize(tmp_path / "images", lesions=90, seed=1, width_px=80)
    dataset = load_dataset(store, import_folder(store, tmp_path / "images", frames=(Frame(32),)).dataset_id)
    settings = TrainersSettings(
        model=ModelSettings(name="custom_cnn", side_px=32),
        epochs=1,
        precision="fp32",
        workers=WorkersSettings(threads=1),
    )
    made = fit(store, settings, dataset, run_dir=tmp_path / "run", use_ray=False)
    record = RoundRecord(id=new_id(), number=1, started_at=utc_now(), seed=0, settings_hash="")
    with store.ledger.begin() as tx:
        register(tx, made, round_number=1)
        tx.add(record)
        audit.append(tx, actor="anna", action="round.started", subject=record.id)
    return made


def refusing(*_: object, **__: object) -> GateReport:
    return GateReport(
        verdict=Verdict.REFUSE,
        why="it misses too many",
        challenger="x",
        champion=None,
        images=1,
        lesions=1,
        key_lesions=0,
        balanced_accuracy=0.5,
        checks=[],
    )


def test_promotions_by_persons(store: Store, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    clinical = Settings(round=RoundSettings(approval="person"))
    with pytest.raises(RefusedError, match="needs somebody's key with the scope approve"):
        promote_model(store, clinical, bundle.id, provisional=True)
    ben, approver = create_key(store, name="ben", organisation="a", scopes=[Scope.APPROVE], actor="test")
    by = promote_model(store, clinical, bundle.id, provisional=True, caller=caller_of(store, approver))["by"]
    assert by == f"key {ben.id}"

    monkeypatch.setattr(promotion, "run_gate", refusing)
    with pytest.raises(RefusedError, match="the gate says refuse: it misses too many"):
        promote_model(store, Settings(), bundle.id)
    with pytest.raises(RefusedError, match="needs a key with the scope admin"):
        promote_model(store, Settings(), bundle.id, forced_because="urgent")
    _, weak = create_key(store, name="app", organisation="a", scopes=[Scope.PREDICT], actor="test")
    with pytest.raises(AccessError):
        promote_model(store, Settings(), bundle.id, forced_because="urgent", caller=caller_of(store, weak))
    key, strong = create_key(store, name="chief", organisation="a", scopes=[Scope.ADMIN], actor="test")
    admin = caller_of(store, strong)
    with pytest.raises(RefusedError, match="needs a reason"):
        promote_model(store, Settings(), bundle.id, forced_because=" ", caller=admin)
    done = promote_model(store, Settings(), bundle.id, forced_because="the old one is broken", caller=admin)
    assert (done["status"], done["forced"], done["by"]) == ("champion", True, f"key {key.id}")
    with store.ledger.read() as tx:
        (event,) = tx.find(AuditEvent, where={"action": "model.champion"})
        assert tx.require(ModelRecord, bundle.id).status == "champion"
    assert event.details["forced_because"] == "the old one is broken"
    record = (store.home.runs / "changes" / f"{bundle.id}.json").read_text()
    assert '"forced_because": "the old one is broken"' in record
    assert '"train_provenance"' in record
