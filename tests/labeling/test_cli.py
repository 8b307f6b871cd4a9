"""The `relook label` verbs through typer's runner, against a real Label Studio."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from labeling.cli import app, counting
from labeling.client import LabelStudioClient
from labeling.connection import connect, require
from labeling.local_server import LocalLabelStudio, ServerInfo
from labeling.settings import LabelingSettings
from labeling.simulated_annotator import annotate
from records.errors import ConfigError, ContractError, LabelStudioError
from records.home import Home
from records.store import Store
from records.types import ReviewItem

AddItems = Callable[..., list[ReviewItem]]
Call = Callable[..., Result]


@pytest.fixture
def elsewhere(server: ServerInfo, settings: LabelingSettings) -> LabelingSettings:
    """The session's server, reached as one that runs elsewhere: by URL and token."""
    return settings.model_copy(update={"url": server.url, "token": server.token})


@pytest.fixture
def call(store: Store) -> Call:
    def run(labeling: LabelingSettings, *arguments: str) -> Result:
        composed = SimpleNamespace(records=store.settings, labeling=labeling)
        return CliRunner().invoke(app, ["label", *arguments], obj=lambda config, preset, sets: composed)

    return run


def _json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_push_annotate_pull_and_sync(
    store: Store, client: LabelStudioClient, elsewhere: LabelingSettings, add_items: AddItems, call: Call
) -> None:
    items = add_items(4)
    status = _json(call(elsewhere, "status", "--json"))
    assert (status["items"]["new"], status["problems"], status["version"]) == (4, [], "1.23.2")
    assert status["oldest_waiting_s"] >= 0
    assert _json(call(elsewhere, "push", "--json"))["pushed"] == 4
    assert len(annotate(client, store, {item.image_id: "nv" for item in items}, limit=3)) == 3
    assert _json(call(elsewhere, "pull", "--json"))["new_labels"] == 3
    add_items(1, first_seed=90)
    both = _json(call(elsewhere, "sync", "--json"))
    assert (both["push"]["pushed"], both["pull"]["new_labels"]) == (1, 0)
    status = _json(call(elsewhere, "status", "--json"))
    assert (status["tasks"], status["annotations"]) == (5, 3)
    assert {state: count for state, count in status["items"].items() if count} == {"pushed": 2, "answered": 3}
    shown = call(elsewhere, "status")
    assert shown.exit_code == 0
    assert "5 tasks" in shown.output


def test_status_names_a_deleted_project(
    client: LabelStudioClient, elsewhere: LabelingSettings, add_items: AddItems, call: Call
) -> None:
    add_items(1)
    project_id = _json(call(elsewhere, "push", "--json"))["project_id"]
    client.request("DELETE", f"api/projects/{project_id}", "delete")
    found = call(elsewhere, "status", "--json")
    assert found.exit_code == 1
    assert "is gone from Label Studio; `relook label sync`" in json.loads(found.stdout)["problems"][0]


def test_up_and_install_find_what_is_there(home: Home, settings: LabelingSettings, server: ServerInfo) -> None:
    composed = SimpleNamespace(records=SimpleNamespace(home=home.root), labeling=settings)
    for arguments, key, value in ((["up"], "url", server.url), (["install"], "built", False)):
        result = CliRunner().invoke(app, ["label", *arguments, "--json"], obj=lambda *_: composed)
        assert _json(result)[key] == value
        assert server.token.get_secret_value() not in result.output
    shown = CliRunner().invoke(app, ["label", "up"], obj=lambda *_: composed)
    assert server.password.get_secret_value() not in shown.output
    assert "label-studio.json" in shown.output.replace("\n", "")


def test_without_a_server_each_verb_names_the_next_step(
    store: Store, settings: LabelingSettings, call: Call, tmp_path: Path
) -> None:
    bare = settings.model_copy(update={"environment": tmp_path / "none"})
    found = call(bare, "status", "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["problems"] == ["Label Studio is not installed; run `relook label install`"]
    assert connect(store.home, bare) is None
    for verb in ("push", "pull", "sync"):
        result = call(bare, verb)
        assert isinstance(result.exception, LabelStudioError)
        assert "`relook label up`" in str(result.exception)
    assert _json(call(bare, "down", "--json")) == {"stopped": False}
    (store.home.label_studio / "label_studio.sqlite3").touch()
    assert LocalLabelStudio(store.home, bare).existed
    with pytest.raises(LabelStudioError, match="is down; start it with `relook label up`"):
        require(store.home, bare)


def test_settings_and_arguments_that_cannot_work(
    store: Store, client: LabelStudioClient, elsewhere: LabelingSettings, call: Call
) -> None:
    with pytest.raises(ConfigError, match="RELOOK_LABELING__TOKEN"):
        connect(store.home, elsewhere.model_copy(update={"token": None}))
    result = call(elsewhere, "sync", "--every", "soon")
    assert isinstance(result.exception, ConfigError)
    for wrong, unsure in ((-0.1, 0.0), (0.6, 0.6), (float("nan"), 0.0)):
        with pytest.raises(ContractError, match="rates"):
            annotate(client, store, {}, error_rate=wrong, cant_tell_rate=unsure)


def test_work_is_counted_and_no_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("send tasks"):
        pass
    assert capsys.readouterr().err == ""
    with counting("send tasks") as advance:
        advance(1, 2)
        advance(2, 2)
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["send tasks: 0/2", "send tasks: 2/2, done in 0 s"]
