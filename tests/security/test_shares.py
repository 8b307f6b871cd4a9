"""What one caller can take from the others: slots, connections, turns, rates and the text of an item."""

import asyncio
import io
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
from PIL import Image

from records.frames import Crop
from records.store import Store
from records.types import ReviewItem, Scope
from serving.access.keys import Caller, create_key
from serving.access.shares import Shares, Turns
from serving.messages import HeatMap
from serving.metrics import Metrics
from serving.routes.admission import Admission, image_cost
from serving.routes.authenticator import Authenticator
from serving.settings import ServingSettings
from tests.security.front import JPEG, connect, head, honest


def test_idle_bodies_of_one_key_take_no_slot_of_another(
    front: Any, keys: dict[str, str], make_image: Callable[..., bytes]
) -> None:
    image = make_image(0)
    with ExitStack() as stack:
        for number in range(28):
            raw = stack.enter_context(closing(connect(front)))
            length = f"Content-Length: {len(image)}\r\n".encode()
            raw.sendall(head("/v1/predictions", keys["greedy"], JPEG, length) + image[: number * 10])
        assert honest(front, keys, image, 10) == [200] * 10


def test_more_silent_connections_than_there_may_be_keep_nobody_out(
    front: Any, keys: dict[str, str], make_image: Callable[..., bytes]
) -> None:
    with ExitStack() as stack:
        for source in range(2, 8):
            for _ in range(30):
                raw = socket.create_connection(
                    ("127.0.0.1", front.settings.port), timeout=600, source_address=(f"127.0.0.{source}", 0)
                )
                stack.enter_context(closing(raw))
                raw.sendall(b"GET / HTTP/1.1\r\n")
        assert honest(front, keys, make_image(0)) == [200] * 5


def test_requests_that_never_end_leave_connections_of_their_address_to_others(
    front: Any, keys: dict[str, str], make_image: Callable[..., bytes]
) -> None:
    with ExitStack() as stack:
        for _ in range(60):
            raw = stack.enter_context(closing(connect(front)))
            raw.sendall(head("/page/upload", None, b"Content-Length: 1000\r\n") + b"a" * 10)
            raw.sendall(head("/v1/predictions/batch", keys["greedy"], b"Content-Length: 900000\r\n"))
        assert honest(front, keys, make_image(0)) == [200] * 5


def test_one_key_with_all_it_may_send_leaves_room_for_another(
    front: Any, keys: dict[str, str], make_image: Callable[..., bytes]
) -> None:
    stop, seen = threading.Event(), []

    def flood(number: int) -> None:
        headers = {"Content-Type": "image/jpeg", "Authorization": f"Bearer {keys['greedy']}"}
        with httpx.Client(base_url=front.url, trust_env=False, timeout=600) as client:
            while not stop.is_set():
                response = client.post("/v1/predictions", content=make_image(number % 4), headers=headers)
                seen.append(response.status_code)

    with ThreadPoolExecutor(24) as threads:
        flooding = [threads.submit(flood, number) for number in range(24)]
        while len(seen) < 24:
            time.sleep(0.05)
        found = honest(front, keys, make_image(0), 10)
        stop.set()
        for future in flooding:
            future.result()
    assert found == [200] * 10
    assert set(seen) <= {200, 429}


def test_a_batch_costs_as_much_as_its_images(kept: Store, tools: Any, make_image: Callable[..., bytes]) -> None:
    _, token = create_key(kept, name="batches", organisation="b", scopes=[Scope.PREDICT, Scope.FLAG], actor="test")
    settings = ServingSettings(port=tools.free_port(), rate_limit_per_minute=40, model_poll_s=0.1)
    headers = {"Authorization": f"Bearer {token}"}
    with (
        tools.run_service(kept, settings) as running,
        httpx.Client(base_url=running.url, headers=headers, trust_env=False, timeout=600) as client,
    ):
        batch = [("image", (str(n), make_image(n), "image/jpeg")) for n in range(16)]
        first = client.post("/v1/predictions/batch", files=batch)
        assert first.status_code == 200
        prediction = first.json()["items"][0]["prediction"]["id"]
        assert client.post("/v1/predictions/batch", files=batch).status_code == 200
        refused = client.post("/v1/predictions/batch", files=batch)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert "retry-after" in refused.headers
        # An explanation of many evaluations costs more than is left.
        slow = client.get(f"/v1/predictions/{prediction}/explanation", params={"method": "occlusion"})
        assert slow.status_code == 429


def test_flags_cannot_make_the_text_of_an_item_grow_without_end(
    front: Any, kept: Store, keys: dict[str, str], make_image: Callable[..., bytes]
) -> None:
    headers = {"Authorization": f"Bearer {keys['greedy']}"}
    with httpx.Client(base_url=front.url, headers=headers, trust_env=False, timeout=600) as client:
        predicted = client.post(
            "/v1/predictions", content=make_image(40), headers={"Content-Type": "image/jpeg"}
        ).json()
        path = f"/v1/predictions/{predicted['id']}/flags"
        seen = [
            client.post(path, json={"reason": "other", "comment": f"{number} " + "x" * 1500}).status_code
            for number in range(60)
        ]
    with kept.ledger.read() as tx:
        items = tx.find(ReviewItem, where={"image_id": predicted["image_id"]})
    assert seen[0] == 200
    assert set(seen) == {200, 409}, "more flags than annotators could read are refused with one sentence"
    assert sum(len((item.comment or "").encode()) for item in items) < 100_000


def test_shares_leave_something_for_the_next_owner() -> None:
    shares = Shares(60)
    taken = {name: sum(shares.take(name) for _ in range(100)) for name in ("a", "b", "c")}
    assert taken["a"] == 40
    assert shares.take("d"), "whatever three callers take, a fourth finds room"
    assert not shares.take("a")
    alone = Shares(2)
    assert [alone.take(None) for _ in range(3)] == [True, True, False]
    alone.give_back(None)
    assert alone.take(None)


def test_a_costly_caller_does_not_run_before_a_cheap_one() -> None:
    async def order() -> list[str]:
        turns, began, release = Turns(alone=64, together=16), [], asyncio.Event()

        async def work(owner: str, cost: int) -> None:
            async with turns.turn(owner, cost):
                began.append(owner)
                await release.wait()

        first = asyncio.create_task(work("cheap", 1))
        await asyncio.sleep(0)
        costly = [asyncio.create_task(work("costly", 13)) for _ in range(5)]
        cheap = [asyncio.create_task(work("cheap", 1)) for _ in range(5)]
        await asyncio.sleep(0.01)
        found = list(began)
        # One that is cancelled while it waits passes its turn on.
        costly[1].cancel()
        release.set()
        await asyncio.gather(first, *costly, *cheap, return_exceptions=True)
        return [*found, f"{len(began)} in all"]

    assert asyncio.run(order()) == ["cheap", "costly", *["cheap"] * 5, "10 in all"]


def test_a_large_image_costs_more_than_a_small_one(make_image: Callable[..., bytes]) -> None:
    large = io.BytesIO()
    Image.new("L", (7000, 7000)).save(large, "PNG")
    assert image_cost(make_image(0)) == 1
    assert image_cost(large.getvalue()) == 13
    assert image_cost(b"\xff\xd8" + b"\xff\xe0\x00\x02" * 100_000) == 4, "the size is not in its first bytes"


def test_heat_maps_of_one_key_wait_for_each_other_and_not_another_key_for_them(kept: Store) -> None:
    service: Any = SimpleNamespace(store=kept, settings=ServingSettings(explainer_cpus=1.0))
    began, done = [], asyncio.Event()

    def compute(name: str) -> Callable[[], Any]:
        async def computed() -> HeatMap:
            began.append(name)
            await done.wait()
            return HeatMap("gradcam", True, "layer", "bcc", np.zeros((1, 1), np.float32), b"", Crop.CENTER)

        return computed

    async def run() -> None:
        admission = Admission(service, Authenticator(kept, service.settings), Metrics(kept))
        callers = {name: Caller(name, "clinic", frozenset(Scope)) for name in ("greedy", "honest")}
        names = ["greedy 1", "greedy 2", "greedy 3", "honest 1"]
        tasks = [asyncio.create_task(admission.explain(callers[n.split()[0]], "gradcam", compute(n))) for n in names]
        while len(began) < 2:
            await asyncio.sleep(0)
        # One that waits and is cancelled leaves its place to the next.
        tasks[1].cancel()
        assert began == ["greedy 1", "honest 1"]
        done.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert began == ["greedy 1", "honest 1", "greedy 3"]

    asyncio.run(run())
