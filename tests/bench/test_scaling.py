"""The short form of a drill: load rises tenfold and predictors are killed, while replicas come and go."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from images.synth import render
from records.settings import RecordsSettings
from records.store import open_store
from tests.ports import free_port
from tests.service import make_bundle, serve_bundle


@pytest.mark.slow
@pytest.mark.long
def test_replicas_follow_the_load_and_no_request_fails(ray_session: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # Ray Serve's own declarations are not clean under the newest pydantic.
        warnings.simplefilter("ignore")
        from bench.drills.scaling import drill, settings_for

    store = open_store(RecordsSettings(home=tmp_path / "home"))
    serve_bundle(store, make_bundle(store, 0, bias={"bcc": -2.0}))
    settings = settings_for(free_port(), 2).model_copy(update={"scale_up_delay_s": 0.5, "scale_down_delay_s": 1.0})
    # A slow device, so that the cores of a busy machine are not what limits.
    images = [render("nv", seed=11, number=number) for number in range(8)]
    report = drill(store, images, settings, 0.3, seconds=1.0, kill_every_s=8.0, patience_s=600.0, seed=1)
    store.close()
    assert report.failures == []
    assert report.went_up
    assert report.came_back
    assert report.requests > 0
