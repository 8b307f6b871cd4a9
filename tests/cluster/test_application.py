"""The file of `relook serve --config-out`: Ray's own schema takes it, and the application is started from it."""

import os
import time
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from images.synth import render
from records.errors import ConfigError, UnknownIdError
from records.settings import RecordsSettings, environment
from records.store import Store, open_store
from serving.client import Client
from serving.settings import ServingSettings
from tests.ports import free_port
from tests.service import make_bundle, serve_bundle

with warnings.catch_warnings():
    # Ray Serve's own declarations are not clean under the newest pydantic.
    warnings.simplefilter("ignore")
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from cluster.application import Arguments, build
    from serving.serve_config import serve_config

SETS = ("serving.predictor_max_replicas=3", "serving.ingress_min_replicas=2", "serving.ingress_max_replicas=2")


def wait_until_running(timeout_s: float = 600.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        application = serve.status().applications.get("relook")
        if application is not None and application.status == "RUNNING":
            return
        assert application is None or application.status != "DEPLOY_FAILED", application
        time.sleep(0.2)
    raise TimeoutError(str(serve.status()))


def written(tmp_path: Path, *more: str) -> dict[str, Any]:
    file = tmp_path / "serve.yaml"
    sets = [part for text in SETS for part in ("--set", text)]
    result = CliRunner().invoke(app, ["serve", "--config-out", str(file), *sets, *more])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = yaml.safe_load(file.read_text())
    return document


def test_the_file_fits_rays_schema_and_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELOOK_RECORDS__DATABASE", "postgresql+psycopg://relook:hunter2@database/relook")
    document = written(tmp_path, "--host", "0.0.0.0", "--port", "8123")
    parsed = ServeDeploySchema.model_validate(document)
    assert (parsed.http_options.host, parsed.http_options.port) == ("0.0.0.0", 8123)
    (application,) = parsed.applications
    assert (application.route_prefix, application.import_path) == ("/", "cluster.application:build")
    given = application.args["serving"]
    given.pop("precision", None)  # the environment of the tests may name one
    assert given == {
        "host": "0.0.0.0", "port": 8123, "predictor_max_replicas": 3, "ingress_min_replicas": 2,
        "ingress_max_replicas": 2,
    }  # fmt: skip
    assert "hunter2" not in (tmp_path / "serve.yaml").read_text()
    document["applications"][0]["import_path"] = "nothing"
    with pytest.raises(ValueError, match="import_path"):
        ServeDeploySchema.model_validate(document)


@pytest.mark.parametrize(
    ("serving", "said"),
    [
        ({"predictor_max_replica": 3}, "predictor_max_replica"),
        ({"predictor_max_replicas": 0}, "greater than or equal to 1"),
        ({"host": "0.0.0.0"}, "there are no API keys"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_by_name(store: Store, serving: dict[str, Any], said: str) -> None:
    with environment({"RELOOK_HOME": str(store.home.root)}), pytest.raises(ConfigError, match=said):
        build(Arguments(serving=serving))
    with environment({"RELOOK_HOME": str(store.home.root)}), pytest.raises(UnknownIdError, match="no model is to be"):
        build(Arguments())


@pytest.mark.slow
@pytest.mark.long
def test_the_application_starts_from_the_file_and_predicts_through_serves_proxy(
    ray_session: Any, tmp_path: Path
) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    serve_bundle(store, make_bundle(store, 0, bias={"bcc": -2.0}))
    # Small enough for the four CPUs of the tests' Ray, beside whatever else runs there.
    settings = ServingSettings(
        http="serve", port=free_port(), page=False, predictor_min_replicas=2, predictor_max_replicas=3,
        predictor_cpus=0.2, ingress_min_replicas=2, ingress_max_replicas=2, ingress_cpus=0.1, explainer_cpus=0.1,
    )  # fmt: skip
    document = yaml.safe_load(yaml.safe_dump(serve_config(settings)))
    environ = {"RELOOK_HOME": str(store.home.root), "PYTHONPATH": os.getcwd()}
    document["applications"][0]["runtime_env"]["env_vars"] |= environ
    schema = ServeDeploySchema.model_validate(document)
    serve.start(proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump())
    try:
        _get_global_client().deploy_apps(schema)
        wait_until_running()
        with Client(settings.url, retry_s=60.0) as client:
            prediction = client.predict(render("nv", seed=11, number=0), explain="gradcam")
            assert prediction.explanation is not None
            assert client.prediction(prediction.id).id == prediction.id
            assert client.explanation(prediction.id, target="mel").target == "mel"
            assert client.ready().ready
            # Errors, limits and streams are those of the app, whoever listens before it.
            refused = httpx.post(f"{settings.url}/v1/predictions", content=b"x", headers={"Content-Type": "image/jpeg"})
            assert (refused.status_code, refused.json()["code"]) == (415, "not_an_image")
            assert httpx.get(f"{settings.url}/healthz", headers={"Host": "evil.example"}).status_code == 403
        running = serve.status().applications["relook"].deployments
        assert {name: sum(each.replica_states.values()) for name, each in running.items()} == {
            "ingress": 2, "predictor": 2, "explainer": 1, "counts": 1,
        }  # fmt: skip
    finally:
        serve.shutdown()
        store.close()
