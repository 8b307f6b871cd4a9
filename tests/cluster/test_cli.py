"""The `relook` command: fast help, exit codes, one sentence per error, one JSON object with --json."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from cluster.cli import app, run
from cluster.replay import Replay
from cluster.round import RoundEvent
from cluster.verbs import show_round
from records.command import JsonCall, verb
from trainers.fitting.epoch_report import EpochReport

HEAVY = ("torch", "ray", "pandas", "pyarrow", "sqlalchemy", "gradio", "albumentations", "captum", "cv2", "sklearn")


def test_help_imports_nothing_heavy() -> None:
    probe = f"import sys, cluster.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", probe], text=True).strip() == "[]"
    text = subprocess.check_output([sys.executable, "-m", "cluster.cli", "--help"], text=True)
    assert "doctor" in text


def test_every_verb_of_the_rooms_is_there_with_a_help_text() -> None:
    verbs = {
        "doctor",
        "status",
        "demo",
        "round",
        "rounds",
        "promote",
        "train",
        "evaluate",
        "explain",
        "catalog",
        "data",
        "tune",
        "serve",
        "predict",
        "rollout",
        "rollback",
        "models",
        "label",
        "trace",
        "taxonomy",
        "audit",
        "keys",
        "monitor",
        "retention",
        "erase",
        "consent",
        "backup",
        "restore",
        "report",
        "labels",
        "drift",
        "incident",
        "hooks",
    }
    root = typer.main.get_command(app)
    assert set(root.commands) == verbs  # type: ignore[attr-defined]
    silent = [name for name, command in root.commands.items() if not command.help]  # type: ignore[attr-defined]
    assert not silent


def test_every_verb_takes_json() -> None:
    root = typer.main.get_command(app)

    def leaves(command: object, path: str) -> list[tuple[str, object]]:
        below = getattr(command, "commands", None)
        if below is None:
            return [(path, command)]
        return [leaf for name, child in below.items() for leaf in leaves(child, f"{path} {name}")]

    found = leaves(root, "relook")
    assert len(found) > 20
    without = [path for path, command in found if "--json" not in [o for p in command.params for o in p.opts]]  # type: ignore[attr-defined]
    assert not without


def test_the_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"relook {version('relook')}"


def without_ray(settings: object) -> AbstractContextManager[None]:
    """Start no Ray: what the verb does with it is not run."""
    return nullcontext()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["bogus"], 2, "No such command 'bogus'; see `relook --help`"),
        (["status", "--nope"], 2, "No such option: --nope; see `relook status --help`"),
        (["trace"], 2, "Missing argument 'ID'; see `relook trace --help`"),
        (["status", "--preset", "labtop"], 2, "no preset 'labtop'; there are laptop"),
        (
            ["status", "--set", "trainers.epoch=3"],
            2,
            "no setting trainers.epoch (from --set); did you mean trainers.epochs?",
        ),
        (["status", "--config", "nowhere.yaml"], 2, "the settings file nowhere.yaml cannot be read"),
        (["taxonomy", "check", "nowhere.yaml"], 2, "no taxonomy 'nowhere.yaml'"),
        (["data", "import", "nowhere"], 2, "nowhere"),
        (["promote", "0123456789abcdef"], 2, "0123456789abcdef"),
        (["promote", "m", "--force", "--provisional"], 2, "--force and --provisional exclude each other; give one"),
        (["round", "--resume", "--watch"], 2, "--resume, --watch, --dry-run and --replay exclude one another"),
        (["round", "--resume"], 2, "no round is unfinished; start one with `relook round`"),
        (["predict", "m", ".", "--out", "t.csv", "--explain", "lime"], 2, "--explain is 'lime'; it must be gradcam"),
        (["rollout"], 2, "no rollout is in progress; `relook rollout MODEL` starts one"),
        (["tune", "--run", "search-1"], 2, "--run names the search to resume; give it with --resume"),
        (["data", "audit", "--out", "page.pdf"], 2, "--out page.pdf is no HTML page; give a name that ends in .html"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    arguments: list[str],
    code: int,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("cluster.cli._start_ray", without_ray)
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err.strip()
    assert said.startswith("relook: ")
    assert sentence in said
    assert "\n" not in said

    assert run([*arguments, "--json"]) == code
    captured = capsys.readouterr()
    printed = json.loads(captured.out)["error"]
    assert printed["exit_code"] == code
    assert sentence in printed["message"]


def test_a_failure_that_is_no_bad_input_is_exit_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path / "home"))
    assert run(["doctor", "--set", f"labeling.environment={tmp_path / 'none'}", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False
    assert {
        "name": "Label Studio",
        "state": "fail",
        "detail": "not installed",
        "fix": "relook label install",
    } in printed["checks"]


@pytest.fixture
def buggy_verb() -> Iterator[str]:
    """A verb with a bug: it raises an unexpected error."""

    @verb(app, "buggy")
    def buggy(call: JsonCall) -> None:
        """Divide by zero."""
        1 / 0  # noqa: B018

    yield "buggy"
    app.registered_commands.pop()


def test_a_bug_keeps_its_traceback_in_a_file(
    buggy_verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path))
    (tmp_path / "logs").mkdir()
    assert run([buggy_verb, "--json"]) == 1
    captured = capsys.readouterr()
    kept = list((tmp_path / "logs").iterdir())
    assert len(kept) == 1
    assert "in buggy" in kept[0].read_text()
    sentence = f"unexpected ZeroDivisionError: division by zero; this is a bug, the traceback is in {kept[0]}"
    assert captured.err == f"relook: {sentence}\n"
    assert json.loads(captured.out)["error"]["message"] == sentence


def test_a_place_that_cannot_hold_a_ledger_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path))
    (tmp_path / "ledger.db").mkdir()
    assert run(["status"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("relook: ")
    assert "this is a bug" not in captured.err
    assert captured.err.count("\n") == 1


def test_status_of_nothing_and_of_a_home(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("RELOOK_HOME", str(home))
    assert run(["status"]) == 0
    assert "nothing here yet" in capsys.readouterr().out
    assert not home.exists()
    assert run(["rounds", "--json"]) == 0
    capsys.readouterr()
    assert run(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exists"] is True
    assert found["home"] == str(home)
    assert (found["images"], found["models"], found["serving"], found["last_round"]) == (0, {}, None, None)


def test_the_plan_of_a_round_is_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path))
    assert run(["round", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for said in ("round", "collect and version: 0 new labels over 0 images", "not known yet"):
        assert said in printed
    assert run(["round", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["round"] == 1


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({}, 0, "round 3 came out the same\n"),
        ({"same_model": False}, 0, "round 3 came out the same within its tolerance\n"),
        ({"within_tolerance": False}, 1, "round 3 came out differently: {'accuracy': 0.25}\n"),
        (
            {"within_tolerance": False, "other_packages": {"torch": ["1", "2"], "numpy": ["1", "3"]}}, 1,
            "round 3 came out differently: {'accuracy': 0.25}; packages differ: torch, numpy\n",
        ),
    ],
)  # fmt: skip
def test_a_replay_says_whether_the_round_came_out_the_same(
    changes: dict[str, object], code: int, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fields = {"round": 3, "same_model": True, "model_id": "m", "precision": "fp32", "differences": {"accuracy": 0.25},
              "within_tolerance": True, "other_packages": {}}  # fmt: skip
    monkeypatch.setattr("cluster.replay.replay_round", lambda store, number: Replay.model_validate(fields | changes))
    monkeypatch.setattr("cluster.cli._start_ray", without_ray)
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path))
    assert run(["round", "--replay", "3"]) == code
    captured = capsys.readouterr()
    assert (captured.err if code else captured.out).endswith(sentence)


def test_a_watcher_says_how_many_rounds_it_ran(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.schedule.watch", lambda store, settings, **options: 2)
    monkeypatch.setattr("cluster.cli._start_ray", without_ray)
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path))
    assert run(["round", "--watch"]) == 0
    assert capsys.readouterr().out == "2 rounds ran here\n"


def test_ctrl_c_is_exit_130_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli", "data", "synth", str(tmp_path / "images"), "--lesions", "5000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RELOOK_HOME": str(tmp_path)},
    )
    deadline = time.monotonic() + 600
    while not list((tmp_path / "images").rglob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert out == ""
    assert "relook: interrupted; what was done so far is kept" in errors
    assert "Traceback" not in errors


def test_a_round_shows_each_step_as_it_begins_reports_and_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("records.progress.COUNT_PAUSE_S", 0.0)  # a minute: an epoch may take an hour
    epoch = EpochReport(
        epoch=2, train_loss=0.8, val_loss=0.9, val_balanced_accuracy=0.5, val_accuracy=0.6, key_class_sensitivity=None,
        learning_rate=0.01, images_per_s=812.0, seconds=3.0,
    )  # fmt: skip
    with show_round() as show:
        show(RoundEvent(3, "collect", "kept", "collect: already done"))
        show(RoundEvent(3, "fit", "started", "fit begins"))
        show(RoundEvent(3, "fit", "progress", "step", "epoch 2, step 7/9"))
        show(RoundEvent(3, "fit", "progress", "epoch", epoch))
        show(RoundEvent(3, "fit", "progress", "something that is not shown", {"of": "another kind"}))
        show(RoundEvent(3, "fit", "done", "model abc is fitted"))
        show(RoundEvent(3, "gate", "started", "gate begins"))
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "✓ collect: already done",
        "round 3: fit ...",
        "round 3: fit: epoch 2, step 7/9",
        "round 3: fit: epoch 2, loss 0.800, val balanced accuracy 0.500, 812 images/s",
        "✓ fit: model abc is fitted (0 s)",
        "round 3: gate ...",
        "round 3: gate, done in 0 s",
    ]
