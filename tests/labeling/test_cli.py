"""The `relook label` verbs through typer's runner, against a real Label Studio."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from labeling.agreement import AnchoringReport
from labeling.cli import _card_table, _exit_if, _heartbeat, _seconds, app, counting
from labeling.client import LabelStudioClient
from labeling.connection import connect, require
from labeling.local_server import LocalLabelStudio, ServerInfo
from labeling.readers import ReaderCard, Share
from labeling.settings import LabelingSettings
from labeling.simulated_annotator import annotate, read_truth
from records.errors import ConfigError, ContractError, DataError, LabelStudioError, TaxonomyError
from records.home import Home
from records.ids import utc_now
from records.store import Store
from records.types import ReviewItem
from tests.labeling.test_agreement import said

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


def test_agreement_is_printed_with_an_interval(store: Store, add_items: AddItems, call: Call) -> None:
    items, elsewhere = add_items(3, overlays=False), LabelingSettings()
    empty = call(elsewhere, "agreement")
    assert "undefined" in empty.stdout
    assert "difference" not in empty.stdout
    labels = [
        said(item.image_id, name, label, item=item.id) for item in items for name, label in (("a", "mel"), ("b", "nv"))
    ]
    labels += [said(items[0].image_id, "c", "mel", item=items[0].id, blind=True)]
    with store.ledger.begin() as tx:
        tx.add(*labels)
    printed = call(elsewhere, "agreement")
    assert printed.exit_code == 0
    for text in ("3 images with two readers or more", "Cohen's kappa a | b", "mel against the rest", "difference",
                 "95 % interval"):  # fmt: skip
        assert text in printed.stdout


def test_the_card_of_an_annotator_shows_how_long_a_task_takes() -> None:
    none = AnchoringReport(shown=0, shown_agreeing=0, blind=0, blind_agreeing=0, difference=None, interval=None)
    share = Share(hits=3, of=4, share=0.75, interval=(0.2, 0.99))
    card = ReaderCard(
        reader="ann@x", as_of=utc_now(), annotations=4, gold=share, gold_undecided=0, malignant=share, confusion={},
        agreement=share, seconds=12.0, seconds_interval=(8.0, 20.0), anchoring=none,
    )  # fmt: skip

    def drawn(one: ReaderCard) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(_card_table(one))
        return str(console.file.getvalue())

    assert "12 s, 95 % interval 8 to 20 s" in drawn(card)
    assert "interval" not in drawn(card.model_copy(update={"seconds_interval": None})).partition("time of a task")[2]
    assert "time of a task" not in drawn(card.model_copy(update={"seconds": None}))


def test_what_failed_is_said_and_ends_a_command_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    _exit_if([])
    with pytest.raises(typer.Exit) as ended:
        _exit_if(["task 3", "task 4"])
    assert ended.value.exit_code == 1
    assert "2 could not be processed and will be tried again; the others were not affected" in capsys.readouterr().err


def test_the_watch_counts_its_syncs_except_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with _heartbeat() as beat:
        beat()
    assert "label sync --watch" in capsys.readouterr().err
    monkeypatch.setattr("labeling.cli.stderr", Console(file=io.StringIO(), force_terminal=True))
    with _heartbeat() as beat:
        beat()
    assert capsys.readouterr().err == ""


def test_pauses_are_read_with_their_unit() -> None:
    assert [_seconds(text) for text in ("15s", "2m", "1h", "90")] == [15.0, 120.0, 3600.0, 90.0]
    for text in ("0s", "2h", "soon", ""):
        with pytest.raises(ConfigError, match="is not a pause of 1 s to 1 h"):
            _seconds(text)


def test_the_truth_of_a_simulated_annotator_is_checked(tmp_path: Path, store: Store) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_truth(tmp_path / "none.csv", store.taxonomy)
    table = tmp_path / "t.csv"
    table.write_text("image,label\na,nv\n")
    with pytest.raises(DataError, match="has the columns image, label; it needs image_id and label"):
        read_truth(table, store.taxonomy)
    table.write_text("image_id,label\na,nv\nb,plum\n")
    with pytest.raises(TaxonomyError, match="plum"):
        read_truth(table, store.taxonomy)
    table.write_text("image_id,label\na,nv\nb,mel\n")
    assert read_truth(table, store.taxonomy) == {"a": "nv", "b": "mel"}


def test_a_simulated_annotator_has_nothing_to_do_before_a_push(store: Store, add_items: AddItems) -> None:
    nobody: Any = SimpleNamespace(server="http://127.0.0.1:9")
    assert annotate(nobody, store, {item.image_id: "nv" for item in add_items(2)}) == []
