"""Push, answer and pull through a bad network with kills: 0 lost, 0 doubled, the order kept. One JSON line.

A proxy stands between Relook and a real Label Studio. It drops requests before they arrive, drops answers
after Label Studio has committed, sends requests twice and holds others back. `relook label sync` runs
through it and is killed (SIGKILL) at random moments.

.venv/bin/python bench/label_chaos.py --items 2000 --kills 20 --drop 0.3 --delay-s 5
"""

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image as PillowImage

from labeling.client import LabelStudioClient
from labeling.local_server import LocalLabelStudio
from labeling.project import known_project
from labeling.settings import LabelingSettings
from labeling.tasks import answer_result
from records.home import open_home
from records.ids import new_id, utc_now
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import ExpertLabel, Image, ReasonCode, ReviewItem, ReviewState

_KEPT = ("authorization", "content-type", "accept")


class ChaosProxy:
    """A proxy on a free port of loopback that harms a share of what passes.

    Args:
        upstream: base URL of the real server.
        drop: share of requests that get no answer, half of them after they were carried out; 0 to 1.
        delay_share: share that is held back.
        delay_s: for how long, seconds.
        seed: of all draws.
    """

    def __init__(self, upstream: str, *, drop: float, delay_share: float, delay_s: float, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        chance, lock, counts = random.Random(seed), threading.Lock(), self.counts
        http = httpx.Client(base_url=upstream, timeout=60, trust_env=False)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
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
                for _ in range(2 if twice else 1):
                    answer = http.request(self.command, self.path, content=body, headers=headers)
                if fate < drop:
                    self.connection.close()
                    return
                self.send_response(answer.status_code)
                self.send_header("content-type", answer.headers.get("content-type", "application/json"))
                self.send_header("content-length", str(len(answer.content)))
                self.send_header("connection", "close")
                self.end_headers()
                self.wfile.write(answer.content)

            do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _pass_on  # noqa: N815 - names of the library

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A client that was killed hung up; that is the point."""

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


def add_questions(store: Store, count: int, seed: int) -> None:
    """Write `count` questions about generated pictures, with priorities in random order."""
    chance = np.random.default_rng(seed)
    for start in range(0, count, 500):
        records: list[Image | ReviewItem] = []
        for _ in range(start, min(start + 500, count)):
            buffer = io.BytesIO()
            pixels = np.kron(chance.integers(0, 255, (6, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8))
            PillowImage.fromarray(pixels).save(buffer, "JPEG")
            blob, now = store.blobs.put(buffer.getvalue()), utc_now()
            records.append(
                Image(
                    id=blob, uri=store.blobs.uri(blob), format="jpeg", width_px=48, height_px=48,
                    provenance="bench", created_at=now,
                )
            )  # fmt: skip
            records.append(
                ReviewItem(
                    id=new_id(), created_at=now, image_id=blob, reasons=[ReasonCode.REFER],
                    priority=float(chance.random() * 300),
                )
            )  # fmt: skip
        with store.ledger.begin() as tx:
            tx.add(*records)


def compare(store: Store, client: LabelStudioClient) -> dict[str, Any]:
    """Hold the ledger against Label Studio itself.

    Args:
        store: with what was pushed and pulled.
        client: connected without the proxy.
    Returns:
        What is lost, doubled, or out of order.
    """
    project_id = known_project(store, client)
    assert project_id is not None
    rows = [row for page in client.list_tasks(project_id, with_annotations=True) for row in page]
    with store.ledger.read() as tx:
        items = {item.id: item for item in tx.find(ReviewItem)}
        labels = tx.find(ExpertLabel, order_by=("created_at", "id"))
    tasks = Counter(str(row.meta.get("relook_item")) for row in rows)
    said = {a.id: a.result[0]["value"]["choices"][0] for row in rows for a in row.annotations if not a.was_cancelled}
    known = {label.annotation_id: label.label for label in labels if not label.deleted}
    gone = {label.annotation_id for label in labels if label.deleted}
    order = {"project": project_id, "query": json.dumps({"ordering": ["tasks:predictions_score"]}), "fields": "all"}
    listed = client.request("GET", "api/tasks/", "list", params={**order, "include": "id,meta", "page_size": 100})
    asked = [items[task["meta"]["relook_item"]].priority for task in listed["tasks"]]
    return {
        "tasks": len(rows),
        "annotations": len(said),
        "lost": sum(number not in tasks for number in items) + len(said.keys() - (known.keys() - gone)),
        "doubled": sum(n - 1 for n in tasks.values())
        + len(labels) - len({(label.annotation_id, label.revision) for label in labels}),
        "different": sum(known.get(number) != label for number, label in said.items()),
        "order_kept": asked == sorted(asked, reverse=True),
    }  # fmt: skip


def main() -> int:
    """Run it once; 1 if anything was lost, doubled or out of order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--drop", type=float, default=0.3)
    parser.add_argument("--delay-s", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="relook-chaos-") as folder:
        home = open_home(Path(folder))
        local = LocalLabelStudio(home, LabelingSettings(port=0))
        server = local.up()
        store = open_store(RecordsSettings(home=home.root))
        began = time.monotonic()
        try:
            add_questions(store, arguments.items, arguments.seed)
            with (
                ChaosProxy(
                    server.url, drop=arguments.drop, delay_share=0.02, delay_s=arguments.delay_s, seed=arguments.seed
                ) as proxy,
                LabelStudioClient(server.url, server.token) as client,
            ):
                token = server.token.get_secret_value()
                kills = _sync_with_kills(home.root, proxy.url, token, store, arguments.kills // 2, chance)
                _answer_all(client, store)
                kills += _sync_with_kills(home.root, proxy.url, token, store, arguments.kills - kills, chance)
                found = {**compare(store, client), "kills": kills, **proxy.counts}
        finally:
            store.close()
            local.down()
    print(json.dumps({**found, "seconds": round(time.monotonic() - began, 1)}))
    return int(bool(found["lost"] or found["doubled"] or found["different"] or not found["order_kept"]))


def _sync_with_kills(home: Path, url: str, token: str, store: Store, kills: int, chance: random.Random) -> int:
    """Run `relook label sync` until it has nothing left to do, killing the first `kills` of its processes."""
    variables = {**os.environ, "RELOOK_HOME": str(home), "RELOOK_LABELING__URL": url, "RELOOK_LABELING__TOKEN": token}
    variables |= {"RELOOK_LABELING__PUSH_BATCH": "20", "RELOOK_LABELING__BLIND_SHARE": "0"}
    command = [sys.executable, "-m", "cluster.cli", "label", "sync", "--json"]
    killed = 0
    while True:
        with subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            if killed < kills:
                try:
                    process.wait(chance.uniform(2.0, 12.0))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    killed += 1
            said = process.communicate()[0]
        if process.returncode == 0:
            report = json.loads(said)
            if killed >= kills and report["pull"]["idle"] and not _waits(store):
                return killed


def _waits(store: Store) -> bool:
    with store.ledger.read() as tx:
        return tx.count(ReviewItem, where={"state": ReviewState.NEW}) > 0


def _answer_all(client: LabelStudioClient, store: Store) -> None:
    with store.ledger.read() as tx:
        items = tx.find(ReviewItem, where={"state": ReviewState.PUSHED})
    for number, item in enumerate(items):
        label = store.taxonomy.codes[number % len(store.taxonomy.codes)]
        client.create_annotation(item.task_id or 0, answer_result(label), key=uuid.uuid4())


if __name__ == "__main__":
    sys.exit(main())
