"""The short form of a drill: load rises tenfold and predictors are killed, while replicas come and go.

Its form on three nodes is a drill only; here is what it computes from what it saw.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest

from bench.drills.scaling import NODE_CPUS, TITLE, WORKERS, ScalingReport, settings_for, settings_for_nodes
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
        from bench.drills.scaling import drill
        from serving.remote import APPLICATION

    # The processes that the drill kills.
    assert f"ServeReplica:{APPLICATION}:predictor" == TITLE

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


def report_of(*by_node: dict[str, int], most: int = 4) -> ScalingReport:
    """Return a report that holds, of what ran on worker nodes at each change."""
    replicas = [(float(second), sum(held.values())) for second, held in enumerate(by_node)]
    throughput = {"per_s_at_one": 10.0, "per_s_at_most": 36.0}
    return ScalingReport(200.0, most, replicas, list(by_node), **throughput, requests=1000, came_back=True)


def test_a_report_holds_only_if_every_worker_node_held_some_whenever_most_ran() -> None:
    one, two, three = {"a": 1, "b": 0}, {"a": 2, "b": 2}, {"a": 1, "b": 2}
    assert report_of(one, three, two, three, two, one).holds
    assert not report_of(one, three, two, three, {"a": 4, "b": 0}, one).holds
    assert not report_of(one, three, one).holds  # four never ran
    alone = report_of(one, two)
    alone.by_node.clear()  # a drill on one node
    assert alone.holds
    alone.per_s_at_most = 34.9
    assert not alone.holds
    failed = report_of(one, two)
    failed.failures.append("UnavailableError: 503")
    assert not failed.holds


@pytest.mark.parametrize("most", [2, 3, 4, 6])
def test_a_worker_node_has_room_for_half_of_the_predictors_and_the_explainer_and_no_more(most: int) -> None:
    settings = settings_for_nodes(8000, most)
    half = (most + 1) // 2
    assert half * settings.predictor_cpus + settings.explainer_cpus <= NODE_CPUS
    assert (half + 1) * settings.predictor_cpus > NODE_CPUS
    assert settings.needed_cpus <= WORKERS * NODE_CPUS
    assert settings.ingress_cpus == 0  # the head has none
    assert settings.max_batch_size == settings_for(8000, most).max_batch_size == 1
