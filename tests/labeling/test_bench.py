"""The measurement counts what it should, at a real Label Studio; how fast anything is, is no test."""

import pytest

from bench.label.bulk import counted, measure
from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from labeling.settings import LabelingSettings
from records.store import Store
from records.types import ReviewItem


@pytest.mark.soak
def test_both_clients_move_the_same(
    store: Store, server: ServerInfo, client: LabelStudioClient, settings: LabelingSettings
) -> None:
    found = measure(store, server, settings, 23)
    assert (found["items"], found["lost"], found["duplicated"]) == (23, 0, 0)
    assert found["push_over_bare"] == pytest.approx(found["push_s"] / found["bare_push_s"])
    assert found["pull_over_bare"] == pytest.approx(found["pull_s"] / found["bare_pull_s"])
    exactly = {"tasks": 23, "annotations": 23, "lost": 0, "doubled": 0, "different": 0}
    assert counted(store, client) == exactly

    with store.ledger.read() as tx:
        first, *_ = tx.find(ReviewItem, order_by=("id",))
    client.delete_task(first.task_id or 0)
    assert counted(store, client) == {"tasks": 22, "annotations": 22, "lost": 1, "doubled": 0, "different": 1}
