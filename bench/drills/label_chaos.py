"""Push tasks and pull annotations over a faulty network with kills: 0 lost, 0 doubled, the order kept.

A proxy between Relook and a real Label Studio drops requests before they arrive, drops responses after Label Studio
has committed, sends requests twice and delays others. A process that syncs in a loop, as `relook label sync --watch`
does, runs through it and is killed (SIGKILL) after a random number of requests, half of the times while tasks are
pushed and half while annotations are pulled. All of Label Studio's webhook calls are lost, so the poll alone has to
find every annotation. At the end some annotations are edited and deleted, and the ledger is compared with Label
Studio. Prints one JSON line.

.venv/bin/python -m bench.drills.label_chaos --items 2000 --kills 20 --drop 0.3 --delay-s 5
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx

from bench.label.bulk import add_review_items, counted
from labeling.client import LabelStudioClient
from labeling.local_server import LocalLabelStudio
from labeling.project import known_project
from labeling.pull import pull
from labeling.settings import LabelingSettings
from labeling.sync import sync
from labeling.tasks import annotation_result
from records.errors import LabelStudioError
from records.home import open_home
from records.notifications import WEBHOOK_PATH
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import ReviewItem, ReviewState

# A fork server that has imported everything: starting a process takes little time even on a loaded machine.
_PROCESSES = get_context("forkserver")
_PROCESSES.set_forkserver_preload(["labeling.sync", "records.store"])
_TIMEOUT_S = 3600
_KEPT = ("authorization", "content-type", "accept")


class ChaosProxy:
    """A proxy on a free loopback port that drops, repeats and delays a share of the requests.

    Args:
        upstream: base URL of the real server.
        drop: share of requests that get no response, half of them after they were carried out; 0 to 1.
        delay_share: share of requests that are delayed, 0 to 1.
        delay_s: length of a delay, seconds.
        seed: of all random choices.
    """

    def __init__(self, upstream: str, *, drop: float, delay_share: float, delay_s: float, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.upstream = upstream
        chance, lock, counts = random.Random(seed), threading.Lock(), self.counts
        http = httpx.Client(base_url=upstream, timeout=60, trust_env=False)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def _forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if self.path == WEBHOOK_PATH:
                    counts["webhooks_lost"] += 1
                    self.close_connection = True
                    self.connection.close()
                    return
                with lock:
                    fate, late = chance.random(), chance.random()
                    twice = chance.random() < 0.05 and self.command in ("POST", "PATCH")
                    counts["requests"] += 1
                    counts["dropped"] += fate < drop
                    counts["twice"] += twice
                if late < delay_share:
                    time.sleep(delay_s)
                self.close_connection = True
                if fate < drop / 2:
                    self.connection.close()
                    return
                headers = {name: self.headers[name] for name in _KEPT if name in self.headers}
                # Carried out, and only then dropped: the caller cannot tell this from a request that never came.
                for _ in range(2 if twice else 1):
                    response = http.request(self.command, self.path, content=body, headers=headers)
                if fate < drop:
                    self.connection.close()
                    return
                self.send_response(response.status_code)
                self.send_header("content-type", response.headers.get("content-type", "application/json"))
                self.send_header("content-length", str(len(response.content)))
                self.send_header("connection", "close")
                self.end_headers()
                self.wfile.write(response.content)

            do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _forward  # noqa: N815 - names of the library

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Ignore connections that a killed client closed."""

        self._http = http
        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "ChaosProxy":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._http.close()


def compare(store: Store, client: LabelStudioClient) -> dict[str, Any]:
    """Return the counts of `counted`, and whether Label Studio lists the tasks by priority."""
    with store.ledger.read() as tx:
        items = {item.id: item for item in tx.find(ReviewItem)}
    exact = counted(store, client)
    order = {"project": known_project(store, client), "query": json.dumps({"ordering": ["tasks:predictions_score"]})}
    size = {"fields": "all", "include": "id,meta", "page_size": exact["tasks"] + 1}
    listed = client.request("GET", "api/tasks/", "list", params={**order, **size})
    priorities = [items[task["meta"]["relook_item"]].priority for task in listed["tasks"]]
    return {
        **exact,
        "order_kept": len(priorities) == exact["tasks"] and priorities == sorted(priorities, reverse=True),
    }


def main() -> int:
    """Run the drill once; exit with 1 if anything was lost, duplicated or out of order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--drop", type=float, default=0.3)
    parser.add_argument("--delay-s", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=50, help="tasks in one import")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-chaos-") as folder:
        home = open_home(Path(folder))
        # Started so that webhooks may reach this machine; the proxy receives them.
        local = LocalLabelStudio(home, LabelingSettings(port=0, webhook_url="http://127.0.0.1:8000"))
        server = local.up()
        store = open_store(RecordsSettings(home=home.root))
        try:
            add_review_items(store, arguments.items, arguments.seed)
            with (
                ChaosProxy(
                    server.url, drop=arguments.drop, delay_share=0.02, delay_s=arguments.delay_s, seed=arguments.seed
                ) as proxy,
                LabelStudioClient(server.url, server.token) as client,
            ):
                found = run_faults(
                    store, client, proxy, server.token.get_secret_value(), kills=arguments.kills, seed=arguments.seed,
                    batch=arguments.batch,
                )  # fmt: skip
        finally:
            store.close()
            local.down()
    print(json.dumps(found))
    return int(bool(found["lost"] or found["doubled"] or found["different"] or not found["order_kept"]))


def run_faults(
    store: Store, client: LabelStudioClient, proxy: ChaosProxy, token: str, *, kills: int, seed: int, batch: int
) -> dict[str, Any]:
    """Push all tasks, annotate them in waves, edit and delete, with kills in between; compare."""
    chance, began = random.Random(seed), time.monotonic()
    syncing = Syncing(store, proxy, token, batch)
    while syncing.killed < kills // 2 and syncing.waits():
        syncing.run(chance.randint(1, 25), until=lambda: not syncing.waits())
    killed_pushing = syncing.killed
    syncing.run(None, until=lambda: not syncing.waits())
    pushed_s = time.monotonic() - began
    with store.ledger.read() as tx:
        items = tx.find(ReviewItem, order_by=("id",))
    waves, made = max(kills - killed_pushing, 1), []
    for wave in range(waves):
        made += _annotate(client, store, items[wave::waves])
        if syncing.killed < kills:
            syncing.run(chance.randint(2, 12))
    for number in made[: len(items) // 100]:
        client.request("PATCH", f"api/annotations/{number}/", "edit", body={"result": annotation_result("bkl")})
    for number in made[len(items) // 100 : len(items) // 50]:
        client.request("DELETE", f"api/annotations/{number}/", "delete")

    def equal() -> bool:
        found = compare(store, client)
        return not (found["lost"] or found["different"])

    syncing.run(None, until=equal)
    with LabelStudioClient(proxy.upstream, token) as direct:
        # Without the proxy: another pull must add nothing.
        again = pull(store, direct, LabelingSettings())
    times = {"pushed_s": round(pushed_s, 1), "seconds": round(time.monotonic() - began, 1)}
    kinds = {"killed_pushing": killed_pushing, "killed_pulling": syncing.killed - killed_pushing}
    repeated = {"second_pull_adds": again.new_labels + again.deleted}
    return {**compare(store, client), **repeated, **kinds, **proxy.counts, **times}


class Syncing:
    """Runs and kills processes that sync through the proxy; `batch` is the number of tasks in an import."""

    def __init__(self, store: Store, proxy: ChaosProxy, token: str, batch: int) -> None:
        self.killed = 0
        self._store, self._proxy = store, proxy
        self._arguments = (store.home.root, proxy.url, token, batch)

    def waits(self) -> bool:
        """Return whether a review item has not been pushed yet."""
        with self._store.ledger.read() as tx:
            return tx.count(ReviewItem, where={"state": ReviewState.NEW}) > 0

    def run(self, requests: int | None, until: Callable[[], bool] = lambda: False) -> None:
        """Run one process until it has sent a number of requests, or until a condition holds.

        Args:
            requests: number after which the process is killed; None means no limit.
            until: condition that ends the run.
        """
        deadline, before = time.monotonic() + _TIMEOUT_S, self._proxy.counts["requests"]
        process = _PROCESSES.Process(target=sync_forever, args=self._arguments, daemon=True)
        process.start()
        try:
            while time.monotonic() < deadline:
                if requests is not None and self._proxy.counts["requests"] - before >= requests:
                    self.killed += 1
                    print(f"kill {self.killed} after {requests} requests", file=sys.stderr, flush=True)
                    return
                if until():
                    return
                if not process.is_alive():
                    raise SystemExit(f"the process that syncs ended by itself with {process.exitcode}")
                time.sleep(0.02 if requests is not None else 1.0)
        finally:
            process.kill()
            process.join()
        raise SystemExit(f"not done after {_TIMEOUT_S} s")


def sync_forever(home: Path, url: str, token: str, batch: int) -> None:
    """Sync in a loop; a failure of Label Studio is retried."""
    store = open_store(RecordsSettings(home=home))
    settings = LabelingSettings(push_batch=batch, blind_share=0.0, webhook_url=url)
    while True:
        try:
            with LabelStudioClient(url, token) as client:
                sync(store, client, settings)
        except LabelStudioError:
            pass
        time.sleep(0.5)


def _annotate(client: LabelStudioClient, store: Store, items: list[ReviewItem]) -> list[int]:
    codes = store.taxonomy.codes

    def annotate(numbered: tuple[int, ReviewItem]) -> int | None:
        label = annotation_result(codes[numbered[0] % len(codes)])
        return client.create_annotation(numbered[1].task_id or 0, label, key=uuid.uuid4())

    with ThreadPoolExecutor(4) as pool:
        return [number for number in pool.map(annotate, enumerate(items)) if number is not None]


if __name__ == "__main__":
    sys.exit(main())
