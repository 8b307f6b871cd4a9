"""A service in this process, for drills with several: app, predictor and ledger are real, Ray is left out.

    .venv/bin/python -m bench.drills.service_process HOME DATABASE PORT NAME

Two whole deployments with Ray do not fit on two cores. A thread of it holds a lease now and then and counts up under
it, reading in one transaction and writing in another, as a round or a sync does: with two holders a number would be
counted twice.
"""

import asyncio
import contextlib
import itertools
import random
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from records import lease
from records.errors import RefusedError, UnavailableError
from records.ids import new_id
from records.ledger import FENCES
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Cursor, Prediction
from serving.app import create_app
from serving.explainer import Explainer
from serving.http_server import HttpServer
from serving.messages import FoundCase, HeatMap, Method, PredictionRequest, ServingState, StoredPrediction
from serving.predictor import Predictor
from serving.settings import ServingSettings

LEASE, COUNT, COUNTED = "drill", "drill.count", "drill.counted"
LEASE_S = 3.0
"""Shorter than usual, so that some pauses outlast it."""


@dataclass(frozen=True)
class LocalService:
    """The service in one process and event loop."""

    store: Store
    settings: ServingSettings
    predictor: Predictor
    explainer: Explainer

    async def predict(self, request: PredictionRequest) -> StoredPrediction:
        """Predict one image."""
        return await self.predictor.predict(request)

    async def explain(
        self, prediction: Prediction, method: Method, target: str | None, versus: str | None = None
    ) -> HeatMap:
        """Explain a stored prediction."""
        return await asyncio.to_thread(self.explainer.explain, prediction, method, target, versus)

    async def explain_image(self, image: bytes, method: Method, target: str | None, versus: str | None) -> HeatMap:
        """Explain an image that is not stored."""
        return await asyncio.to_thread(self.explainer.explain_image, image, method, target, versus)

    async def nearest(self, prediction: Prediction, limit: int) -> list[FoundCase]:
        """Find confirmed cases like its image."""
        return await asyncio.to_thread(self.explainer.nearest, prediction, limit)

    async def state(self) -> ServingState:
        """Return which model serves."""
        return self.predictor.state()


async def serve(store: Store, port: int) -> None:
    """Serve until the process is killed."""
    settings = ServingSettings(port=port, page=False, model_poll_s=0.2, rate_limit_per_minute=100_000)
    predictor = Predictor(store, settings)
    await predictor.start()
    service = LocalService(store, settings, predictor, Explainer(store, settings))
    server = HttpServer(create_app(service), settings.host, settings.port)
    await server.start()
    while True:
        await asyncio.sleep(1.0)
        await server.check()
        predictor.check()


def count_up(store: Store, name: str) -> None:
    """Take the lease again and again, and count while it is held."""
    chance = random.Random(new_id())
    while True:
        with (
            contextlib.suppress(RefusedError, UnavailableError),
            lease.hold(store.ledger, LEASE, wait_s=1.0),
        ):
            fence = FENCES.get()[-1].number
            for _ in range(chance.randint(1, 30)):
                with store.ledger.read() as tx:
                    current = tx.get(Cursor, COUNT)
                number = int(current.position["number"]) + 1 if current else 1
                time.sleep(0.1 * chance.random())
                with store.ledger.begin() as tx:
                    if current is None:
                        tx.add(Cursor(name=COUNT, position={}))
                    order = tx.count(Cursor)  # cursors are only added: the order of the commits
                    tx.update(Cursor, COUNT, position={"number": number})
                    row = {"number": number, "fence": fence, "holder": name, "order": order}
                    tx.add(Cursor(name=f"{COUNTED} {new_id()}", position=row))
        time.sleep(0.3 * chance.random())


def main() -> None:
    """Serve from a home and a database."""
    home, database, port, name = sys.argv[1:]
    lease.LEASE_S = LEASE_S
    for attempt in itertools.count():
        try:
            store = open_store(RecordsSettings(home=Path(home), database=database))
            break
        except UnavailableError:
            if attempt == 60:
                raise
            time.sleep(0.5)
    threading.Thread(target=count_up, args=(store, name), daemon=True).start()
    asyncio.run(serve(store, int(port)))


if __name__ == "__main__":
    main()
