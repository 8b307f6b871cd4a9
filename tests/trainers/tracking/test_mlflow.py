"""Runs in MLflow, read back by its own client: a training, a round's steps and aliases; and a server that is down."""

import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from pydantic import ValidationError

import relook
from cluster.promotion import promote_model
from cluster.settings import Settings, public_dump, settings_hash
from records.bundles import Bundle
from records.datasets import build_version
from records.errors import ConfigError
from records.models import register
from records.progress import progress
from records.store import Store
from records.types import ModelRecord, ModelStatus
from trainers.fitting.run import train_and_register
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings
from trainers.tracking import server
from trainers.tracking.server import MODEL_TAG, Tracked
from trainers.tracking.settings import TrackingSettings

TRAINERS = TrainersSettings(
    model=ModelSettings(side_px=32),
    epochs=2,
    batch_size=32,
    precision="fp32",
    augmentation="none",
    workers=WorkersSettings(threads=1, use_gpu=False),
)


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store in files, which MLflow opens at once; a new database takes it ten seconds."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path}/mlruns"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port where nobody listens, and nobody can."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def runs_of(client: MlflowClient, name: str = "relook") -> list[Any]:
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return client.search_runs([experiment.experiment_id], order_by=["start_time"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_training(uri: str, filled_store: Store, tmp_path: Path) -> None:
    tracking, dataset = TrackingSettings(mlflow_uri=uri), build_version(filled_store).version
    with progress() as bar:
        bundle = train_and_register(filled_store, TRAINERS, dataset, tmp_path / "run", progress=bar, tracking=tracking)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    (run,) = runs_of(client)
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "2"
    assert run.data.params["model.name"] == "custom_cnn"
    history = client.get_metric_history(run.info.run_id, "val/balanced_accuracy")
    curve = bundle.document.metrics["training"]["curves"]
    assert [(one.step, one.value) for one in history] == [
        (point["epoch"], pytest.approx(point["val_balanced_accuracy"])) for point in curve
    ]
    stored = {file.path for file in client.list_artifacts(run.info.run_id, f"models/{bundle.id[:12]}")}
    assert f"models/{bundle.id[:12]}/weights.safetensors" in stored
    assert "metrics.jsonl" in {file.path for file in client.list_artifacts(run.info.run_id)}
    (version,) = client.search_model_versions("name='relook'")
    assert version.tags[MODEL_TAG] == bundle.id
    home = {"tracking.mlflow_uri": uri, "trainers.precision": "fp32"}
    with relook.open_home(filled_store.home.root, set=home) as opened:
        found = relook.evaluate(opened, bundle.id)
    (evaluated,) = (run for run in runs_of(client) if run.data.tags["relook.kind"] == "evaluate")
    assert evaluated.data.metrics["val/balanced_accuracy"] == pytest.approx(found.balanced_accuracy)
    assert evaluated.data.tags[MODEL_TAG] == bundle.id


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_promotions_move_the_aliases(uri: str, store: Store, make_bundle: Callable[..., Bundle]) -> None:
    tracking = TrackingSettings(mlflow_uri=uri)
    settings, client = Settings(tracking=tracking), MlflowClient(tracking_uri=uri, registry_uri=uri)
    first, second = (make_bundle(store, "custom_cnn", seed, 32) for seed in (0, 1))
    promote_model(store, settings, str(first.path), provisional=True)
    assert client.get_model_version_by_alias("relook", "champion").tags[MODEL_TAG] == first.id
    assert set(client.get_registered_model("relook").aliases) == {"champion"}
    with store.ledger.begin() as tx:
        register(tx, second, status=ModelStatus.CANDIDATE)
    with Tracked(tracking, "round", "round-0001", {}) as tracked:
        tracked.aliases(store)
    assert client.get_model_version_by_alias("relook", "candidate").tags[MODEL_TAG] == second.id
    promote_model(store, settings, str(second.path), provisional=True)
    assert client.get_model_version_by_alias("relook", "champion").tags[MODEL_TAG] == second.id
    assert set(client.get_registered_model("relook").aliases) == {"champion"}
    # One version per model, however often it was recorded.
    assert len(client.search_model_versions("name='relook'")) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_candidate_whose_bundle_is_gone_stops_no_promotion(
    uri: str, store: Store, make_bundle: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    first, gone = (make_bundle(store, "custom_cnn", seed, 32) for seed in (0, 1))
    with store.ledger.begin() as tx:
        register(tx, gone, status=ModelStatus.CANDIDATE)
    shutil.rmtree(gone.path)
    promote_model(store, Settings(tracking=TrackingSettings(mlflow_uri=uri)), str(first.path), provisional=True)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert set(client.get_registered_model("relook").aliases) == {"champion"}
    assert "MLflow gets no alias candidate" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_search_and_a_resumed_run(uri: str) -> None:
    tracking = TrackingSettings(mlflow_uri=uri, mlflow_experiment="skin")
    for _ in range(2):
        with Tracked(tracking, "tune", "tune-0", {"trials": 2}) as tracked:
            for number in (0, 1, 0):
                tracked.trial(number, {"optimizer.momentum": 0.9}, [0.2, 0.4])
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    runs = {run.data.tags["relook.run"]: run for run in runs_of(client, "skin")}
    assert set(runs) == {"tune-0", "tune-0/trial-0", "tune-0/trial-1"}
    below = runs["tune-0/trial-1"]
    assert below.data.tags["mlflow.parentRunId"] == runs["tune-0"].info.run_id
    assert below.data.params == {"optimizer.momentum": "0.9"}
    assert below.data.metrics["val/balanced_accuracy"] == 0.4
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_a_server_that_is_down_stops_nothing(
    closed_port: int, store: Store, make_bundle: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = TrackingSettings(mlflow_uri=f"http://ann:secret@127.0.0.1:{closed_port}")
    val = {"macro_f1": 0.5, "macro_auc": None, "ece": 0.1}
    bundle = make_bundle(store, "custom_cnn", 0, 32, metrics={"val": val})
    with Tracked(tracking, "train", "train-1", {"epochs": 2}) as tracked:
        tracked.figures({"loss": 1.0}, 1)
        tracked.fitted(bundle, bundle.path / "metrics.jsonl")
    promote_model(store, Settings(tracking=tracking), str(bundle.path), provisional=True)
    said = capsys.readouterr().err
    assert "secret" not in said
    # Once by the training and once by the promotion, each with what is missing.
    assert len(re.findall("the work goes on", said)) == 2
    assert len(re.findall("lacks [0-9]+ records of this run: the settings, figures of step 1", said)) == 1
    with store.ledger.read() as tx:
        assert tx.require(ModelRecord, bundle.id).status == ModelStatus.PROVISIONAL


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_failed_is_sent_again_in_order(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_ATTEMPTS_S", (0.01,))
    open_client, failures = server._Client._open, iter(range(3))

    def down_at_first(self: server._Client) -> tuple[Any, str]:
        if next(failures, None) is not None:
            raise ConnectionError("refused")
        return open_client(self)

    monkeypatch.setattr(server._Client, "_open", down_at_first)
    tracked = Tracked(TrackingSettings(mlflow_uri=uri), "train", "train-1", {"epochs": 3})
    for step in (1, 2, 3):
        tracked.figures({"loss": 1.0 / step, "undefined": None}, step)
    sender = tracked._sender
    assert sender is not None
    for _ in range(6000):
        if not sender._waiting:
            break
        sender._thread.join(0.01)
    with tracked:
        pass
    (run,) = runs_of(client := MlflowClient(tracking_uri=uri, registry_uri=uri))
    assert [one.step for one in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
    assert "undefined" not in run.data.metrics


@pytest.mark.parametrize("wrong", ["mlflow:5000", "ftp://host", "http://a host", "/tmp/mlruns", ""])
def test_an_address_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(ValidationError, match="it is no tracking URI"):
        TrackingSettings(mlflow_uri=wrong)


def test_the_address_is_no_result_and_shows_no_password() -> None:
    settings = Settings(tracking=TrackingSettings(mlflow_uri="https://ann:secret@mlflow.example/x"))
    assert settings_hash(settings) == settings_hash(Settings())
    assert "secret" not in str(public_dump(settings)) + repr(settings)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'relook[tracking]'")):
        Tracked(TrackingSettings(mlflow_uri="http://127.0.0.1:5000"), "train", "train-1", {})
