"""The `relook` command: quick help, exit codes, one sentence per error, nothing half-said with --json."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from cluster.cli import app, run
from records.command import JsonCall, verb

HEAVY = ("torch", "ray", "pandas", "pyarrow", "sqlalchemy", "gradio", "albumentations", "captum", "cv2", "sklearn")


def test_help_imports_nothing_heavy() -> None:
    probe = f"import sys, cluster.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", probe], text=True).strip() == "[]"
    text = subprocess.check_output([sys.executable, "-m", "cluster.cli", "--help"], text=True)
    assert "doctor" in text


def test_every_verb_of_the_rooms_is_joined_and_explained() -> None:
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
        "backup",
        "restore",
    }
    root = typer.main.get_command(app)
    assert set(root.commands) == verbs  # type: ignore[attr-defined]
    silent = [name for name, command in root.commands.items() if not command.help]  # type: ignore[attr-defined]
    assert not silent


def test_every_verb_that_answers_takes_json() -> None:
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
    told = json.loads(captured.out)["error"]
    assert told["exit_code"] == code
    assert sentence in told["message"]


def test_what_fails_without_being_the_users_fault_is_exit_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path / "home"))
    assert run(["doctor", "--set", f"labeling.environment={tmp_path / 'none'}", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert {"name": "Label Studio", "state": "fail", "detail": "not installed", "fix": "relook label install"} in told[
        "checks"
    ]


@pytest.fixture
def buggy_verb() -> Iterator[str]:
    """A verb with a bug: it raises what nobody foresaw."""

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


def test_ctrl_c_is_exit_130_with_a_word(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli", "data", "synth", str(tmp_path / "images"), "--lesions", "5000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RELOOK_HOME": str(tmp_path)},
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "images").rglob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "relook: interrupted; what was done so far is kept" in errors
    assert "Traceback" not in errors
