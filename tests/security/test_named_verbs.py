"""Verbs act on the rollout or model that they name: late and repeated calls never take another one away."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from cluster import promotion, round_steps
from cluster.cli import app
from cluster.gate import GateReport, Verdict
from cluster.promotion import promote_model
from cluster.round_steps import RoundContext
from cluster.settings import Settings
from images.importer import import_folder
from images.synth import synthesize
from records.errors import RefusedError, RelookError, UnknownIdError, UserError
from records.frames import Frame
from records.ids import new_id, utc_now
from records.types import ModelRecord, ModelStatus, RolloutStage, RoundRecord
from serving.access.keys import admin_token
from serving.page.api import PageApi
from serving.page.models import ModelHandlers, Seen
from serving.rollout.candidate import CandidateOutput, CandidateRows, CandidateRunner
from serving.rollout.control import add_counts, begin, promote, roll_back, roll_out, undo_promotion
from serving.settings import ServingSettings
from tests.security.rollouts import VIOLATED, Models

# ---------------------------------------------------------------- over HTTP


def test_only_the_named_rollout_ends_and_a_second_delete_changes_nothing(models: Models, http: httpx.Client) -> None:
    rollout = http.post("/v1/rollout", json={"model": models.a, "champion": models.champion}).json()
    assert http.delete("/v1/rollout").status_code == 422
    unknown = http.delete("/v1/rollout", params={"rollout": "0" * 32})
    assert (unknown.status_code, rollout["id"] in unknown.json()["detail"]) == (404, True)
    first, second = (http.delete("/v1/rollout", params={"rollout": rollout["id"]}) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json() == second.json()
    assert first.json()["stage"] == "rolled_back"
    assert models.serving() == models.champion
    assert models.actions().count("rollout.rolled_back") == 1


def test_a_promoted_champion_is_not_taken_away_by_repeated_deletes_of_its_rollout(
    models: Models, http: httpx.Client
) -> None:
    rollout = http.post("/v1/rollout", json={"model": models.a}).json()["id"]
    for _ in range(2):
        promoted = http.post("/v1/rollout", json={"model": models.a, "rollout": rollout, "percent": 100})
        assert (promoted.status_code, promoted.json()["stage"]) == (200, "promoted")
    for _ in range(2):
        refused = http.delete("/v1/rollout", params={"rollout": rollout})
        assert (refused.status_code, "undo-promotion" in refused.json()["detail"]) == (409, True)
    assert models.serving() == models.a
    assert models.actions().count("model.champion") == 1


def test_a_post_for_one_model_never_moves_or_promotes_another(models: Models, http: httpx.Client) -> None:
    started = http.post("/v1/rollout", json={"model": models.b, "percent": 10}).json()
    for body in (
        {"model": models.a, "percent": 100},
        {"model": models.a, "percent": 50},
        {"model": models.b, "percent": 100},
        {"model": models.a, "percent": 100, "rollout": started["id"]},
        {"model": models.a, "percent": 0, "rollout": started["id"]},
        {"model": models.b, "percent": 20, "rollout": started["id"], "champion": models.a},
    ):
        assert http.post("/v1/rollout", json=body).status_code == 409, body
    assert models.serving() == models.champion
    assert models.rollout(started["id"]).percent == 10
    assert started["id"] in http.post("/v1/rollout", json={"model": models.a}).json()["detail"]


def test_what_names_an_ended_rollout_changes_neither_the_champion_nor_the_next_rollout(
    models: Models, http: httpx.Client
) -> None:
    ended = http.post("/v1/rollout", json={"model": models.a, "percent": 10}).json()["id"]
    http.delete("/v1/rollout", params={"rollout": ended})
    again = http.post("/v1/rollout", json={"model": models.a, "percent": 5, "reason": "once more"}).json()["id"]
    for percent in (0, 50, 100):
        late = http.post("/v1/rollout", json={"model": models.a, "rollout": ended, "percent": percent})
        assert (late.status_code, again in late.json()["detail"]) == (409, True)
    http.delete("/v1/rollout", params={"rollout": ended})
    assert models.rollout(again).stage is RolloutStage.CANARY
    assert models.rollout(again).percent == 5
    assert models.serving() == models.champion


def test_a_start_is_refused_where_another_model_serves_than_it_expects(models: Models, http: httpx.Client) -> None:
    models.promote_directly(models.b)
    refused = http.post("/v1/rollout", json={"model": models.a, "champion": models.champion})
    assert (refused.status_code, models.b[:12] in refused.json()["detail"]) == (409, True)
    assert http.get("/v1/rollout").status_code == 404
    assert http.post("/v1/rollout", json={"model": models.a, "champion": models.b[:12]}).status_code == 200
    # A role is whatever has it now, and a path is the server's: neither names a model.
    for name in ("candidate", "champion", "../bundles", models.a[:7]):
        assert http.post("/v1/rollout", json={"model": name}).status_code == 422, name


def test_undoing_a_promotion_is_an_operation_of_its_own_that_names_both_models(
    models: Models, http: httpx.Client
) -> None:
    models.promote_directly(models.a)
    path, body = f"/v1/models/{models.a}/undo-promotion", {"back_to": models.champion, "reason": "complaints"}
    assert httpx.post(f"{http.base_url}{path}", json=body, trust_env=False).status_code == 403
    assert http.post(path, json={"back_to": models.champion}).status_code == 422
    assert http.post(path, json=body | {"back_to": models.b}).status_code == 409
    assert http.post(f"/v1/models/{models.b}/undo-promotion", json=body).status_code == 409
    assert models.serving() == models.a
    done = http.post(path, json=body)
    assert (done.status_code, done.json()["id"], done.json()["status"]) == (200, models.champion, "champion")
    second = http.post(path, json=body)
    assert (second.status_code, models.champion[:12] in second.json()["detail"]) == (409, True)
    assert models.serving() == models.champion


# ---------------------------------------------------------------- undo


def test_a_plain_promotion_is_undone_once_and_only_while_it_is_the_one_that_serves(models: Models) -> None:
    done = promote_model(models.store, Settings(), models.a, provisional=True)
    assert done["replaces"] == models.champion
    models.promote_directly(models.b)
    with pytest.raises(RefusedError, match="serves now"):
        undo_promotion(models.store, models.a, models.champion, actor="test", why="late")
    with pytest.raises(RefusedError, match="replaced"):
        undo_promotion(models.store, models.b, models.champion, actor="test", why="skips one")
    # Back along the way that it came, each with the status that it had.
    assert undo_promotion(models.store, models.b, models.a, actor="test", why="bad").status is ModelStatus.PROVISIONAL
    assert undo_promotion(models.store, models.a, models.champion, actor="test", why="bad").id == models.champion
    assert [models.status(m) for m in (models.champion, models.a, models.b)] == ["champion", "refused", "refused"]
    with pytest.raises(RefusedError, match="replaced no model"):
        undo_promotion(models.store, models.champion, models.a, actor="test", why="further")


def test_a_model_that_was_taken_away_does_not_come_back_by_an_undo(models: Models) -> None:
    models.promote_directly(models.a)
    undo_promotion(models.store, models.a, models.champion, actor="test", why="bad")
    models.candidates_again()
    models.promote_directly(models.a)
    models.promote_directly(models.b)
    with models.store.ledger.begin() as tx:
        tx.update(ModelRecord, models.a, status=ModelStatus.REFUSED)
    with pytest.raises(RefusedError, match="refused by now"):
        undo_promotion(models.store, models.b, models.a, actor="test", why="worse")
    assert models.serving() == models.b


def test_no_champion_changes_under_a_rollout_in_progress(models: Models) -> None:
    models.promote_directly(models.b)
    rollout = begin(models.store, models.a, 10, actor="test")
    with pytest.raises(RefusedError, match=rollout.id):
        promote_model(models.store, Settings(), models.champion, provisional=True)
    with pytest.raises(RefusedError, match=rollout.id):
        undo_promotion(models.store, models.b, models.champion, actor="test", why="bad")
    assert models.serving() == models.b
    promote(models.store, rollout.id, models.a, actor="test")
    undo_promotion(models.store, models.a, models.b, actor="test", why="bad")
    assert models.rollout(rollout.id).stage is RolloutStage.ROLLED_BACK
    with pytest.raises(RefusedError, match="has ended"):
        promote(models.store, rollout.id, models.a, actor="test")
    assert models.serving() == models.b


def test_an_undo_to_a_damaged_model_is_refused_before_the_champion_goes(models: Models) -> None:
    models.promote_directly(models.a)
    weights = models.store.home.bundles / models.champion / "weights.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    with pytest.raises(RefusedError, match="may not take traffic"):
        undo_promotion(models.store, models.a, models.champion, actor="test", why="bad")
    assert models.serving() == models.a


# ---------------------------------------------------------------- what runs by itself


def test_a_guardrail_acts_on_its_own_rollout_only(models: Models) -> None:
    first = begin(models.store, models.a, 10, actor="test")
    roll_back(models.store, first.id, actor="test", why="by hand")
    second = begin(models.store, models.b, 10, actor="test")
    late = add_counts(models.store, first.id, VIOLATED)
    assert (late.stage, late.why) == (RolloutStage.ROLLED_BACK, "by hand")
    assert models.rollout(second.id).stage is RolloutStage.CANARY
    promote(models.store, second.id, models.b, actor="test")
    assert add_counts(models.store, second.id, VIOLATED).stage is RolloutStage.PROMOTED
    assert models.serving() == models.b


def test_late_counts_of_one_rollout_do_not_stop_the_candidate_of_the_next(models: Models) -> None:
    runner = CandidateRunner(models.store, ServingSettings())
    begin(models.store, models.a, 99, actor="test")
    runner.refresh()
    before = _selected(runner)
    roll_back(models.store, before.rollout.id, actor="test", why="by hand")
    begin(models.store, models.b, 99, actor="test")
    runner.refresh()
    assert _selected(runner).model.id == models.b
    runner.count(CandidateOutput(before, None, is_slow=False), [])
    assert _selected(runner).model.id == models.b


def test_a_candidate_that_cannot_load_ends_its_own_rollout(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = begin(models.store, models.a, 10, actor="test")

    def promoted_meanwhile(*_: object) -> None:
        promote(models.store, broken.id, models.a, actor="somebody else")
        raise RelookError("out of memory")

    monkeypatch.setattr("serving.rollout.candidate.load_served", promoted_meanwhile)
    CandidateRunner(models.store, ServingSettings()).refresh()
    assert models.serving() == models.a
    assert models.rollout(broken.id).stage is RolloutStage.PROMOTED


def test_a_gate_promotes_only_over_the_model_that_it_compared_with(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    synthesize(tmp_path / "images", lesions=12, seed=1, width_px=80)
    import_folder(models.store, tmp_path / "images", frames=(Frame(32),))

    def passes_while_another_is_promoted(*_: object, **__: object) -> GateReport:
        models.promote_directly(models.b)
        return _report(models.a)

    monkeypatch.setattr(promotion, "run_gate", passes_while_another_is_promoted)
    with pytest.raises(RefusedError, match=f"model {models.b[:12]} serves now"):
        promote_model(models.store, Settings(), models.a)
    assert models.serving() == models.b


@pytest.mark.parametrize("meanwhile", ["another champion", "a rollout", "nothing"])
def test_a_round_promotes_only_over_the_model_that_it_compared_with(models: Models, meanwhile: str) -> None:
    record = RoundRecord(id=new_id(), number=1, started_at=utc_now(), seed=0, settings_hash="")
    gate = {**_report(models.a).model_dump(mode="json"), "served_id": models.champion}
    results = {"gate": gate, "fit": {"model_id": models.a}}
    if meanwhile == "another champion":
        models.promote_directly(models.b)
    elif meanwhile == "a rollout":
        begin(models.store, models.b, 10, actor="test")
    before = models.serving()
    found = round_steps.rollout(RoundContext(models.store, Settings(), record, models.home, results))
    if meanwhile == "nothing":
        assert (found["promoted"], models.serving()) == (True, models.a)
    else:
        assert (found["promoted"], found["status"]) == (False, ModelStatus.CANDIDATE)
        assert "because" in found["text"]
        assert models.serving() == before


# ---------------------------------------------------------------- the page


def test_a_button_of_an_old_view_acts_on_what_the_page_showed_or_not_at_all(models: Models, http: httpx.Client) -> None:
    handlers = ModelHandlers(PageApi(str(http.base_url), models.store.taxonomy))
    visitor: Any = SimpleNamespace(state=SimpleNamespace(key=admin_token(models.store.home)))
    empty: Seen = handlers.load(visitor)[-1]
    _, refused, first = handlers.roll_out(models.a, 10, "", empty, visitor)
    assert (refused, first.rollout is not None) == ("", True)
    # A second tab still shows that no rollout is in progress.
    _, refused, _ = handlers.roll_out(models.b, 50, "", empty, visitor)
    assert "is in progress" in refused
    assert "showed no rollout" in handlers.roll_back("", empty, visitor)[1]
    # One tab ends it and starts another; the other tab's buttons mean the first.
    _, _, ended = handlers.roll_back("", first, visitor)
    _, refused, second = handlers.roll_out(models.b, 10, "", ended, visitor)
    assert refused == ""
    for percent in (50, 100):
        assert "has ended" in handlers.roll_out(models.a, percent, "", first, visitor)[1]
    html, refused, _ = handlers.roll_back("", first, visitor)
    assert (refused, "rolled back" in html) == ("", True)
    assert second.rollout is not None
    assert models.rollout(second.rollout.id).percent == 10
    _, refused, promoted = handlers.roll_out(models.b, 100, "", second, visitor)
    assert (refused, models.serving()) == ("", models.b)
    for view in (second, promoted):
        assert "undo-promotion" in handlers.roll_back("", view, visitor)[1]
    assert models.serving() == models.b


# ---------------------------------------------------------------- the command


def test_the_commands_name_what_they_mean(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELOOK_HOME", str(models.home))

    def relook(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--json"])
        # `cluster.cli.main` turns an error of the caller into exit code 2 and its one sentence.
        assert isinstance(result.exception, UserError) is (code == 2), result.output
        return str(result.exception) if code else json.loads(result.stdout)

    started = relook("rollout", models.a[:12], "--percent", "10", "--champion", models.champion[:12])
    assert started["id"] in relook("rollback", code=2)
    assert "is in progress" in relook("rollout", models.b, "--percent", "100", code=2)
    for verb in (["rollout", "champion"], ["promote", "champion"], ["models", "undo-promotion", "champion"]):
        extra = ["--back-to", models.b] if "undo-promotion" in verb else []
        assert "name the model by its id" in relook(*verb, *extra, code=2)
    for _ in range(2):
        assert relook("rollback", started["id"], "--reason", "enough")["why"] == "enough"
    assert relook("promote", models.b[:12], "--provisional")["replaces"] == models.champion
    assert "replaced" in relook("models", "undo-promotion", models.b[:12], "--back-to", models.a, code=2)
    back = relook("models", "undo-promotion", models.b[:12], "--back-to", models.champion[:12], "--reason", "bad")
    assert (back["id"], models.serving()) == (models.champion, models.champion)


def test_an_unknown_rollout_is_told_with_what_is_in_progress(models: Models) -> None:
    with pytest.raises(UnknownIdError, match="no rollout is in progress"):
        roll_back(models.store, "f" * 32, actor="test", why="x")
    running = begin(models.store, models.a, 10, actor="test")
    with pytest.raises(UnknownIdError, match=running.id):
        roll_out(models.store, models.a, 20, rollout_id="f" * 32, actor="test")


# ---------------------------------------------------------------- helpers


def _selected(runner: CandidateRunner) -> CandidateRows:
    selected = runner.select([str(n) for n in range(64)], RolloutStage.CANARY)
    assert selected is not None
    return selected


def _report(model_id: str) -> GateReport:
    return GateReport(
        verdict=Verdict.PROMOTE, why="better", challenger=model_id, champion=None, images=1, lesions=1, key_lesions=0,
        balanced_accuracy=0.5, checks=[],
    )  # fmt: skip
