"""A real Label Studio notifies the service of new, edited and deleted annotations; a guessed secret is refused."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from labeling.project import open_project
from labeling.push import push
from labeling.sync import sync, wait_for_notification
from labeling.tasks import annotation_result
from labeling.webhooks import ensure_webhook
from records.errors import AccessError, LabelStudioError
from records.keys import key_of
from records.notifications import SECRET_FILE, SECRET_HEADER, WEBHOOK_PATH, last_notification
from serving.problems import problem_of
from serving.routes.webhooks import webhooks_router

PATIENCE_S = 600.0


@dataclass(frozen=True)
class Served:
    """The part of a service that the route uses."""

    store: Any


@pytest.fixture
def address(store) -> Iterator[str]:
    """The route over real HTTP."""
    app = FastAPI()
    app.include_router(webhooks_router(Served(store)))  # type: ignore[arg-type]

    @app.exception_handler(AccessError)
    async def refused(_: Any, error: AccessError) -> Any:
        from fastapi.responses import JSONResponse

        return JSONResponse(problem_of(error).model_dump(), problem_of(error).status)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        # Connections wait here until the server, whose thread may begin late, accepts them.
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_annotations_edits_and_deletions_notify_and_the_next_sync_reads_them(
    store, client, settings, add_items, address
):
    notified = settings.model_copy(update={"webhook_url": address})
    add_items(2)
    push(store, client, notified)
    project = open_project(store, client, notified)
    (page,) = client.list_tasks(project.id)
    hooks = client.request("GET", "api/webhooks/", "list webhooks", params={"project": project.id})
    assert [hook["url"] for hook in hooks] == [address + WEBHOOK_PATH]

    seen = last_notification(store.ledger)
    annotation = client.create_annotation(page[0].id, annotation_result("mel"), key=uuid4())
    assert wait_for_notification(store.ledger, seen, PATIENCE_S)
    assert sync(store, client, notified).pull.new_labels == 1

    for verb, body in (("PATCH", {"result": annotation_result("nv")}), ("DELETE", None)):
        seen = last_notification(store.ledger)
        client.request(verb, f"api/annotations/{annotation}/", "change an annotation", body=body)
        assert wait_for_notification(store.ledger, seen, PATIENCE_S), verb
    assert sync(store, client, notified).pull.deleted == 1

    # A secret that was lost is made anew, and the next push tells Label Studio.
    (store.home.keys / SECRET_FILE).unlink()
    open_project(store, client, notified)
    (hook,) = client.request("GET", "api/webhooks/", "list webhooks", params={"project": project.id})
    assert hook["headers"] == {SECRET_HEADER: key_of(store.home, SECRET_FILE)}

    # Without the setting there is no webhook.
    open_project(store, client, settings)
    assert client.request("GET", "api/webhooks/", "list webhooks", params={"project": project.id}) == []


def test_a_guessed_secret_notifies_nobody_and_a_wait_ends_by_itself(store, address):
    for guess in ("", "guessed", "ä" * 64):
        response = httpx.post(address + WEBHOOK_PATH, headers={SECRET_HEADER: guess.encode()}, trust_env=False)
        assert response.status_code == 403
    assert httpx.post(address + WEBHOOK_PATH, trust_env=False).status_code == 422
    assert last_notification(store.ledger) is None
    began_s = time.monotonic()
    assert not wait_for_notification(store.ledger, None, 0.2)
    assert time.monotonic() - began_s >= 0.2


def test_an_address_that_label_studio_may_not_call_is_refused_with_the_fix(store, client, settings):
    project = open_project(store, client, settings)
    with pytest.raises(LabelStudioError, match=r"SSRF_PROTECTION_ENABLED.*unset labeling\.webhook_url"):
        ensure_webhook(store.home, client, project.id, "http://10.0.0.1:8000")
