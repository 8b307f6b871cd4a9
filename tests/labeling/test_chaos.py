"""A network that drops, repeats and delays requests, and killed processes: nothing lost, nothing duplicated."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from bench.drills import label_chaos
from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from labeling.settings import LabelingSettings
from labeling.sync import sync
from labeling.tasks import annotation_result
from records.errors import LabelStudioError
from records.store import Store
from records.types import ReviewItem, ReviewState

ROOT = Path(__file__).parents[2]


def _until_quiet(store: Store, url: str, token: str, settings: LabelingSettings) -> int:
    """Sync until nothing waits and nothing is new; returns how often the network made it fail."""
    failures = 0
    for _ in range(60):
        try:
            with LabelStudioClient(url, token, timeout_s=60) as client:
                report = sync(store, client, settings)
        except LabelStudioError:
            failures += 1
            continue
        with store.ledger.read() as tx:
            waits = tx.count(ReviewItem, where={"state": ReviewState.NEW})
        if not waits and report.pull.idle:
            return failures
    pytest.fail("60 syncs were not enough")


@pytest.mark.slow
def test_a_bad_network_loses_and_duplicates_nothing(
    store: Store,
    client: LabelStudioClient,
    server: ServerInfo,
    settings: LabelingSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("labeling.client._PAUSES_S", (0.01, 0.02, 0.05))
    label_chaos.add_review_items(store, 20, 3)
    small = settings.model_copy(update={"push_batch": 5})
    token = server.token.get_secret_value()
    with label_chaos.ChaosProxy(server.url, drop=0.3, delay_share=0.05, delay_s=0.2, seed=11) as proxy:
        _until_quiet(store, proxy.url, token, small)
        with store.ledger.read() as tx:
            items = tx.find(ReviewItem, order_by=("id",))
        for number, item in enumerate(items):
            client.create_annotation(
                item.task_id or 0, annotation_result("mel" if number % 3 else "nv"), key=uuid.uuid4()
            )
        _until_quiet(store, proxy.url, token, small)
    found = label_chaos.compare(store, client)
    assert proxy.counts["dropped"] > 5
    wanted = {"tasks": 20, "annotations": 20, "lost": 0, "doubled": 0, "different": 0, "order_kept": True}
    assert found == wanted


@pytest.mark.soak  # test_round_trip has a push that is killed after its import, without the process
def test_a_killed_push_is_continued(
    store: Store, client: LabelStudioClient, server: ServerInfo, settings: LabelingSettings
) -> None:
    label_chaos.add_review_items(store, 30, 4)
    push_and_die = (
        "import os, signal, sys\n"
        "from labeling.client import LabelStudioClient\n"
        "from labeling.push import push\n"
        "from labeling.settings import LabelingSettings\n"
        "from records.settings import RecordsSettings\n"
        "from records.store import open_store\n"
        "store = open_store(RecordsSettings(home=sys.argv[1]))\n"
        "client = LabelStudioClient(sys.argv[2], os.environ['TOKEN'])\n"
        "whole = client.import_tasks\n"
        "def die(project_id, tasks):\n"
        "    whole(project_id, tasks)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "client.import_tasks = die\n"
        "push(store, client, LabelingSettings(push_batch=10, imports_at_once=2, blind_share=0.0))\n"
    )
    command = [sys.executable, "-c", push_and_die, str(store.home.root), server.url]
    variables = {**os.environ, "TOKEN": server.token.get_secret_value(), "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=variables, check=False).returncode == -signal.SIGKILL
    report = sync(store, client, settings).push
    assert report.pushed + report.refreshed == 30
    assert report.refreshed in (10, 20), "the pull finds the tasks of the one or two imports that arrived"
    found = label_chaos.compare(store, client)
    assert (found["tasks"], found["lost"], found["doubled"], found["order_kept"]) == (30, 0, 0, True)
