"""One sentence per failure: refusals of a real Label Studio, and small HTTP servers that misbehave."""

import json
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from labeling.project import open_project
from labeling.push import push
from labeling.settings import LabelingSettings
from labeling.tasks import annotation_result
from records.errors import LabelStudioError, UnknownIdError
from records.store import Store
from records.types import ReviewItem

Responses = list[tuple[int, str]]


@pytest.fixture
def misbehaving() -> Iterator[Callable[[Responses], str]]:
    """Make a server that gives these responses, one a request, the last one for good; returns its URL."""
    servers: list[ThreadingHTTPServer] = []

    def make(responses: Responses) -> str:
        waiting = list(responses)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = waiting.pop(0) if len(waiting) > 1 else waiting[0]
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def test_version_and_a_repr_without_the_token(server: ServerInfo, client: LabelStudioClient) -> None:
    assert client.version() == "1.23.2" == server.version
    assert server.token.get_secret_value() not in repr(client)
    assert client.server == "local", "the port of the local server may change, its data stay"


def test_a_wrong_token_names_where_the_right_one_is(server: ServerInfo) -> None:
    with (
        LabelStudioClient(server.url, "0" * 40) as stranger,
        pytest.raises(LabelStudioError, match=r"refused the token .*401.*keys/label-studio\.json"),
    ):
        stranger.version()


def test_what_is_gone_is_an_unknown_id(client: LabelStudioClient) -> None:
    assert client.project(10**6) is None
    with pytest.raises(UnknownIdError):
        client.state(10**6)
    with pytest.raises(UnknownIdError):
        client.create_annotation(10**6, annotation_result("mel"), key=uuid.uuid4())
    client.delete_task(10**6)


def test_a_refused_import_says_why(store: Store, client: LabelStudioClient, settings: LabelingSettings) -> None:
    project = open_project(store, client, settings)
    with pytest.raises(LabelStudioError, match=r"refused to import 1 tasks \(400: .*image"):
        client.import_tasks(project.id, [{"data": {"why": "no image"}, "meta": {}, "predictions": []}])
    assert client.state(project.id).total == 0


def test_an_annotation_with_a_known_key_is_made_once(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: Callable[..., list[ReviewItem]]
) -> None:
    (item,) = add_items(1)
    push(store, client, settings)
    with store.ledger.read() as tx:
        task_id = tx.require(ReviewItem, item.id).task_id or 0
    key = uuid.uuid4()
    assert client.create_annotation(task_id, annotation_result("mel"), key=key) is not None
    assert client.create_annotation(task_id, annotation_result("nv"), key=key) is None


def test_pages_follow_each_other_without_gap_or_duplicate(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, add_items: Callable[..., list[ReviewItem]]
) -> None:
    add_items(7)
    project_id = push(store, client, settings).project_id or 0
    pages = list(client.list_tasks(project_id, page_size=3))
    ids = [row.id for page in pages for row in page]
    assert [len(page) for page in pages] == [3, 3, 1]
    assert ids == sorted(set(ids))
    state = client.state(project_id)
    assert (state.total, state.total_annotations) == (7, 0)
    since = [row for page in client.list_tasks(project_id, updated_since=state.newest_update) for row in page]
    assert [row.id for row in since] == ids[-1:]


def test_no_server_at_the_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        LabelStudioClient(f"http://127.0.0.1:{port}", "0" * 40) as client,
        pytest.raises(LabelStudioError, match=r"cannot be reached to import 0 tasks .*relook label status"),
    ):
        client.import_tasks(1, [])


def test_a_server_that_never_responds() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        hasty = LabelStudioClient(url, "0" * 40, timeout_s=0.1)
        with hasty as client, pytest.raises(LabelStudioError, match="took too long to import 0 tasks"):
            client.import_tasks(1, [])


@pytest.mark.parametrize("body", ["<html>hello</html>", "{}", "[]", "null", '{"tasks": [{}], "total": 1}'])
def test_a_server_that_is_not_label_studio(misbehaving: Callable[[Responses], str], body: str) -> None:
    with (
        LabelStudioClient(misbehaving([(200, body)]), "0" * 40) as client,
        pytest.raises(LabelStudioError, match="is not a Label Studio that Relook knows"),
    ):
        client.state(1)


def test_passing_failures_are_retried_and_an_import_is_not(misbehaving: Callable[[Responses], str]) -> None:
    fine = json.dumps(
        {"total": 3, "total_annotations": 1, "tasks": [{"id": 1, "meta": {}, "updated_at": "2026-01-01T00:00:00Z"}]}
    )
    with LabelStudioClient(misbehaving([(503, "busy"), (200, fine)]), "0" * 40) as client:
        assert client.state(1).total == 3
    with (
        LabelStudioClient(misbehaving([(500, "boom"), (201, '{"task_ids": []}')]), "0" * 40) as client,
        pytest.raises(LabelStudioError, match=r"failed to import 0 tasks \(500: boom\)"),
    ):
        client.import_tasks(1, [])


@pytest.mark.parametrize(("status", "words"), [(403, "refused the token"), (400, "refused to read project 1")])
def test_refusals_are_not_retried(misbehaving: Callable[[Responses], str], status: int, words: str) -> None:
    url = misbehaving([(status, '{"detail": "no"}'), (200, "{}")])
    with LabelStudioClient(url, "0" * 40) as client, pytest.raises(LabelStudioError, match=words):
        client.project(1)
