"""Back up, destroy, restore: the service predicts as before, here and on a real Ray, and the audit chain holds."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from records.errors import RelookError
from records.settings import RecordsSettings
from records.store import open_store
from records.types import FlagReason
from serving.client import Client
from serving.schemas import FlagRequest
from serving.settings import ServingSettings

NUM_IMAGES = 5


def relook(home: Path, *arguments: str) -> dict[str, Any]:
    """Run a verb; return what it says as JSON."""
    result = CliRunner().invoke(app, [*arguments, "--json"], env={"RELOOK_HOME": str(home)}, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    said: dict[str, Any] = json.loads(result.stdout)
    return said


@contextmanager
def served_here(home: Path, tools: Any) -> Iterator[str]:
    """The whole app over real HTTP, in this process."""
    settings = ServingSettings(port=tools.free_port(), audit_share=0.0)
    with closing(open_store(RecordsSettings(home=home))) as store, tools.run_service(store, settings) as running:
        yield running.url


@contextmanager
def served_on_ray(home: Path, tools: Any) -> Iterator[str]:
    """The service as `relook serve` starts it."""
    with warnings.catch_warnings():
        # Ray Serve's own declarations are not clean under the newest pydantic.
        warnings.simplefilter("ignore")
        from serving.launch import run_service

    settings = ServingSettings(port=tools.free_port(), audit_share=0.0, start_timeout_s=500.0)
    with run_service(settings, RecordsSettings(home=home)) as handle:
        yield handle.url


def predict_some(client: Client, make_image: Callable[..., bytes]) -> list[dict[str, Any]]:
    """Predict some images and return the predictions without what is new in each request."""
    found = [client.predict(make_image(number), explain="gradcam") for number in range(NUM_IMAGES)]
    return [prediction.model_dump(exclude={"id", "request_id", "created_at", "review"}) for prediction in found]


def test_a_restored_service_predicts_as_before(tools: Any, make_image: Callable[..., bytes], tmp_path: Path) -> None:
    destroy_and_compare(served_here, tools, make_image, tmp_path)


@pytest.mark.soak
def test_a_restored_service_on_ray_predicts_as_before(
    ray_session: Any, tools: Any, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    destroy_and_compare(served_on_ray, tools, make_image, tmp_path)


def destroy_and_compare(
    served: Callable[..., AbstractContextManager[str]], tools: Any, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    home, backup = tmp_path / "home", tmp_path / "backup"
    with closing(open_store(RecordsSettings(home=home))) as store:
        bundle = tools.make_bundle(store, 0, bias={"bcc": -2.0})
        tools.serve_bundle(store, bundle)
    scopes = ("--organisation", "clinic", "--scope", "predict", "--scope", "flag")
    token = relook(home, "keys", "create", "somebody", *scopes)["key"]

    with served(home, tools) as url, Client(url, token) as client:
        kept = client.predict(make_image(0), explain="gradcam")
        flagged = client.flag(kept.id, FlagRequest(reason=FlagReason.WRONG_LABEL, suggested_label="mel"))
        before = predict_some(client, make_image)
        stored, overlay = client.prediction(kept.id), client.explanation_png(kept.id)
        relook(home, "backup", str(backup))
        client.predict(make_image(9))  # after the view of the backup
    shutil.rmtree(home)
    relook(home, "restore", str(backup))

    assert relook(home, "audit", "verify")["whole"] is True
    with served(home, tools) as url:
        with Client(url, retry_s=0.0) as stranger, pytest.raises(RelookError):
            stranger.predict(make_image(0))
        with Client(url, token) as client:
            assert client.model().id == bundle.id
            assert client.prediction(kept.id) == stored
            assert client.prediction(kept.id).review == flagged.review
            assert client.explanation_png(kept.id) == overlay
            assert predict_some(client, make_image) == before
    assert relook(home, "audit", "verify")["whole"] is True
    events = relook(home, "trace", kept.id)
    assert {"prediction", "flag", "review_item"} <= {step["kind"] for step in events["steps"]}


def test_a_moved_home_predicts_from_its_new_place(tmp_path: Path, tools: Any, make_image: Any) -> None:
    with closing(open_store(RecordsSettings(home=tmp_path / "before"))) as store:
        bundle = tools.make_bundle(store)
        tools.serve_bundle(store, bundle)
    shutil.move(tmp_path / "before", tmp_path / "after")
    with served_here(tmp_path / "after", tools) as url, Client(url) as client:
        prediction = client.predict(make_image(1))
        assert prediction.model.id == bundle.id
        assert client.explanation(prediction.id).method == "gradcam"
