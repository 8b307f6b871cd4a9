"""One item, document or annotation that cannot be processed: the others are pushed and pulled, and nothing is lost."""

import http.server
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as PillowImage

from labeling.client import LabelStudioClient
from labeling.deletion import pending_items
from labeling.local_server import ServerInfo
from labeling.pull import pull
from labeling.push import push
from labeling.rows import task_row
from labeling.settings import LabelingSettings
from labeling.tasks import annotation_result, parse_annotation
from records.erasure import RECORDS_PLACES, erase_images
from records.errors import LabelStudioRefusedError
from records.store import Store
from records.taxonomy import load_taxonomy
from records.types import Annotation, AnnotationKind, ReviewItem, ReviewState

AddItems = Callable[..., list[ReviewItem]]
_KEPT = ("authorization", "content-type", "accept")


class Proxy:
    """A proxy before a real Label Studio that refuses what its rules name, as proxies and servers do."""

    def __init__(self, upstream: str) -> None:
        self.refused: dict[str, int] = {}
        """text in a request's path or body -> status"""
        self.most_bytes = 10**9
        self.fails_after_import = 0
        """so many imports are carried out and answered 500"""
        self.rewrite: Callable[[Any], Any] = lambda found: found
        self.imports = 0
        self._http = httpx.Client(base_url=upstream, timeout=600, trust_env=False)

    def close(self) -> None:
        """Close the connections to Label Studio."""
        self._http.close()

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """Return status and body of a response."""
        is_import = method == "POST" and path.split("?")[0].endswith("/import")
        self.imports += is_import
        if len(body) > self.most_bytes:
            return 413, b"<html>413 Request Entity Too Large</html>"
        for text, status in self.refused.items():
            if text in path or text.encode() in body:
                return status, json.dumps({"detail": f"refused by a rule\x00: {text}"}).encode()
        response = self._http.request(method, path, content=body, headers=headers)
        if is_import and self.fails_after_import:
            self.fails_after_import -= 1
            return 500, b'{"detail": "broken after the import"}'
        if method == "GET" and path.startswith("/api/tasks/") and response.is_success:
            return response.status_code, json.dumps(self.rewrite(response.json())).encode()
        return response.status_code, response.content


@contextmanager
def proxied(server: ServerInfo) -> Iterator[tuple[Proxy, LabelStudioClient]]:
    """Run a proxy, with a client that goes through it."""
    proxy = Proxy(server.url)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name: self.headers[name] for name in _KEPT if name in self.headers}
            status, content = proxy.answer(self.command, self.path, body, headers)
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = _forward  # noqa: N815 - names of the library

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        with LabelStudioClient(f"http://127.0.0.1:{listening.server_address[1]}", server.token) as client:
            yield proxy, client
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
        proxy.close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused here is refused however long a client waits."""
    monkeypatch.setattr("labeling.client._PAUSES_S", (0.01, 0.02, 0.05))


def states(store: Store) -> dict[str, ReviewState]:
    with store.ledger.read() as tx:
        return {item.id: item.state for item in tx.find(ReviewItem)}


def sent_items(client: LabelStudioClient, project_id: int) -> list[str]:
    return sorted(str(row.meta["relook_item"]) for page in client.list_tasks(project_id) for row in page)


def labelled(store: Store) -> set[str]:
    with store.ledger.read() as tx:
        return {label.review_item_id for label in tx.find(Annotation)}


def blob_file(store: Store, blob_id: str) -> Path:
    return Path(store.blobs.root) / blob_id[:2] / blob_id


@pytest.mark.slow
def test_damaged_blobs_hold_up_no_other_item(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: AddItems
) -> None:
    items = add_items(40)
    damaged = {
        items[0].id: items[0].image_id,
        items[7].id: items[7].image_id,
        items[8].id: items[8].overlay_blob or "",
        items[39].id: items[39].image_id,
    }
    whole = {blob: blob_file(store, blob).read_bytes() for blob in damaged.values()}
    for item_id, blob in damaged.items():
        blob_file(store, blob).unlink()
        # One is gone, and a folder in its place fails as a disk does.
        if item_id == items[39].id:
            blob_file(store, blob).mkdir()
        elif item_id != items[7].id:
            blob_file(store, blob).write_bytes(b"\xff\xd8\xff cut off")
    for _ in range(2):
        report = push(store, client, settings)
        assert len(report.unreadable) == len(damaged)
        assert {sentence.split()[2].rstrip(":") for sentence in report.unreadable} == set(damaged)
        assert {item for item, state in states(store).items() if state is ReviewState.NEW} == set(damaged)
    blob_file(store, damaged[items[39].id]).rmdir()
    for blob, content in whole.items():
        blob_file(store, blob).write_bytes(content)
    report = push(store, client, settings)
    assert (report.pushed, report.unreadable) == (len(damaged), [])
    assert sent_items(client, report.project_id or 0) == sorted(item.id for item in items)


@pytest.mark.slow
@pytest.mark.long
def test_documents_that_are_refused_hold_up_no_other_item(
    store: Store, server: ServerInfo, settings: LabelingSettings, add_items: AddItems, add_item: Any
) -> None:
    items = add_items(12)
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    path = store.home.root / "large.jpg"
    PillowImage.fromarray(noise).save(path, "JPEG", quality=95)
    large = add_item(path.read_bytes(), blob_file(store, items[0].overlay_blob or "").read_bytes(), 5.5)
    wide = settings.model_copy(update={"push_batch": 8, "image_side_px": 1400})
    with proxied(server) as (proxy, client):
        proxy.most_bytes = 1_000_000
        proxy.refused = {items[3].id: 400, items[4].id: 500, items[11].id: 422}
        proxy.fails_after_import = 1
        failing = {items[3].id, items[4].id, items[11].id, large.id}
        report = push(store, client, wide)
        assert {one for one, state in states(store).items() if state is ReviewState.NEW} == failing
        assert {sentence.split()[2].rstrip(":") for sentence in report.unreadable} == failing
        assert all(sentence.isprintable() for sentence in report.unreadable)
        assert any("too large" in sentence for sentence in report.unreadable)
        project_id = report.project_id or 0
        assert sent_items(client, project_id) == sorted(item.id for item in items if item.id not in failing)
        # The next push tries them again, in few requests, and what came meanwhile is not held up.
        proxy.imports = 0
        more = add_items(1, first_seed=100)
        report = push(store, client, wide)
        assert (report.pushed, len(report.unreadable)) == (1, len(failing))
        assert proxy.imports <= 2 * 5 - 1 + 2
        # A task that cannot be updated does not hold up the updates of others.
        with store.ledger.begin() as tx:
            for item in (items[0], items[1], items[2]):
                tx.update(ReviewItem, item.id, comment=f"look again {item.id}")
        proxy.refused |= {f"look again {items[1].id}": 400}
        report = push(store, client, wide)
        assert (report.refreshed, len(report.unreadable)) == (2, len(failing) + 1)
        proxy.refused, proxy.most_bytes = {}, 10**9
        report = push(store, client, wide)
        assert (report.pushed, report.refreshed, report.unreadable) == (len(failing), 1, [])
        everything = sorted(item.id for item in [*items, *more, large])
        assert sent_items(client, project_id) == everything


@pytest.mark.slow
@pytest.mark.long
def test_annotations_that_cannot_be_read_hold_up_no_other(
    store: Store, server: ServerInfo, settings: LabelingSettings, add_items: AddItems
) -> None:
    items = add_items(8)
    odd: list[dict[str, Any]] = [
        {"result": annotation_result("nv"), "lead_time": -5},
        {"result": ["x", 3, {"from_name": "diagnosis", "value": {"choices": 5}}], "lead_time": 1},
        {"result": [*annotation_result("mel"), comment("a\x00b\ud800\u202e" + "c" * 9000)], "lead_time": 1e300},
    ]
    with proxied(server) as (proxy, client):
        project_id = push(store, client, settings).project_id or 0
        with store.ledger.read() as tx:
            tasks = {item.id: item.task_id or 0 for item in tx.find(ReviewItem)}
        for item, body in zip(items, odd, strict=False):
            # Past the client, as any program with a token may do; Label Studio itself refuses some of it.
            url = f"{server.url}/api/tasks/{tasks[item.id]}/annotations/"
            token = {"Authorization": f"Token {server.token.get_secret_value()}", "Content-Type": "application/json"}
            httpx.post(url, content=json.dumps(body), headers=token, trust_env=False)
        for item in items[3:]:
            client.create_annotation(tasks[item.id], annotation_result("bcc"), key=uuid.uuid4())

        broken = {tasks[items[5].id]: "0001-01-01T00:00:00+23:59", tasks[items[6].id]: "tomorrow"}

        def rewrite(found: Any) -> Any:
            for task in found["tasks"]:
                for annotation in task.get("annotations") or ():
                    annotation["updated_at"] = broken.get(task["id"], annotation["updated_at"])
            return found

        proxy.rewrite = rewrite
        for number in range(3):
            report = pull(store, client, settings)
            # Some of the odd ones Label Studio takes and then fails to list.
            failed = {int(sentence.split()[1].rstrip(":")) for sentence in report.failed}
            unlisted = {item.id for item in items[:3] if tasks[item.id] in failed}
            assert len(report.failed) == len(broken) + len(unlisted), report.failed
            assert failed >= set(broken)
            assert (report.new_labels > 0) == (number == 0)
            assert labelled(store) >= {items[3].id, items[4].id, items[7].id}
            assert not labelled(store) & {items[5].id, items[6].id, *unlisted}
        proxy.rewrite = lambda found: found
        report = pull(store, client, settings)
        assert (report.new_labels, len(report.failed)) == (2, len(unlisted))
        assert project_id == report.project_id
        with store.ledger.read() as tx:
            labels = tx.find(Annotation)
        assert labelled(store) >= {item.id for item in items[3:]}
        assert all((label.comment or "").isprintable() and len(label.comment or "") <= 2000 for label in labels)
        for item_id in unlisted:
            client.delete_task(tasks[item_id])
        for _ in range(3):
            pull(store, client, settings)
        assert pull(store, client, settings).idle
        assert {item for item, state in states(store).items() if state is ReviewState.WITHDRAWN} == unlisted


@pytest.mark.slow
def test_a_task_that_cannot_be_deleted_holds_up_neither_other_deletions_nor_the_pull(
    store: Store, server: ServerInfo, settings: LabelingSettings, add_items: AddItems
) -> None:
    items = add_items(4)
    with proxied(server) as (proxy, client):
        project_id = push(store, client, settings).project_id or 0
        with store.ledger.read() as tx:
            tasks = {item.id: item.task_id or 0 for item in tx.find(ReviewItem)}
        client.create_annotation(tasks[items[3].id], annotation_result("bcc"), key=uuid.uuid4())
        erase_images(store, [item.image_id for item in items[:3]], actor="test", places=RECORDS_PLACES)
        bad = items[1].id
        for status in (400, 413):
            proxy.refused = {f"api/tasks/{tasks[bad]}": status}
            report = pull(store, client, settings)
            assert [f"task {tasks[bad]} of an erased image" in sentence for sentence in report.failed] == [True]
            assert report.failed[0].isprintable()
            assert pending_items(store) == {bad}
            assert sent_items(client, project_id) == sorted([bad, items[3].id])
        assert labelled(store) == {items[3].id}
        # A project that is not listed is searched again by the next pull.
        proxy.refused = {"api/tasks/?": 400}
        assert any("was not searched" in sentence for sentence in pull(store, client, settings).failed)
        assert pending_items(store) == {bad}
        proxy.refused = {}
        assert pull(store, client, settings).failed == []
        assert (pending_items(store), sent_items(client, project_id)) == (set(), [items[3].id])


def comment(text: str) -> dict[str, Any]:
    return {"from_name": "comment", "to_name": "image", "type": "textarea", "value": {"text": [text]}}


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        ([{"from_name": "diagnosis", "value": {"choices": 5}}], AnnotationKind.OTHER),
        ([{"from_name": "diagnosis", "value": {"choices": {"mel": 1}}}], AnnotationKind.OTHER),
        ([{"from_name": "diagnosis", "value": 7}], AnnotationKind.OTHER),
        ([*annotation_result("mel"), comment("\x00\ud800")], AnnotationKind.CLASS),
        ([*annotation_result("mel"), {"from_name": "comment", "value": {"text": 3.5}}], AnnotationKind.CLASS),
    ],
)
def test_any_result_is_parsed_to_texts_that_can_be_stored(result: list[dict[str, Any]], kind: AnnotationKind) -> None:
    parsed = parse_annotation(result, load_taxonomy("ham10000"))
    assert parsed.kind is kind
    assert "\x00" not in (parsed.comment or "")
    assert (parsed.comment or "").encode() is not None


@pytest.mark.parametrize(
    "annotation",
    [{}, {"id": "x"}, {"result": 5}, {"updated_at": "tomorrow"}, {"completed_by": {"id": 3}}, {"updated_at": None}],
)
def test_a_task_with_an_odd_annotation_is_a_row_with_a_fault(annotation: dict[str, Any]) -> None:
    whole = {"id": 1, "result": [], "completed_by": 1, "was_cancelled": False, "lead_time": 1.0}
    whole["updated_at"] = "2026-03-01T12:00:00Z"
    odd = whole | annotation if annotation else {}
    row = task_row({"id": 7, "meta": {}, "updated_at": "2026-03-01T12:00:00Z", "annotations": [whole, odd]})
    assert (row.annotations, row.is_touched) == ((), True)
    assert "cannot be read" in (row.fault or "")


@pytest.mark.parametrize("lead_time", [-5, float("nan"), float("inf"), "3", True, None, 1e12, 10**400])
def test_a_lead_time_that_is_none_is_left_out(lead_time: Any) -> None:
    annotation = {"id": 1, "result": None, "completed_by": None, "was_cancelled": False, "lead_time": lead_time}
    annotation["updated_at"] = "2026-03-01T12:00:00Z"
    row = task_row({"id": 7, "meta": None, "updated_at": "2026-03-01T12:00:00Z", "annotations": [annotation]})
    assert [one.lead_time_s for one in row.annotations] == [None]


@pytest.mark.parametrize("end", ["completed", "failed"])
def test_an_import_in_the_background_is_waited_for(end: str) -> None:
    left = ["created", "in_progress", "in_progress", end]

    class Handler(http.server.BaseHTTPRequestHandler):
        """As the enterprise edition responds, which cannot be had here."""

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._send({"import": 17})

        def do_GET(self) -> None:
            assert self.path == "/api/projects/3/imports/17/"
            self._send({"status": left.pop(0), "task_ids": [5, 6], "error": "no key 'image'\x00"})

        def _send(self, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(201)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        with LabelStudioClient(f"http://127.0.0.1:{listening.server_address[1]}", "0" * 40) as client:
            if end == "completed":
                assert client.import_tasks(3, [{}, {}]) == [5, 6]
            else:
                with pytest.raises(LabelStudioRefusedError, match="no key 'image'"):
                    client.import_tasks(3, [{}, {}])
        assert not left
    finally:
        listening.shutdown()
        listening.server_close()
