"""The demo as a user runs it: one command, real processes, and what it leaves behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app, run
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Annotation, Flag, ModelRecord, Prediction
from tests.ports import free_port

pytestmark = pytest.mark.slow
# Ray's own declarations are not clean under the newest pydantic, and it warns about its own defaults.
OF_RAY = pytest.mark.filterwarnings("ignore::DeprecationWarning")

REQUESTS, TRIALS = 100, 2
SMALL = (
    "demo.synth_lesions=260",
    "demo.withhold_share=0.4",
    f"demo.requests={REQUESTS}",
    "trainers.epochs=3",
    f"tuning.trials={TRIALS}",
    "tuning.trial_epochs=2",
    "tuning.max_train_images=120",
    "round.select_budget=5",
    "serving.page=false",
    "serving.start_timeout_s=900",
    "labeling.start_timeout_s=600",
)


def relook(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as its user would, in a home of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        env=environment_of(home),
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )


def environment_of(home: Path) -> dict[str, str]:
    ports = {"RELOOK_SERVING__PORT": str(free_port()), "RELOOK_LABELING__PORT": "0"}
    return {**os.environ, "RELOOK_HOME": str(home), **ports}


def here(home: Path, *arguments: str) -> Result:
    """Run a verb in this process."""
    return CliRunner().invoke(app, list(arguments), env={"RELOOK_HOME": str(home)})


def sets() -> list[str]:
    return [part for setting in SMALL for part in ("--set", setting)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Run a small demo once for the whole module."""
    home = tmp_path_factory.mktemp("demo")
    before = set(psutil.pids())
    done = relook(home, "demo", "--json", *sets())
    assert done.returncode == 0, done.stderr[-4000:]
    assert "raylet" not in done.stderr, done.stderr[-4000:]
    summary = json.loads((home / "demo" / "summary.json").read_text())
    assert json.loads(done.stdout) == summary
    assert left_behind(before, home) == []
    return home, summary


def left_behind(before: set[int], home: Path) -> list[str]:
    """Return new processes of a demo: Ray's, Label Studio's, or ours."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "environ"]):
        ours = (process.info["environ"] or {}).get("RELOOK_HOME") == str(home)
        if process.pid not in before and process.pid != os.getpid() and ours:
            found.append(" ".join(process.info["cmdline"] or [])[:120])
    return found


def test_the_summary_covers_the_whole_loop(finished: tuple[Path, dict[str, Any]]) -> None:
    _, summary = finished
    assert summary["data"]["leaked_lesions"] == 0
    assert summary["search"]["trials"] >= TRIALS
    assert summary["search"]["best"]["score"] > 0
    assert len(summary["rounds"]) == 2
    assert summary["served"]["requests"] >= REQUESTS
    assert summary["served"]["failed"] == 0, summary["served"]["failures"]
    assert summary["served"]["flagged"] > 0
    assert summary["gate"]["harmed_challenger_refused"] is True
    assert summary["swap"]["failed"] == 0
    assert summary["swap"]["requests"] > 0


def test_every_annotation_is_counted_exactly_once(finished: tuple[Path, dict[str, Any]]) -> None:
    _, summary = finished
    found = summary["label_studio"]
    uses = found["trained_on"] + found["cant_tell"] + found["extra_reads"] + found["held_out"]
    assert found["tasks_pushed"] >= 30
    assert found["annotations_pulled"] == uses > 0
    assert (found["lost"], found["duplicated"]) == (0, 0)
    assert summary["rounds"][1]["labels_from_annotators"] == found["trained_on"] > 0
    assert summary["rounds"][0]["labels_from_annotators"] == 0


def test_the_trace_of_a_flagged_prediction_ends_at_the_model_trained_on_its_annotation(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    home, summary = finished
    assert summary["trace"]["complete"] is True, summary["trace"]
    prediction_id, second = summary["trace"]["prediction_id"], summary["rounds"][1]
    done = here(home, "trace", prediction_id, "--json")
    assert done.exit_code == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]

    def step(kind: str, holds: str = "") -> dict[str, str]:
        return next(one for one in steps if one["kind"] == kind and (holds in one["text"] or one["id"] == holds))

    said = [one["id"] for one in steps if one["kind"] == "annotator"]
    with contextlib.closing(open_store(RecordsSettings(home=home))) as store, store.ledger.read() as tx:
        flag_row, *_ = tx.find(Flag, where={"prediction_id": prediction_id}, order_by=("created_at",))
        (label,) = tx.find(Annotation, where={"id": said, "review_item_id": flag_row.review_item_id})
        assert label.image_id == tx.require(Prediction, prediction_id).image_id
        assert tx.require(ModelRecord, second["model_id"]).dataset_id == second["dataset_id"]
    prediction, flag, item = (
        step("prediction", prediction_id), step("flag", flag_row.id), step("review_item", flag_row.review_item_id)
    )  # fmt: skip
    annotator, dataset, model = (
        step("annotator", label.id), step("dataset", second["dataset_id"]), step("model", second["model_id"])
    )  # fmt: skip
    assert "flagged" in item["text"]
    task = step("task", f"task {label.task_id} in project {label.project_id} of Label Studio")
    assert f" as {label.label} on split train (annotator:{label.annotator}" in dataset["text"]
    assert f"trained on dataset {dataset['id'][:12]} in round" in model["text"]
    path = (prediction, flag, task, annotator, dataset, model)
    times = [one["at"] for one in path]
    assert times == sorted(times)

    printed = here(home, "trace", prediction_id).stdout
    assert all(one["kind"] in printed for one in (*path, item))
    assert model["id"][:12] in printed


def test_the_records_of_the_demo_can_be_read(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, summary = finished
    rounds = json.loads(here(home, "rounds", "--json").stdout)["rounds"]
    assert [record["model_id"] for record in rounds] == [record["model_id"] for record in summary["rounds"]]
    assert json.loads(here(home, "audit", "verify", "--json").stdout)["whole"] is True
    monkeypatch.setenv("RELOOK_HOME", str(home))
    assert run(["trace", "0" * 32]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "nothing has the id" in printed.err


@pytest.fixture
def of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands in this process use a home of the test."""
    for name, value in environment_of(tmp_path / "home").items():
        monkeypatch.setenv(name, value)


@OF_RAY
@pytest.mark.usefixtures("of_the_test")
def test_an_unusable_data_folder_is_one_sentence_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "images"
    empty.mkdir()
    assert run(["demo", "--data", str(empty)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert str(empty) in said.splitlines()[-1]


@OF_RAY
@pytest.mark.usefixtures("of_the_test")
def test_a_taken_port_is_an_error_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = str(holder.getsockname()[1])
        assert run(["demo", "--set", f"serving.port={taken}"]) == 2
    said = capsys.readouterr().err
    assert taken in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.apart
@pytest.mark.soak
def test_ctrl_c_stops_every_process_that_was_started(tmp_path: Path) -> None:
    before = set(psutil.pids())
    command = [sys.executable, "-m", "cluster.cli", "demo", *sets()]
    with subprocess.Popen(
        command, env=environment_of(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Round 1:" in line:
                break
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=600)
    # A shell shows 130 for both: a returned exit code, or the signal if it came after the cleanup.
    assert process.returncode in (130, -signal.SIGINT)
    assert left_behind(before, tmp_path) == []
