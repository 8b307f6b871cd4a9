"""The annotators of the demo, simulated or human, and the honest count of what became of their answers."""

import time
from collections import Counter
from typing import Any

import pandas as pd

from cluster.demo.view import View
from cluster.settings import Settings
from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from labeling.project import known_projects
from labeling.simulated_annotator import annotate
from records.datasets import load_dataset
from records.errors import LabelStudioError
from records.store import Store
from records.types import Annotation, AnswerKind, ReviewItem, ReviewState, Split

LOOK_EVERY_S = 2.0


def answer_as_simulated(store: Store, client: LabelStudioClient, settings: Settings) -> int:
    """Answer the open tasks from the known truth, through Label Studio's own API.

    Args:
        store: with the tasks, and the truth beside it.
        client: connected.
        settings: error rate, `can't tell` rate and seed of the demo.
    Returns:
        How many answers were given.
    """
    truth = pd.read_parquet(store.home.demo / "truth.parquet")
    given = annotate(
        client,
        store,
        dict(zip(truth["image_id"], truth["label"], strict=True)),
        error_rate=settings.demo.annotator_error_rate,
        cant_tell_rate=settings.demo.cant_tell_rate,
        seed=settings.demo.seed,
    )
    return len(given)


def wait_for_people(store: Store, client: LabelStudioClient, server: ServerInfo, view: View) -> None:
    """Wait until people have answered every task that was pushed.

    Args:
        store: with the tasks.
        client: connected.
        server: whose address and login are shown.
        view: shows how far it is.
    """
    projects = _projects(store, client)
    for project_id in projects:
        view.say(f"your turn: {server.url}/projects/{project_id}/data")
    view.say(f"log in as {server.username} with the password {server.password.get_secret_value()}")
    with store.ledger.read() as tx:
        wanted = tx.count(ReviewItem, where={"state": ReviewState.PUSHED})
    while (answered := sum(client.state(number).total_annotations for number in projects)) < wanted:
        view.now(f"waiting for annotators: {answered} of {wanted} answered")
        time.sleep(LOOK_EVERY_S)


def label_studio_figures(store: Store, client: LabelStudioClient, dataset_id: str) -> dict[str, Any]:
    """Hold the ledger against Label Studio itself: nothing may be lost, nothing doubled.

    Args:
        store: with what was pulled.
        client: connected.
        dataset_id: the version that was built from the answers.
    Returns:
        Tasks and annotations there, and what became of each annotation that was pulled.
    """
    projects = _projects(store, client)
    pages = (page for number in projects for page in client.list_tasks(number, with_annotations=True))
    tasks = [task for page in pages for task in page]
    there = {annotation.id for task in tasks for annotation in task.annotations if not annotation.was_cancelled}
    with store.ledger.read() as tx:
        rows = tx.find(Annotation, where={"project_id": projects}, order_by=("created_at", "id"))
    newest = {row.annotation_id: row for row in rows}
    pulled = [row for row in newest.values() if not row.deleted]
    items = Counter(str(task.meta.get("relook_item")) for task in tasks)
    tasks_doubled = sum(count - 1 for count in items.values())
    rows_doubled = len(rows) - len({(row.annotation_id, row.revision) for row in rows})
    return {
        "tasks_pushed": len(tasks),
        "annotations_in_label_studio": len(there),
        "annotations_pulled": len(pulled),
        **_fates(pulled, load_dataset(store, dataset_id).rows),
        "lost": len(there - {row.annotation_id for row in pulled}),
        "duplicated": tasks_doubled + rows_doubled,
    }


def _fates(pulled: list[Annotation], manifest: pd.DataFrame) -> dict[str, int]:
    """Say what became of each annotation; every one has exactly one fate."""
    by_annotator = manifest[manifest["label_source"].str.startswith("annotator:")].set_index("image_id")["split"]
    fates: Counter[str] = Counter({"trained_on": 0, "cant_tell": 0, "extra_reads": 0, "held_out": 0})
    counted: set[str] = set()
    for row in pulled:
        if row.answer is not AnswerKind.CLASS:
            fates["cant_tell"] += 1
        elif row.image_id in counted or row.image_id not in by_annotator.index:
            fates["extra_reads"] += 1
        else:
            counted.add(row.image_id)
            fates["trained_on" if by_annotator[row.image_id] == Split.TRAIN else "held_out"] += 1
    return dict(fates)


def _projects(store: Store, client: LabelStudioClient) -> list[int]:
    projects = list(known_projects(store, client))
    if not projects:
        raise LabelStudioError("nothing was pushed to Label Studio yet")
    return projects
