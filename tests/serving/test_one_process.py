"""Ingress and predictor in one process: when, and that a caller cannot tell the difference."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from records.errors import ImageError, RefusedError
from records.store import Store
from serving.in_process import run_here
from serving.messages import StoredPrediction
from serving.settings import ServingSettings
from tests.serving.test_predictor import request

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")

APART: list[dict[str, Any]] = [
    {"one_process": False},
    {"http": "serve"},
    {"predictor_min_replicas": 2, "predictor_max_replicas": 2},
    {"predictor_gpus": 0.5},
    {"ingress_min_replicas": 2, "ingress_max_replicas": 2},
]


def parts(settings: ServingSettings, store: Store, one_machine: bool) -> tuple[Any, float]:
    """What the ingress is given as its predictor, and the CPUs that Ray reserves for it."""
    from serving.deployments import build_application

    application = build_application(settings, store.settings, "127.0.0.1", one_machine=one_machine)
    bound = application._bound_deployment
    return bound.init_args[2], bound.ray_actor_options["num_cpus"]


def test_one_machine_with_one_of_each_predicts_where_it_listens(store: Store) -> None:
    from serving.deployments import PredictorReplica

    settings = ServingSettings(predictor_cpus=2.0)
    found, cpus = parts(settings, store, one_machine=True)
    assert (found, cpus) == (PredictorReplica, settings.ingress_cpus + 2.0)


@pytest.mark.parametrize("changes", APART)
def test_several_of_one_part_are_apart(store: Store, changes: dict[str, Any]) -> None:
    found, cpus = parts(ServingSettings(**changes), store, one_machine=True)
    assert not isinstance(found, type)
    assert cpus == ServingSettings().ingress_cpus


def test_a_cluster_keeps_them_apart(store: Store) -> None:
    found, _ = parts(ServingSettings(), store, one_machine=False)
    assert not isinstance(found, type)


def test_a_caller_gets_what_another_process_would_send(
    store: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    from serving.deployments import PredictorReplica
    from serving.remote import RemoteService

    tools.serve_bundle(store, tools.make_bundle(store))
    settings = ServingSettings(audit_share=0.0)

    async def use() -> list[Any]:
        handle: Any = run_here(PredictorReplica, settings, store.settings)
        await handle.replica.check_health()
        service = RemoteService(store, settings, handle, handle)
        assert (await service.state()).model is not None
        key = {"idempotency_key": "one"}
        asked = [
            *(request(make_image(number)) for number in range(12)),
            request(b"no image"), request(make_image(0), **key), request(make_image(0), **key),
        ]  # fmt: skip
        try:
            found = await asyncio.gather(*map(service.predict, asked), return_exceptions=True)
            with pytest.raises(RefusedError, match="another image"):
                await service.predict(request(make_image(1), **key))
            return found
        finally:
            await handle.replica.stop()

    *images, bad, first, repeated = asyncio.run(use())
    assert all(isinstance(each, StoredPrediction) for each in images)
    assert isinstance(bad, ImageError)
    assert bad.code == "not_an_image"
    assert first.prediction.id == repeated.prediction.id
