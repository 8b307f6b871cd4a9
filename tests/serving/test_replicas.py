"""Two predictors and two ingress replicas on a real Ray Serve behave like one of each."""

import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from ray import cloudpickle

from bench.serve.interleaved import ask_all, differing, draw_calls, stored_once
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Prediction, Scope
from serving.access.keys import admin_token
from serving.client import Client
from serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.long]
PER_MINUTE = 60


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[Store]:
    opened = open_store(RecordsSettings(home=tmp_path_factory.mktemp("replicas")))
    tools.serve_bundle(opened, tools.make_bundle(opened, 0, bias={"bcc": -2.0}))
    yield opened
    opened.close()


def broken_at_will() -> Any:
    """The predictor, which cannot load a model while its home has a file `broken`."""
    from serving.deployments import PredictorReplica

    # The tests are not installed on the nodes, so this code travels with the class.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    class Replica(PredictorReplica):
        def __init__(self, settings: Any, records: Any) -> None:
            from serving import holder

            load = holder.load_served

            def load_if_sound(store: Store, *given: Any) -> Any:
                if (store.home.root / "broken").exists():
                    raise OSError("the disk of this node is gone")
                return load(store, *given)

            holder.load_served = load_if_sound
            super().__init__(settings, records)

    return Replica


@pytest.fixture(scope="module")
def url(ray_session: Any, served: Store, tools: Any) -> Iterator[str]:
    with warnings.catch_warnings():
        # Ray Serve's own declarations are not clean under the newest pydantic.
        warnings.simplefilter("ignore")
        from serving.launch import run_service

        replica = broken_at_will()
    settings = ServingSettings(
        port=tools.free_port(), page=False, model_poll_s=5.0, rate_limit_per_minute=PER_MINUTE, max_batch_size=1,
        predictor_min_replicas=2, predictor_max_replicas=2, predictor_cpus=0.3, ingress_min_replicas=2,
        ingress_max_replicas=2, ingress_cpus=0.1, explainer_cpus=0.1, start_timeout_s=900,
    )  # fmt: skip
    with run_service(settings, served.settings, predictor_class=replica) as handle:
        yield handle.url


def listeners(url: str) -> set[int]:
    port = int(url.rpartition(":")[2])
    found = (c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port)
    return {connection.pid for connection in found if connection.pid}


# The tests before the first key: until then there is one local caller, who has no limit.


def test_interleaved_calls_get_the_predictions_of_one_at_a_time(
    url: str, served: Store, make_image: Callable[..., bytes]
) -> None:
    # bench/drills/interleaved.py is the long form. Batches of one are equal to the last bit.
    assert len(listeners(url)) == 2
    calls = draw_calls(seed=5, num_calls=45, num_images=6, codes=served.taxonomy.codes)
    with Client(url) as client:
        predictions = [client.predict(make_image(number)).id for number in range(6)]
    alone = ask_all(url, calls, make_image, predictions, 1, "alone")
    together = ask_all(url, calls, make_image, predictions, 12, "together")
    assert differing(alone, together, exactly=True) == []
    with served.ledger.read() as tx:
        for tag, said in (("alone", alone), ("together", together)):
            assert stored_once(tx, calls, said, tag) == {"predictions": 15, "flags": 15}


def test_who_saw_the_new_model_never_gets_the_old_one_again(
    url: str, served: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    over, seen, lock = threading.Event(), [], threading.Lock()

    def ask() -> None:
        # Every request on a connection of its own: the kernel spreads them over both ingress replicas.
        while not over.is_set():
            began = time.monotonic()
            with Client(url) as client:
                model = client.predict(make_image(3)).model.id
            with lock:
                seen.append((began, time.monotonic(), model))

    new = tools.make_bundle(served, 1)
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        time.sleep(1.0)
        tools.serve_bundle(served, new)
        deadline = time.monotonic() + 600
        while sum(model == new.id for _, _, model in list(seen)) < 20 and time.monotonic() < deadline:
            time.sleep(0.1)
        over.set()
        for each in asking:
            each.result()
    first_answer = min(ended for _, ended, model in seen if model == new.id)
    assert {model for began, _, model in seen if began > first_answer} == {new.id}
    assert Counter(model for _, _, model in seen)[new.id] >= 20


def test_limits_keys_and_metrics_hold_for_all_replicas_together(
    url: str, served: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    token, other = (tools.make_key(served, name, Scope.PREDICT) for name in ("greedy", "other"))

    def post(token: str, **headers: str) -> httpx.Response:
        given = {"Authorization": f"Bearer {token}", "Content-Type": "image/jpeg", "Connection": "close"} | headers
        return httpx.post(f"{url}/v1/predictions", content=make_image(0), headers=given, timeout=600)

    # One key at both ingress replicas at once: one prediction.
    with ThreadPoolExecutor(8) as pool:
        repeated = list(pool.map(lambda _: post(other, **{"Idempotency-Key": "the-same"}), range(8)))
    assert {response.status_code for response in repeated} == {200}
    assert len({response.json()["id"] for response in repeated}) == 1
    with served.ledger.read() as tx:
        assert tx.count(Prediction, {"idempotency_key": "the-same"}) == 1
    admin = {"Authorization": f"Bearer {admin_token(served.home)}", "Connection": "close"}

    def counted(name: str) -> float:
        lines = httpx.get(f"{url}/metrics", headers=admin).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    too_many = 'relook_responses_total{status="429"}'
    before = counted(too_many)  # of the interleaved calls, whose client repeats them; long ago, so reported
    # A limit of N lets N through, and what a minute's bucket is refilled with meanwhile.
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        statuses = Counter(response.status_code for response in pool.map(lambda _: post(token), range(2 * PER_MINUTE)))
    refilled = (time.monotonic() - began) * PER_MINUTE / 60
    assert set(statuses) <= {200, 429}
    assert PER_MINUTE <= statuses[200] <= min(2 * PER_MINUTE, PER_MINUTE + refilled + 1)
    # Every ingress shows what both of them counted, and none less than another did before.
    deadline = time.monotonic() + 600
    while counted(too_many) < before + statuses[429] and time.monotonic() < deadline:
        time.sleep(1.0)
    assert [counted(too_many) for _ in range(6)] == [before + statuses[429]] * 6
    with served.ledger.read() as tx:
        assert counted("relook_predictions_total") >= tx.count(Prediction, {"served": True})


@pytest.mark.soak
def test_a_predictor_that_cannot_load_the_model_is_named_and_the_others_go_on(
    url: str, served: Store, make_image: Callable[..., bytes]
) -> None:
    from bench.drills.scaling import predictors

    broken, admin = served.home.root / "broken", admin_token(served.home)

    def wait_for(word: str) -> str:
        deadline = time.monotonic() + 600
        with Client(url, admin) as client:
            while time.monotonic() < deadline:
                found = client.ready()
                assert found.ready
                assert client.predict(make_image(1)).id
                if word in found.detail:
                    return found.detail
                time.sleep(0.5)
        raise TimeoutError(word)

    broken.touch()
    predictors()[0].kill()
    detail = wait_for("the disk of this node is gone")
    assert "1 predictors run and 1 do not" in detail
    anonymous = httpx.get(f"{url}/readyz").json()["detail"]
    assert anonymous == "some predictors do not serve"
    broken.unlink()
    assert wait_for("ready") == "ready"
