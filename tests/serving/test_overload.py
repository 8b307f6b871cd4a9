"""Overload: a request beyond the limit gets 429 with Retry-After at once, and the client repeats it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from records.store import Store
from records.types import Prediction
from serving.client import Client
from serving.settings import ServingSettings


def test_more_than_admitted_gets_429_and_the_client_waits(
    store: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    tools.serve_bundle(store, tools.make_bundle(store))
    settings = ServingSettings(port=tools.free_port(), max_in_flight=2, max_batch_size=2)
    with tools.run_service(store, settings) as running, ThreadPoolExecutor(16) as threads:

        def post(number: int) -> httpx.Response:
            headers = {"Content-Type": "image/jpeg"}
            return httpx.post(f"{running.url}/v1/predictions", content=make_image(number), headers=headers, timeout=600)

        responses = list(threads.map(post, range(48)))
        refused = [response for response in responses if response.status_code == 429]
        assert refused
        assert {response.status_code for response in responses} == {200, 429}
        assert refused[0].json()["code"] == "busy"
        assert refused[0].headers["retry-after"] == "1"

        with Client(running.url) as client:
            patient = list(threads.map(lambda number: client.predict(make_image(number)), range(8)))
    with store.ledger.read() as tx:
        assert tx.count(Prediction) == len(responses) - len(refused) + len(patient)
