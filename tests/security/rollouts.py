"""A champion, two candidates and the service that serves them, for tests of the verbs that replace models."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest

from records.errors import RelookError
from records.models import named_bundle, register, serve_model, serving_id, serving_model
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import AuditEvent, ModelRecord, ModelStatus, Rollout
from serving.access.keys import admin_token
from serving.settings import ServingSettings

VIOLATED = {"error": (50, 50)}
"""Counts of a candidate that no guardrail lets pass."""


class Models:
    """A store with a champion and two candidates."""

    def __init__(self, home: Path, tools: Any) -> None:
        self.home = home
        self.store = open_store(RecordsSettings(home=home))
        self.champion, self.a, self.b = (tools.make_bundle(self.store, seed).id for seed in (0, 1, 2))
        with self.store.ledger.begin() as tx:
            for model_id, status in ((self.champion, ModelStatus.REGISTERED), (self.a, ModelStatus.CANDIDATE),
                                     (self.b, ModelStatus.CANDIDATE)):  # fmt: skip
                register(tx, named_bundle_of(self.store, model_id), status=status)
            serve_model(tx, self.champion, ModelStatus.CHAMPION, replaces=None)

    def serving(self) -> str | None:
        with self.store.ledger.read() as tx:
            found = serving_model(tx)
        return found.id if found else None

    def status(self, model_id: str) -> ModelStatus:
        with self.store.ledger.read() as tx:
            return tx.require(ModelRecord, model_id).status

    def rollout(self, rollout_id: str) -> Rollout:
        with self.store.ledger.read() as tx:
            return tx.require(Rollout, rollout_id)

    def candidates_again(self) -> None:
        with self.store.ledger.begin() as tx:
            for model_id in (self.a, self.b):
                tx.update(ModelRecord, model_id, status=ModelStatus.CANDIDATE)

    def actions(self) -> list[str]:
        with self.store.ledger.read() as tx:
            return [event.action for event in tx.find(AuditEvent, order_by=("number",))]

    def promote_directly(self, model_id: str, status: ModelStatus = ModelStatus.CHAMPION) -> None:
        with self.store.ledger.begin() as tx:
            serve_model(tx, model_id, status, replaces=serving_id(tx))


def named_bundle_of(store: Store, model_id: str) -> Any:
    return named_bundle(store, str(store.home.bundles / model_id))


@pytest.fixture
def models(tmp_path: Path, tools: Any) -> Iterator[Models]:
    made = Models(tmp_path / "home", tools)
    yield made
    made.store.close()


@pytest.fixture
def http(models: Models, tools: Any) -> Iterator[httpx.Client]:
    """The real service in this process, called without our client."""
    with tools.run_service(models.store, ServingSettings(port=tools.free_port(), model_poll_s=0.05)) as running:
        headers = {"Authorization": f"Bearer {admin_token(models.store.home)}"}
        with httpx.Client(base_url=running.url, headers=headers, trust_env=False, timeout=600) as opened:
            yield opened


def at_once(*calls: Callable[[], object], offset: int = 0) -> list[object]:
    """Call all at the same moment from threads of their own; an error of the tree is a result."""
    barrier = Barrier(len(calls))

    def run(call: Callable[[], object]) -> object:
        barrier.wait(timeout=600)
        try:
            return call()
        except RelookError as error:
            return error

    # In another order at each turn, since the first thread is often the first to get the lock.
    turned = [*calls[offset:], *calls[:offset]]
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, turned))
