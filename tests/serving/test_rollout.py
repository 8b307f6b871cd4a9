"""Rollouts under live traffic: no failed request, the more cautious prediction is served, broken candidates end."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bench.drills.release_drills import observations_needed
from records.errors import AccessError, RefusedError, RelookError, UnknownIdError
from records.models import current_rollout, register, serving_id
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Arm, ModelRecord, ModelStatus, Prediction, ReasonCode, Rollout, RolloutStage
from serving.access.keys import admin_token
from serving.client import Client
from serving.rollout.control import begin, promote, roll_back, undo_promotion
from serving.rollout.guardrails import GUARDRAILS, log_evidence, threshold, violated_guardrail
from serving.schemas import RolloutRequest
from serving.settings import ServingSettings
from serving.triage import CAUTION


def test_evidence_does_not_grow_on_average_within_the_limit() -> None:
    generator = np.random.default_rng(3)
    guardrail = GUARDRAILS["downgrade"]
    ended = 0
    for _ in range(300):
        seen = np.cumsum(generator.random(500) < guardrail.limit)
        ended += any(
            log_evidence(n + 1, int(x), guardrail.limit) >= threshold() for n, x in enumerate(seen) if n % 5 == 0
        )
    assert ended / 300 <= 0.05 / len(GUARDRAILS) + 0.02


@pytest.mark.parametrize(
    ("name", "rate", "most"), [("error", 1.0, 2), ("non_finite", 1.0, 2), ("slow", 1.0, 5), ("downgrade", 1.0, 3)]
)
def test_a_plain_violation_is_found_within_few_observations(name: str, rate: float, most: int) -> None:
    needed = observations_needed(name, rate)
    assert needed is not None
    assert needed <= most
    assert observations_needed(name, GUARDRAILS[name].limit) is None
    assert violated_guardrail({name: (needed, needed)}) is GUARDRAILS[name]


@pytest.fixture
def kept(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[Store]:
    opened = open_store(RecordsSettings(home=tmp_path_factory.mktemp("rollout")))
    tools.serve_bundle(opened, tools.make_bundle(opened, 0, bias={"bcc": -2.0}))
    yield opened
    opened.close()


@pytest.fixture
def running(kept: Store, tools: Any) -> Iterator[Any]:
    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.05)
    with tools.run_service(kept, settings) as service:
        yield service


def candidate(store: Store, bundle: Any) -> str:
    with store.ledger.begin() as tx:
        register(tx, bundle, status=ModelStatus.CANDIDATE)
    return str(bundle.id)


class Traffic:
    """Sends images from two threads until it is stopped."""

    def __init__(self, url: str, make_image: Callable[..., bytes]) -> None:
        self._url, self._image = url, make_image
        self._stopped = threading.Event()
        self.predictions: list[Any] = []
        self.failures: list[RelookError] = []
        self._threads = [threading.Thread(target=self._send, args=(start,)) for start in (0, 10)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=600)

    def more(self, number: int) -> None:
        deadline, wanted = time.monotonic() + 600, len(self.predictions) + number
        while len(self.predictions) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _send(self, number: int) -> None:
        with Client(self._url, retry_s=0.0) as client:
            while not self._stopped.is_set():
                try:
                    self.predictions.append(client.predict(self._image(number % 20)))
                except RelookError as error:
                    self.failures.append(error)
                number += 1


def test_shadow_canary_and_full_without_a_failed_request(
    kept: Store, running: Any, tools: Any, make_image: Callable[..., bytes]
) -> None:
    model_id = candidate(kept, tools.make_bundle(kept, 1, bias={"bcc": -2.0}))
    with Traffic(running.url, make_image) as traffic, Client(running.url, admin_token(kept.home)) as admin:
        traffic.more(5)
        started = admin.roll_out(RolloutRequest(model=model_id, champion=champion_of(kept)))
        assert started.stage is RolloutStage.SHADOW
        wait_for(kept, Arm.SHADOW)
        # Two untrained networks disagree by nature; this test is about failed requests only.
        with contextlib.suppress(RefusedError):  # a guardrail may end it at any moment
            for percent in (10, 60):
                admin.roll_out(RolloutRequest(model=model_id, rollout=started.id, percent=percent))
                traffic.more(20)
            admin.roll_out(RolloutRequest(model=model_id, rollout=started.id, percent=100))
            deadline = time.monotonic() + 600
            while admin.model().id != model_id:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        traffic.more(10)
    assert traffic.failures == []
    check_pairs(kept, {prediction.request_id: prediction for prediction in traffic.predictions})


def test_a_candidate_with_nan_output_is_rolled_back_and_nan_never_served(
    kept: Store, running: Any, tools: Any, make_image: Callable[..., bytes]
) -> None:
    model_id = candidate(kept, tools.make_bundle(kept, 2, status_of_images="overflow"))
    with Traffic(running.url, make_image) as traffic:
        begin(kept, model_id, 99, actor="test")
        ended = wait_until_ended(kept, model_id)
        traffic.more(5)
    assert traffic.failures == []
    assert ended.stage is RolloutStage.ROLLED_BACK
    assert "finite" in (ended.why or "")
    assert all(prediction.label is not None for prediction in traffic.predictions)
    with kept.ledger.read() as tx:
        predicted = tx.find(Prediction, where={"model_id": model_id})
        assert tx.require(ModelRecord, model_id).status is ModelStatus.REFUSED
    assert predicted
    # Two observations suffice; images in flight in the same two batches come on top.
    assert len(predicted) <= 8
    # Its finite predictions may be served; non-finite ones never are.
    assert not any(p.served for p in predicted if ReasonCode.NON_FINITE in p.reasons)


def test_a_candidate_with_wrong_golden_logits_gets_no_traffic(kept: Store, tools: Any) -> None:
    wrong = np.full((4, len(kept.taxonomy.codes)), 9.0, dtype=np.float32)
    model_id = candidate(kept, tools.make_bundle(kept, 3, golden_logits=wrong))
    with pytest.raises(RefusedError, match=r"may not take traffic: .*golden"):
        begin(kept, model_id, 10, actor="test")
    with kept.ledger.read() as tx:
        assert current_rollout(tx) is None


def test_what_may_not_be_rolled_out_is_refused(kept: Store, running: Any, tools: Any) -> None:
    first = candidate(kept, tools.make_bundle(kept, 4))
    second = candidate(kept, tools.make_bundle(kept, 5))
    plain = tools.make_bundle(kept, 6)
    with kept.ledger.begin() as tx:
        register(tx, plain)
        (champion,) = tx.find(ModelRecord, where={"status": ModelStatus.CHAMPION})
    with pytest.raises(RefusedError, match="not a candidate"):
        begin(kept, plain.id, 0, actor="test")
    with pytest.raises(RefusedError, match="already serves"):
        begin(kept, champion.id, 0, actor="test")
    with pytest.raises(UnknownIdError, match="no rollout is in progress"):
        roll_back(kept, "0" * 32, actor="test", why="x")
    rollout = begin(kept, first, 0, actor="test")
    with pytest.raises(RefusedError, match="is in progress"):
        begin(kept, second, 0, actor="test")
    with Client(running.url, retry_s=0.0) as client, pytest.raises(AccessError, match="admin"):
        client.roll_back(rollout.id, "no")
    promote(kept, rollout.id, first, actor="test")
    undo_promotion(kept, first, champion.id, actor="test", why="complaints")
    with kept.ledger.read() as tx:
        assert tx.require(Rollout, rollout.id).stage is RolloutStage.ROLLED_BACK
        assert tx.require(ModelRecord, champion.id).status is ModelStatus.CHAMPION
        assert tx.require(ModelRecord, first).status is ModelStatus.REFUSED


def test_without_a_champion_and_beyond_its_share_no_rollout_starts(store: Store, tools: Any) -> None:
    bundle, other = tools.make_bundle(store, 0), tools.make_bundle(store, 1)
    model_id = candidate(store, bundle)
    with pytest.raises(UnknownIdError, match="there is no champion yet to compare with; `relook promote` makes one"):
        begin(store, model_id, 10, actor="test")
    tools.serve_bundle(store, other)
    with pytest.raises(RefusedError, match="a rollout starts with at most 99 %"):
        begin(store, model_id, 100, actor="test")
    # A model that the gate had refused, with a reason: it is refused still when the rollout ends.
    with store.ledger.begin() as tx:
        tx.update(ModelRecord, model_id, status=ModelStatus.REFUSED)
    rollout = begin(store, model_id, 10, actor="test", reason="a study")
    roll_back(store, rollout.id, actor="test", why="it is over")
    with store.ledger.read() as tx:
        assert tx.require(ModelRecord, model_id).status is ModelStatus.REFUSED
        assert current_rollout(tx) is None


def champion_of(store: Store) -> str:
    with store.ledger.read() as tx:
        return str(serving_id(tx))


def wait_for(store: Store, arm: Arm) -> None:
    deadline = time.monotonic() + 600
    while True:
        with store.ledger.read() as tx:
            if tx.count(Prediction, where={"arm": arm}):
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_ended(store: Store, model_id: str) -> Any:
    deadline = time.monotonic() + 600
    while True:
        with store.ledger.read() as tx:
            (found,) = tx.find(Rollout, where={"candidate_id": model_id})
        if found.ended_at is not None:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_pairs(store: Store, predictions: dict[str, Any]) -> None:
    """Of every pair exactly one row was served, it is what the caller got, and it is the more cautious one."""
    with store.ledger.read() as tx:
        rows = [p for p in tx.find(Prediction) if p.arm is not Arm.SHADOW]
    by_request: dict[str, list[Prediction]] = {}
    for row in rows:
        by_request.setdefault(row.request_id, []).append(row)
    pairs = 0
    for request_id, prediction in predictions.items():
        group = by_request[request_id]
        (served,) = [row for row in group if row.served]
        assert served.id == prediction.id
        assert CAUTION[served.decision] == max(CAUTION[row.decision] for row in group)
        pairs += len(group) == 2
    assert pairs > 0
