"""The verbs `serve` and `models`: bad input is one sentence and exit 2, and a table is a table."""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli import run
from records.models import register
from records.store import Store
from vision.inference.loaded import GOLDEN_TOLERANCE
from vision.precision import Precision


def test_a_port_in_use_is_one_sentence_and_exit_2(store: Store, tools: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tools.serve_bundle(store, tools.make_bundle(store))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        home = f"records.home={store.home.root}"
        assert run(["serve", "--port", str(port), "--set", home]) == 2
    error = capsys.readouterr().err
    assert f"serving.port {port}" in error
    assert "--port" in error
    assert len(error.strip().splitlines()) == 1


def test_serving_without_a_champion_is_refused(tmp_path: Path, tools: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--port", str(tools.free_port()), "--set", f"records.home={tmp_path / 'home'}"]) == 2
    assert "no model is to be served yet" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--port", "70000"], ["--host", "0.0.0.0"], ["--port", "eight"]])
def test_settings_that_cannot_work_are_refused(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", *given, "--set", f"records.home={tmp_path / 'home'}"]) == 2
    assert given[0].strip("-") in capsys.readouterr().err


def test_models_are_listed(store: Store, tools: Any, capsys: pytest.CaptureFixture[str]) -> None:
    home = f"records.home={store.home.root}"
    assert run(["models", "--json", "--set", home]) == 0
    assert json.loads(capsys.readouterr().out) == {"items": []}
    bundle = tools.make_bundle(store)
    tools.serve_bundle(store, bundle)
    assert run(["models", "--json", "--set", home]) == 0
    (item,) = json.loads(capsys.readouterr().out)["items"]
    assert (item["id"], item["status"]) == (bundle.id, "champion")
    assert run(["models", "--set", home]) == 0
    assert bundle.id[:12] in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_models_are_verified_and_altered_ones_are_named(
    store: Store, tools: Any, capsys: pytest.CaptureFixture[str], precision: Precision
) -> None:
    home = f"records.home={store.home.root}"
    number_format = f"serving.precision={precision}"
    whole, wrong, altered = (tools.make_bundle(store, seed) for seed in (0, 1, 2))
    changed = tools.make_bundle(store, 3, golden_logits=wrong.golden()["logits"])
    for bundle in (whole, altered, changed):
        with store.ledger.begin() as tx:
            register(tx, bundle)
    weights = altered.path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")

    assert run(["models", "verify", "--json", "--set", home, "--set", number_format]) == 1
    listed = {one["id"]: one for one in json.loads(capsys.readouterr().out)["models"]}

    assert listed.keys() == {whole.id, altered.id, changed.id}
    assert listed[whole.id]["problem"] is None
    largest = max(1.0, float(np.abs(whole.golden()["logits"]).max()))
    assert listed[whole.id]["golden_difference"] <= GOLDEN_TOLERANCE[precision] * largest
    assert "was altered" in listed[altered.id]["problem"]
    assert "golden images" in listed[changed.id]["problem"]
    assert run(["models", "verify", whole.id[:12], "--set", home, "--set", number_format]) == 0
    assert "unchanged" in capsys.readouterr().out


def test_two_models_are_compared_by_metrics_and_settings(
    store: Store, tools: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    home = f"records.home={store.home.root}"
    pair = [tools.make_bundle(store, seed, metrics={"val": {"balanced_accuracy": 0.5 + seed / 10}}) for seed in (0, 1)]
    with store.ledger.begin() as tx:
        for bundle in pair:
            register(tx, bundle)
    assert run(["models", "compare", *(bundle.id[:12] for bundle in pair), "--json", "--set", home]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["models"] == [bundle.id for bundle in pair]
    assert printed["figures"] == {"val.balanced_accuracy": [0.5, 0.6]}
    assert printed["settings"] == {}
    assert run(["models", "compare", pair[0].id[:12], "nobody", "--set", home]) == 2


def test_a_model_that_is_not_registered_cannot_be_verified(
    store: Store, tools: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tools.make_bundle(store)
    assert run(["models", "verify", bundle.id[:12], "--set", f"records.home={store.home.root}"]) == 2
    assert "no model is called" in capsys.readouterr().err
