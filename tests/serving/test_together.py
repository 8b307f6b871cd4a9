"""Several replicas that serve together: what is limited, counted and remembered holds for all of them."""

import asyncio
import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayError

from records.errors import AccessError, ConfigError, RefusedError, UnavailableError
from records.models import current_rollout
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Prediction
from serving import holder
from serving.access.keys import admin_token
from serving.access.together import ALIVE_S, Ask, Held, Reports, SharedCounts, SharedLimits
from serving.app import create_app
from serving.http_server import HttpServer
from serving.messages import PredictionRequest, ServingState, StoredPrediction
from serving.metrics import Metrics, Samples
from serving.rollout.control import roll_out
from serving.schemas import Context, ServedModelInfo
from serving.settings import ServingSettings
from tests.ports import free_port

with warnings.catch_warnings():
    # Ray Serve's own declarations are not clean under the newest pydantic.
    warnings.simplefilter("ignore")
    from serving.deployments import PredictorReplica
    from serving.remote import RemoteService

SETTINGS = ServingSettings(
    predictor_min_replicas=2, predictor_max_replicas=2, ingress_min_replicas=2, ingress_max_replicas=2,
    rate_limit_per_minute=60, max_in_flight=16, model_poll_s=60.0,
)  # fmt: skip
"""The ledger is read once a minute only, so no test sees a replica follow it by chance."""


class Handle:
    """Calls the replicas of a deployment in turn, in this process, as a handle of Ray Serve calls them elsewhere."""

    def __init__(self, *replicas: Any) -> None:
        self.turn = itertools.cycle(replicas)

    def __getattr__(self, method: str) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                return getattr(next(self.turn), method)(*arguments)

        return Method


class Replica(PredictorReplica):
    """A replica in this process, which the tests end themselves: Ray Serve alone awaits a destructor."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


class LostCounts(SharedCounts):
    """Counts whose responses get lost, or that do not respond at all."""

    loses = False

    async def ask(self, member: str, held: Held, asks: Sequence[Ask]) -> tuple[int, list[bool]]:
        found = await super().ask(member, held, asks)
        if self.loses:
            raise UnavailableError("a replica does not respond")
        return found


@pytest.fixture
def several(tmp_path: Any, tools: Any) -> Iterator[Store]:
    """A store with one champion, for several replicas."""
    opened = open_store(RecordsSettings(home=tmp_path))
    tools.serve_bundle(opened, tools.make_bundle(opened, 0, bias={"bcc": -2.0}))
    yield opened
    opened.close()


async def started(store: Store, number: int = 2, settings: ServingSettings = SETTINGS) -> list[PredictorReplica]:
    replicas = [Replica(settings, store.settings) for _ in range(number)]
    for replica in replicas:
        await replica.check_health()
    return replicas


async def stop(*replicas: PredictorReplica) -> None:
    for replica in replicas:
        await replica._predictor.stop()


def served_model(store: Store) -> ServedModelInfo:
    found = holder.ModelHolder(store, SETTINGS)
    found.refresh()
    return found.current.info()


def request(image: bytes, **given: Any) -> PredictionRequest:
    return PredictionRequest(**({"image": image, "request_id": "r1", "context": Context()} | given))


# ---------------------------------------------------------------- limits


def test_a_keys_limit_holds_for_all_ingress_replicas_together() -> None:
    async def run() -> list[int]:
        counts = SharedCounts(SETTINGS, lambda: 0.0)
        ingresses = [SharedLimits(SETTINGS, counts, name) for name in ("a", "b")]
        passed = {"greedy": 0, "honest": 0}

        async def charge(number: int, key: str) -> None:
            with contextlib.suppress(AccessError):
                await ingresses[number % 2].charge(key, 1)
                passed[key] += 1

        await asyncio.gather(*(charge(n, "greedy") for n in range(300)))
        await asyncio.gather(*(charge(0, "honest") for _ in range(59)))
        return list(passed.values())

    assert asyncio.run(run()) == [60, 59], "exactly N, and other keys have their own"


@pytest.mark.parametrize("slot", ["images", "maps"])
def test_slots_are_shared_by_all_ingress_replicas(slot: Any) -> None:
    total = SETTINGS.max_in_flight if slot == "images" else SETTINGS.max_explaining

    async def run() -> None:
        counts = SharedCounts(SETTINGS, lambda: 0.0)
        a, b = (SharedLimits(SETTINGS, counts, name) for name in ("a", "b"))
        taken = [await ingress.take(slot, None) for _ in range(total) for ingress in (a, b)]
        assert sum(taken) == total
        assert a.used(slot) + b.used(slot) == total
        b.give_back(slot, None)
        await b.newest_generation()
        assert [await a.take(slot, None), await a.take(slot, None)] == [True, False]
        # A key that is greedy at both doors leaves as much as one that is greedy at one.
        for ingress in (a, b):
            ingress.give_back(slot, None, int(ingress.used(slot)))
            await ingress.newest_generation()
        greedy = [await ingress.take(slot, "key") for _ in range(total) for ingress in (a, b)]
        assert sum(greedy) == total * 2 // 3
        assert await b.take(slot, "other")

    asyncio.run(run())


def test_what_a_killed_ingress_held_is_free_again() -> None:
    now_s = 0.0

    async def run() -> None:
        nonlocal now_s
        counts = SharedCounts(SETTINGS, lambda: now_s)
        killed, other = (SharedLimits(SETTINGS, counts, name) for name in ("killed", "other"))
        assert await killed.take("images", None, 16)
        assert not await other.take("images", None)
        now_s += ALIVE_S + 1
        assert await other.take("images", None, 16)

    asyncio.run(run())


def test_lost_responses_and_a_new_start_of_the_counts_are_put_right() -> None:
    async def run() -> None:
        counts = LostCounts(SETTINGS, lambda: 0.0)
        a, b = (SharedLimits(SETTINGS, counts, name) for name in ("a", "b"))
        counts.loses = True
        assert await a.take("images", None, 4), "an ingress alone applies its own limits"
        await a.charge("key", 60)
        with pytest.raises(AccessError, match="60 units a minute"):
            await a.charge("key", 1)
        counts.loses = False
        a._silent_until_s = 0.0
        a.give_back("images", None, 4)
        assert await a.take("images", None, 6)
        assert await b.take("images", None, 10)
        assert not await b.take("images", None)
        # Another process takes over and knows nothing: every ingress says with its next call what it holds.
        begun = SharedCounts(SETTINGS, lambda: 0.0)
        a._shared = b._shared = begun
        await a.newest_generation()
        await b.newest_generation()
        assert not await a.take("images", None)

    asyncio.run(run())


def test_a_cancelled_request_holds_nothing() -> None:
    async def run() -> None:
        counts = SharedCounts(SETTINGS, lambda: 0.0)
        a, b = (SharedLimits(SETTINGS, counts, name) for name in ("a", "b"))
        waiting = asyncio.create_task(a.take("images", None, 16))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await a.newest_generation()
        await a.newest_generation()
        assert await b.take("images", None, 16)

    asyncio.run(run())


# ---------------------------------------------------------------- which model answers


def test_who_saw_the_new_model_never_gets_the_old_one_again(
    several: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    first, second = tools.make_bundle(several, 0, bias={"bcc": -2.0}), tools.make_bundle(several, 1)

    async def run() -> None:
        replicas = await started(several)
        counts = SharedCounts(SETTINGS)
        here, there = (
            RemoteService(several, SETTINGS, Handle(*replicas), Handle(), SharedLimits(SETTINGS, counts, name))  # type: ignore[arg-type]
            for name in ("a", "b")
        )

        async def model_of(service: RemoteService, number: int) -> str:
            # As a request does: it takes a slot, and with it hears what other ingress replicas have returned.
            limits = service._limits
            assert limits is not None
            assert await limits.take("images", None)
            stored = await service.predict(request(make_image(number)))
            limits.give_back("images", None)
            return stored.prediction.model_id

        assert {await model_of(here, n) for n in range(4)} == {first.id}
        for number, serving in enumerate((second, first, second), 1):
            tools.serve_bundle(several, serving)
            before = await model_of(here, 0)
            assert before != serving.id, "the ledger was not read yet"
            await replicas[number % 2]._predictor.follow(1 + number)
            seen = [await model_of(service, n) for n in range(3) for service in (here, there)]
            assert serving.id in seen
            assert set(seen[seen.index(serving.id) :]) == {serving.id}
            state = await there._state()
            assert state.model is not None
            assert state.model.id == serving.id
        await stop(*replicas)

    asyncio.run(run())


def test_a_restored_ledger_is_followed_although_its_generation_is_older(
    several: Store, make_image: Callable[..., bytes]
) -> None:
    async def run() -> None:
        replicas = await started(several, 1)
        generation, results = await replicas[0].predict([request(make_image(0))], 99)  # type: ignore[misc]
        assert generation == 1
        assert isinstance(results[0], StoredPrediction)
        await stop(*replicas)

    asyncio.run(run())


def test_a_replica_that_cannot_load_the_model_leaves_the_others_alone(
    several: Store, tools: Any, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, broken_stores = holder.load_served, set()

    def load(store: Store, *given: Any) -> Any:
        if store in broken_stores:
            raise OSError("the disk of this node is gone")
        return sound(store, *given)

    monkeypatch.setattr(holder, "load_served", load)
    second = tools.make_bundle(several, 1)

    async def run() -> None:
        good, bad = await started(several)
        broken_stores.add(bad._predictor._store)
        tools.serve_bundle(several, second)
        await good._predictor.follow(2)
        service = RemoteService(several, SETTINGS, Handle(good, bad), Handle())  # type: ignore[arg-type]
        seen = [(await service.predict(request(make_image(n)))).prediction.model_id for n in range(4)]
        assert seen == [second.id] * 4, "calls to the other one were sent again"
        await good.check_health()
        with pytest.raises(UnavailableError, match="the disk of this node is gone"):
            await bad.check_health()
        # One that starts does not take requests before it has the model.
        new = Replica(SETTINGS, several.settings)
        broken_stores.add(new._predictor._store)
        with pytest.raises(UnavailableError, match=r"cannot load the model.*disk"):
            await new.check_health()
        await stop(good, bad)

    asyncio.run(run())


def test_a_call_to_a_lost_replica_is_sent_again_and_stored_once(
    several: Store, make_image: Callable[..., bytes]
) -> None:
    class Lost:
        """Writes its predictions and is killed before it can return them."""

        def __init__(self, replica: PredictorReplica) -> None:
            self.replica = replica

        async def predict(self, *arguments: Any) -> Any:
            await self.replica.predict(*arguments)
            raise RayError("the actor died")

    async def run() -> None:
        replicas = await started(several)
        service = RemoteService(several, SETTINGS, Handle(Lost(replicas[0]), replicas[1]), Handle())  # type: ignore[arg-type]
        asked = [request(make_image(n), request_id=f"r{n}") for n in range(4)]
        stored = await asyncio.gather(*map(service.predict, asked))
        with several.ledger.read() as tx:
            rows = tx.find(Prediction)
        assert sorted(row.id for row in rows) == sorted(each.prediction.id for each in stored)
        alone = RemoteService(several, ServingSettings(), Handle(Lost(replicas[0])), Handle())  # type: ignore[arg-type]
        with pytest.raises(UnavailableError, match="does not respond"):
            await alone.predict(request(make_image(5)))
        await stop(*replicas)

    asyncio.run(run())


def test_readiness_stays_and_names_the_replica_to_administrators_only(kept: Store) -> None:
    class Service:
        store, settings = kept, SETTINGS

        async def state(self) -> ServingState:
            replica = PredictorReplica.__name__
            model = served_model(kept)
            return ServingState(model, "ready", (f"predictor x of {replica}: the disk of this node is gone",))

    async def run() -> None:
        service: Any = Service()
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            told = await http.get("/readyz")
            assert (told.status_code, told.json()["detail"]) == (200, "some predictors do not serve")
            key = {"Authorization": f"Bearer {admin_token(kept.home)}"}
            told = await http.get("/readyz", headers=key)
            assert told.status_code == 200
            assert "the disk of this node is gone" in told.json()["detail"]

    asyncio.run(run())


# ---------------------------------------------------------------- what is stored once


def test_an_idempotency_key_sent_to_two_replicas_at_once_gives_one_prediction(
    several: Store, make_image: Callable[..., bytes]
) -> None:
    async def run() -> None:
        replicas = await started(several)
        for number in range(6):
            key = {"idempotency_key": f"key {number}"}
            calls = [replica._predictor.predict(request(make_image(number), **key)) for replica in replicas]
            one, other = await asyncio.gather(*calls)
            assert one.prediction == other.prediction
        both = [r._predictor.predict(request(make_image(n), idempotency_key="x")) for n, r in enumerate(replicas)]
        found = await asyncio.gather(*both, return_exceptions=True)
        assert sorted(type(each) for each in found if isinstance(each, Exception)) == [RefusedError]
        with several.ledger.read() as tx:
            assert tx.count(Prediction) == 7
        await stop(*replicas)

    asyncio.run(run())


def test_guardrails_count_what_all_replicas_predict(
    several: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    from records.models import register

    candidate = tools.make_bundle(several, 1)
    with several.ledger.begin() as tx:
        register(tx, candidate)
    roll_out(several, candidate.id, 99, actor="test", reason="a test")

    async def run() -> None:
        replicas = await started(several)
        for number in range(8):
            await replicas[number % 2]._predictor.predict(request(make_image(number), request_id=f"r{number}"))
        await stop(*replicas)

    asyncio.run(run())
    with several.ledger.read() as tx:
        running = current_rollout(tx)
        pairs = tx.count(Prediction, {"served": False})
    assert running is not None
    assert running.evidence["error"] == [pairs, 0]
    assert pairs >= 7


# ---------------------------------------------------------------- metrics, ports, room


def test_metrics_are_added_up_and_never_fall(service_store: Store) -> None:
    now_s = 0.0

    def value(text: bytes, name: str) -> float:
        families = text_string_to_metric_families(text.decode())
        return sum(s.value for family in families for s in family.samples if s.name == name)

    async def run() -> None:
        nonlocal now_s
        counts = SharedCounts(SETTINGS, lambda: now_s)
        members = [Metrics(service_store) for _ in range(3)]
        for number, metrics in enumerate(members):
            Reports(metrics, counts, f"ingress {number}")
        seen = []
        for turn in range(12):
            members[turn % 3].responded(200 + turn % 2)
            asked = members[(turn * 2) % 3]
            seen.append(value(asked.text(await asked.parts()), "relook_responses_total"))
            assert value(asked.text(await asked.parts()), "relook_responses_total") >= seen[-1]
        assert seen == sorted(seen)
        for metrics in members:
            metrics.in_flight.set(2)
            await metrics.parts()
        text = members[0].text(await members[0].parts())
        assert value(text, "relook_responses_total") == 12
        assert value(text, "relook_images_in_flight") == 6
        assert value(text, "relook_tasks_overdue") == value(Metrics(service_store).text(), "relook_tasks_overdue")
        # Two are killed: what they counted has happened, and what was in flight there is not any more.
        now_s += ALIVE_S + 1
        text = members[0].text(await members[0].parts())
        assert value(text, "relook_responses_total") == 12
        assert value(text, "relook_images_in_flight") == 2

    asyncio.run(run())


def test_several_listeners_share_a_port_only_if_they_say_so() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while scope["type"] == "lifespan":
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def run() -> None:
        port = free_port()
        servers = [HttpServer(app, "127.0.0.1", port, shares_port=True) for _ in range(2)]
        for server in servers:
            await server.start()
        with pytest.raises(ConfigError, match="cannot be used"):
            await HttpServer(app, "127.0.0.1", port).start()
        for server in servers:
            await server.stop()

    asyncio.run(run())


def test_samples_of_a_metric_keep_their_labels(service_store: Store) -> None:
    metrics = Metrics(service_store)
    metrics.flagged.labels(reason="other").inc(3)
    samples: Samples = metrics.samples()
    text = metrics.text([samples, samples]).decode()
    assert 'relook_flags_total{reason="other"} 6.0' in text
